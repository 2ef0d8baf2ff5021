// Integer products of groups in 512 bits, with VNNI. An instruction takes twice the weights of one of 256 bits, so that the
// core's window holds twice the lines that wait for memory (docs/LOG.md).
#pragma once

#include "isa/integers_vector.h"

namespace {

constexpr int kBeside = 4;  // groups of x.halves that lie side by side (see core/rounded.h)

inline __m512i load_line(const uint8_t *p, int count = 64) {  // 0 beyond the count, where nothing is read
    return count >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << count) - 1, p);
}
// A signed byte as an unsigned one that stands for itself - 128.
inline __m512i lifted(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }

// out[c] = row c · x for C rows in lockstep, a line of `Groups` groups at a time; codes stand for code - Offset, which
// the sums of x make up for. With Ahead `then` is prefetched line by line. The loops over 8 groups are unrolled because what
// depends on a group's number is then a constant. products(line, b): each lane's share of the line's products with the
// groups of x from b on.
template <int C, bool Ahead, int Groups, int Offset, class F>
inline void dot_lines(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const float *x_scale,
                      const float *x_sums, int64_t groups, float *out, F products) {
    constexpr int kBytes = 64 / Groups, kLanes = 16 / Groups;
    __m512 sum[C];
    __m256 less[C];
    for (int c = 0; c < C; ++c) sum[c] = _mm512_setzero_ps(), less[c] = _mm256_setzero_ps();
    for (int64_t b = 0; b < groups; b += 8) {
        const int count = groups - b < 8 ? static_cast<int>(groups - b) : 8;
        const __m256 xs = _mm256_loadu_ps(x_scale + b), sums = _mm256_loadu_ps(x_sums + b);
        __m512 scale[C];
        for (int c = 0; c < C; ++c) {
            const __m256 s = count == 8 ? load_halves(scales[c] + 2 * b) : load_halves(scales[c] + 2 * b, count);
            scale[c] = _mm512_castps256_ps512(_mm256_mul_ps(s, xs));
            less[c] = _mm256_fmadd_ps(s, sums, less[c]);
        }
        const auto line = [&](int k, int bytes) {
            const __m512i own = _mm512_add_epi32(
                _mm512_set1_epi32(k), _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                                        kLanes == 8 ? 3 : 2));
            for (int c = 0; c < C; ++c) {
                const int64_t at = kBytes * (b + k);
                if (Ahead) prefetch<64>(then[c] + at);
                const __m512 part = _mm512_cvtepi32_ps(products(load_line(w[c] + at, bytes), b + k));
                sum[c] = _mm512_fmadd_ps(part, _mm512_permutexvar_ps(own, scale[c]), sum[c]);
            }
        };
        if (count == 8) {
#pragma GCC unroll 4
            for (int k = 0; k < 8; k += Groups) line(k, 64);
        } else {
            for (int k = 0; k < count; k += Groups) line(k, kBytes * (count - k));
        }
    }
    for (int c = 0; c < C && Ahead; ++c) prefetch<128>(then[c] + kBytes * groups);
    for (int c = 0; c < C; ++c) out[c] = _mm512_reduce_add_ps(sum[c]) - static_cast<float>(Offset) * sum_lanes(less[c]);
}

// y[0 .. 16) += integers * scales, for integers of 32 and of 16 bits.
inline void add_scaled(__m512i integers, const uint8_t *scales, float scale, float *y) {
    const __m512 by = _mm512_mul_ps(_mm512_cvtph_ps(load_bytes(scales)), _mm512_set1_ps(scale));
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers), by, _mm512_loadu_ps(y)));
}
inline void add_scaled(__m256i integers, const uint8_t *scales, float scale, float *y) {
    add_scaled(_mm512_cvtepi16_epi32(integers), scales, scale, y);
}

}  // namespace
