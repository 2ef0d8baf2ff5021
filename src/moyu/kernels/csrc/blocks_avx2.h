// Integer products of blocks in 256 bits: AVX2, and the same with VNNI's one instruction for two where there is one.
#pragma once

#include "blocks_vector.h"

namespace {

constexpr int kBeside = 2;  // blocks of Q4_0 that are multiplied at once

// acc + for each of 8 lanes the sum of 4 products of unsigned and signed bytes. Without VNNI pairs are summed in 16 bits first:
// 2 * 128 * 127 fits, 2 * 255 * 127 does not, and no caller has more than 128.
inline __m256i add_bytes(__m256i acc, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(acc, u, s);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}
// The same of two signed ones: the sign of `w` goes to `s`.
inline __m256i add_signed(__m256i acc, __m256i w, __m256i s) {
    return add_bytes(acc, _mm256_sign_epi8(w, w), _mm256_sign_epi8(s, w));
}

// out[c] = row c · x for C rows of Q8_0 in lockstep; with Ahead `then` is prefetched line by line. The loops over 8 blocks are
// unrolled because what depends on a block's number is then a constant.
template <int C, bool Ahead>
inline void dot_q8(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const int8_t *x,
                   const float *x_scale, const float *, int64_t blocks, float *out) {
    __m256 sum[C];
    for (int c = 0; c < C; ++c) sum[c] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b += 8) {
        const int count = blocks - b < 8 ? static_cast<int>(blocks - b) : 8;
        const __m256 xs = _mm256_loadu_ps(x_scale + b);
        alignas(32) float scale[C][8];
        for (int c = 0; c < C; ++c) {
            const __m256 s = count == 8 ? load_halves(scales[c] + 2 * b) : load_halves(scales[c] + 2 * b, count);
            _mm256_store_ps(scale[c], _mm256_mul_ps(s, xs));
        }
        const auto block = [&](int k) {
            const __m256i xq = load_bytes(x + 32 * (b + k));
            for (int c = 0; c < C; ++c) {
                if (Ahead && k % 2 == 0) prefetch<64>(then[c] + 32 * (b + k));
                const __m256i products = add_signed(_mm256_setzero_si256(), load_bytes(w[c] + 32 * (b + k)), xq);
                sum[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_broadcast_ss(scale[c] + k), sum[c]);
            }
        };
        if (count == 8) {
#pragma GCC unroll 8
            for (int k = 0; k < 8; ++k) block(k);
        } else {
            for (int k = 0; k < count; ++k) block(k);
        }
    }
    for (int c = 0; c < C && Ahead; ++c) prefetch<128>(then[c] + 32 * blocks);
    for (int c = 0; c < C; ++c) out[c] = sum_lanes(sum[c]);
}

// The same for Q4_0, kBeside blocks at a time; codes stand for code - 8, which `x_sums` makes up for.
template <int C, bool Ahead>
inline void dot_q4(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const int8_t *x,
                   const float *x_scale, const float *x_sums, int64_t blocks, float *out) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256 sum[C];
    for (int c = 0; c < C; ++c) sum[c] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b += 8) {
        const int count = blocks - b < 8 ? static_cast<int>(blocks - b) : 8;
        const __m256 xs = _mm256_loadu_ps(x_scale + b);
        const __m256 less = _mm256_mul_ps(_mm256_loadu_ps(x_sums + b), _mm256_set1_ps(-8.0f));
        __m256 scale[C];
        for (int c = 0; c < C; ++c) {
            const __m256 s = count == 8 ? load_halves(scales[c] + 2 * b) : load_halves(scales[c] + 2 * b, count);
            scale[c] = _mm256_mul_ps(s, xs);
            sum[c] = _mm256_fmadd_ps(s, less, sum[c]);
        }
        const auto pair = [&](int k, auto load) {
            const __m256i first = load_bytes(x + 32 * (b + k)), second = load_bytes(x + 32 * (b + k) + 32);
            const __m256i lanes = _mm256_setr_epi32(k, k, k, k, k + 1, k + 1, k + 1, k + 1);
            for (int c = 0; c < C; ++c) {
                if (Ahead && k % 4 == 0) prefetch<64>(then[c] + 16 * (b + k));
                const __m256i both = load(w[c] + 16 * (b + k));
                const __m256i front = _mm256_and_si256(both, low), back = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                __m256i products = _mm256_setzero_si256();
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
                products = add_bytes(add_bytes(products, front, first), back, second);
#else
                products = _mm256_add_epi16(_mm256_maddubs_epi16(front, first), _mm256_maddubs_epi16(back, second));
                products = _mm256_madd_epi16(products, _mm256_set1_epi16(1));
#endif
                sum[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_permutevar8x32_ps(scale[c], lanes), sum[c]);
            }
        };
        const auto whole = [](const uint8_t *p) { return load_bytes(p); };
        if (count == 8) {
#pragma GCC unroll 4
            for (int k = 0; k < 8; k += 2) pair(k, whole);
        } else {
            int k = 0;
            for (; k + 2 <= count; k += 2) pair(k, whole);
            if (k < count)
                pair(k, [](const uint8_t *p) {
                    return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
                });
        }
    }
    for (int c = 0; c < C && Ahead; ++c) prefetch<128>(then[c] + 16 * blocks);
    for (int c = 0; c < C; ++c) out[c] = sum_lanes(sum[c]);
}

// The lower and the upper lanes of two.
inline __m256i lower(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x20); }
inline __m256i upper(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x31); }

// y[0 .. 16) += integers * scales, for integers of 32 bits in two halves, and of 16 bits.
inline void add_scaled(__m256i front, __m256i back, const uint8_t *scales, float scale, float *y) {
    const auto half = [&](__m256i integers, int64_t o) {
        const __m256 by = _mm256_mul_ps(load_halves(scales + 2 * o), _mm256_set1_ps(scale));
        _mm256_storeu_ps(y + o, _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers), by, _mm256_loadu_ps(y + o)));
    };
    half(front, 0);
    half(back, 8);
}
inline void add_scaled(__m256i integers, const uint8_t *scales, float scale, float *y) {
    add_scaled(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(integers)),
               _mm256_cvtepi16_epi32(_mm256_extracti128_si256(integers, 1)), scales, scale, y);
}

// Columns of Q8_0. Sums are of 32 outputs: 0 .. 3 and 16 .. 19, 4 .. 7 and 20 .. 23, 8 .. 11 and 24 .. 27, the others.
struct SumsQ8 {
    using Reg = __m256i;
    static constexpr int offset = 0, lanes = 8, outputs = 1, step = 32;
    static constexpr auto at = at_q8;

    // sums[0 .. n) = (First) or += sum over some columns of v * column. Beyond the count v is 0 and `column` repeats one.
    template <bool First>
    static void add(const uint8_t *const *column, int count, const int8_t *v, int64_t from, int64_t n, int, Reg *sums,
                    const Following &ahead) {
        for (int64_t o = 0; o < n; o += 32, sums += 4) {
            __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
            if (!First) s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
            if (o % 64 == 0) ahead.at<64>(o);
            for (int i = 0; i < count; i += 4) {
                int32_t four;
                std::memcpy(&four, v + i, 4);
                const __m256i factor = _mm256_set1_epi32(four);
                const __m256i a = load_bytes(column[i] + from + o), b = load_bytes(column[i + 1] + from + o);
                const __m256i c = load_bytes(column[i + 2] + from + o), d = load_bytes(column[i + 3] + from + o);
                const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
                const __m256i ba = _mm256_unpackhi_epi8(a, b), dc = _mm256_unpackhi_epi8(c, d);
                s0 = add_signed(s0, _mm256_unpacklo_epi16(ab, cd), factor);
                s1 = add_signed(s1, _mm256_unpackhi_epi16(ab, cd), factor);
                s2 = add_signed(s2, _mm256_unpacklo_epi16(ba, dc), factor);
                s3 = add_signed(s3, _mm256_unpackhi_epi16(ba, dc), factor);
            }
            sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
        }
        ahead.at<128>(n);
    }

    static void scale(const Reg *s, const uint8_t *scales, float by, float *y) {
        add_scaled(lower(s[0], s[1]), lower(s[2], s[3]), scales, by, y);
        add_scaled(upper(s[0], s[1]), upper(s[2], s[3]), scales + 32, by, y + 16);
    }
};

// Columns of Q4_0, in 16 bits; sums are of 64 outputs: 0 .. 7 and 32 .. 39, 8 and 40, 16 and 48, 24 and 56. They begin at
// `less`, -8 * the sum of v. On the way they may wrap; in the end 32 * 127 * 8 fits.
struct SumsQ4 {
    using Reg = __m256i;
    static constexpr int offset = 8, lanes = 16, outputs = 2, step = 64;
    static constexpr auto at = at_q4;

    template <bool First>
    static void add(const uint8_t *const *column, int count, const int8_t *v, int64_t from, int64_t n, int less, Reg *sums,
                    const Following &ahead) {
        const __m256i low = _mm256_set1_epi8(15), begin = _mm256_set1_epi16(static_cast<int16_t>(less));
        for (int64_t o = 0; o < n; o += 64, sums += 4) {
            __m256i s0 = begin, s1 = begin, s2 = begin, s3 = begin;
            if (!First) s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
            if (o % 128 == 0) ahead.at<64>(o / 2);
            for (int i = 0; i < count; i += 2) {
                int16_t two;
                std::memcpy(&two, v + i, 2);
                const __m256i factor = _mm256_set1_epi16(two);
                const __m256i a = load_bytes(column[i] + (from + o) / 2), b = load_bytes(column[i + 1] + (from + o) / 2);
                const __m256i ab = _mm256_unpacklo_epi8(a, b), ba = _mm256_unpackhi_epi8(a, b);
                const auto products = [&](__m256i codes) { return _mm256_maddubs_epi16(_mm256_and_si256(codes, low), factor); };
                s0 = _mm256_add_epi16(s0, products(ab));
                s1 = _mm256_add_epi16(s1, products(ba));
                s2 = _mm256_add_epi16(s2, products(_mm256_srli_epi16(ab, 4)));
                s3 = _mm256_add_epi16(s3, products(_mm256_srli_epi16(ba, 4)));
            }
            sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
        }
        ahead.at<128>(n / 2);
    }

    static void scale(const Reg *s, const uint8_t *scales, float by, float *y) {
        add_scaled(lower(s[0], s[1]), scales, by, y);
        add_scaled(lower(s[2], s[3]), scales + 32, by, y + 16);
        add_scaled(upper(s[0], s[1]), scales + 64, by, y + 32);
        add_scaled(upper(s[2], s[3]), scales + 96, by, y + 48);
    }
};

}  // namespace
