// Integer products of blocks in 512 bits, with VNNI. An instruction takes twice the weights of one of 256 bits, so that the
// core's window holds twice the lines that wait for memory (docs/LOG.md).
#pragma once

#include "blocks_vector.h"

namespace {

constexpr int kBeside = 4;  // blocks of Q4_0 that are multiplied at once

inline __m512i load_line(const uint8_t *p, int count = 64) {  // 0 beyond the count, where nothing is read
    return count >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << count) - 1, p);
}
// A signed byte as an unsigned one that stands for itself - 128.
inline __m512i lifted(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }

// out[c] = row c · x for C rows in lockstep, a line of `Blocks` blocks at a time; codes stand for code - Offset, which
// `x_sums` make up for. With Ahead `then` is prefetched line by line. The loops over 8 blocks are unrolled because what
// depends on a block's number is then a constant. products(line, b): each lane's share of the line's products with the
// blocks of x from b on.
template <int C, bool Ahead, int Blocks, int Offset, class F>
inline void dot_lines(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const float *x_scale,
                      const float *x_sums, int64_t blocks, float *out, F products) {
    constexpr int kBytes = 64 / Blocks, kLanes = 16 / Blocks;
    __m512 sum[C];
    __m256 less[C];
    for (int c = 0; c < C; ++c) sum[c] = _mm512_setzero_ps(), less[c] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b += 8) {
        const int count = blocks - b < 8 ? static_cast<int>(blocks - b) : 8;
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
            for (int k = 0; k < 8; k += Blocks) line(k, 64);
        } else {
            for (int k = 0; k < count; k += Blocks) line(k, kBytes * (count - k));
        }
    }
    for (int c = 0; c < C && Ahead; ++c) prefetch<128>(then[c] + kBytes * blocks);
    for (int c = 0; c < C; ++c) out[c] = _mm512_reduce_add_ps(sum[c]) - static_cast<float>(Offset) * sum_lanes(less[c]);
}

template <int C, bool Ahead>
inline void dot_q8(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const int8_t *x,
                   const float *x_scale, const float *x_sums, int64_t blocks, float *out) {
    dot_lines<C, Ahead, 2, 128>(w, scales, then, x_scale, x_sums, blocks, out, [&](__m512i line, int64_t b) {
        return _mm512_dpbusd_epi32(_mm512_setzero_si512(), lifted(line), _mm512_loadu_si512(x + 32 * b));
    });
}

template <int C, bool Ahead>
inline void dot_q4(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const int8_t *x,
                   const float *x_scale, const float *x_sums, int64_t blocks, float *out) {
    const __m512i low = _mm512_set1_epi8(15);
    dot_lines<C, Ahead, 4, 8>(w, scales, then, x_scale, x_sums, blocks, out, [&](__m512i line, int64_t b) {
        const __m512i front = _mm512_and_si512(line, low), back = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
        const __m512i first = _mm512_dpbusd_epi32(_mm512_setzero_si512(), front, _mm512_loadu_si512(x + 32 * b));
        return _mm512_dpbusd_epi32(first, back, _mm512_loadu_si512(x + 32 * b + 64));
    });
}

// y[0 .. 16) += integers * scales, for integers of 32 and of 16 bits.
inline void add_scaled(__m512i integers, const uint8_t *scales, float scale, float *y) {
    const __m512 by = _mm512_mul_ps(_mm512_cvtph_ps(load_bytes(scales)), _mm512_set1_ps(scale));
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers), by, _mm512_loadu_ps(y)));
}
inline void add_scaled(__m256i integers, const uint8_t *scales, float scale, float *y) {
    add_scaled(_mm512_cvtepi16_epi32(integers), scales, scale, y);
}

// Columns of Q8_0. Sums are of 64 outputs: the first four of every 16, then the second, third and fourth four.
struct SumsQ8 {
    using Reg = __m512i;
    static constexpr int offset = 128, lanes = 16, outputs = 1, step = 64;
    static constexpr auto at = at_q8;

    // sums[0 .. n) = (First) `less` or += sum over some columns of v * code. Beyond the count v is 0 and `column` repeats one.
    template <bool First>
    static void add(const uint8_t *const *column, int count, const int8_t *v, int64_t from, int64_t n, int less, Reg *sums,
                    const Following &ahead) {
        const __m512i begin = _mm512_set1_epi32(less);
        for (int64_t o = 0; o < n; o += 64, sums += 4) {
            __m512i s0 = begin, s1 = begin, s2 = begin, s3 = begin;
            if (!First) s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
            ahead.at<64>(o);
            for (int i = 0; i < count; i += 4) {
                int32_t four;
                std::memcpy(&four, v + i, 4);
                const __m512i factor = _mm512_set1_epi32(four);
                const auto codes = [&](int k) { return lifted(load_line(column[i + k] + from + o)); };
                const __m512i a = codes(0), b = codes(1), c = codes(2), d = codes(3);
                const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
                const __m512i ba = _mm512_unpackhi_epi8(a, b), dc = _mm512_unpackhi_epi8(c, d);
                s0 = _mm512_dpbusd_epi32(s0, _mm512_unpacklo_epi16(ab, cd), factor);
                s1 = _mm512_dpbusd_epi32(s1, _mm512_unpackhi_epi16(ab, cd), factor);
                s2 = _mm512_dpbusd_epi32(s2, _mm512_unpacklo_epi16(ba, dc), factor);
                s3 = _mm512_dpbusd_epi32(s3, _mm512_unpackhi_epi16(ba, dc), factor);
            }
            sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
        }
        ahead.at<128>(n);
    }

    static void scale(const Reg *s, const uint8_t *scales, float by, float *y) {
        const __m512i a = _mm512_shuffle_i32x4(s[0], s[1], 0x44), b = _mm512_shuffle_i32x4(s[2], s[3], 0x44);  // 0 .. 31
        const __m512i c = _mm512_shuffle_i32x4(s[0], s[1], 0xee), d = _mm512_shuffle_i32x4(s[2], s[3], 0xee);  // 32 .. 63
        add_scaled(_mm512_shuffle_i32x4(a, b, 0x88), scales, by, y);
        add_scaled(_mm512_shuffle_i32x4(a, b, 0xdd), scales + 32, by, y + 16);
        add_scaled(_mm512_shuffle_i32x4(c, d, 0x88), scales + 64, by, y + 32);
        add_scaled(_mm512_shuffle_i32x4(c, d, 0xdd), scales + 96, by, y + 48);
    }
};

// Columns of Q4_0, in 16 bits; sums are of 128 outputs: the first eight of every 32, then the second, third and fourth eight.
// They begin at `less`, -8 * the sum of v. On the way they may wrap; in the end 32 * 127 * 8 fits.
struct SumsQ4 {
    using Reg = __m512i;
    static constexpr int offset = 8, lanes = 32, outputs = 2, step = 128;
    static constexpr auto at = at_q4;

    template <bool First>
    static void add(const uint8_t *const *column, int count, const int8_t *v, int64_t from, int64_t n, int less, Reg *sums,
                    const Following &ahead) {
        const __m512i low = _mm512_set1_epi8(15), begin = _mm512_set1_epi16(static_cast<int16_t>(less));
        for (int64_t o = 0; o < n; o += 128, sums += 4) {
            __m512i s0 = begin, s1 = begin, s2 = begin, s3 = begin;
            if (!First) s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
            ahead.at<64>(o / 2);
            for (int i = 0; i < count; i += 2) {
                int16_t two;
                std::memcpy(&two, v + i, 2);
                const __m512i factor = _mm512_set1_epi16(two);
                const __m512i a = load_line(column[i] + (from + o) / 2), b = load_line(column[i + 1] + (from + o) / 2);
                const __m512i ab = _mm512_unpacklo_epi8(a, b), ba = _mm512_unpackhi_epi8(a, b);
                const auto products = [&](__m512i codes) { return _mm512_maddubs_epi16(_mm512_and_si512(codes, low), factor); };
                s0 = _mm512_add_epi16(s0, products(ab));
                s1 = _mm512_add_epi16(s1, products(ba));
                s2 = _mm512_add_epi16(s2, products(_mm512_srli_epi16(ab, 4)));
                s3 = _mm512_add_epi16(s3, products(_mm512_srli_epi16(ba, 4)));
            }
            sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
        }
        ahead.at<128>(n / 2);
    }

    static void scale(const Reg *s, const uint8_t *scales, float by, float *y) {
        const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for (int half = 0; half < 2; ++half) {  // outputs 0 .. 15 of every 32, then the others
            const __m512i a = s[2 * half], b = s[2 * half + 1];
            const __m512i low = _mm512_permutex2var_epi64(a, front, b), high = _mm512_permutex2var_epi64(a, back, b);
            const auto add = [&](__m256i integers, int64_t o) { add_scaled(integers, scales + 2 * o, by, y + o); };
            add(_mm512_castsi512_si256(low), 16 * half);
            add(_mm512_extracti64x4_epi64(low, 1), 16 * half + 32);
            add(_mm512_castsi512_si256(high), 16 * half + 64);
            add(_mm512_extracti64x4_epi64(high, 1), 16 * half + 96);
        }
    }
};

}  // namespace
