// Q4_0: x_i = scale * (q_i - 8), q_i in 0 .. 15. Byte b of a group holds q_b (low four bits) and q_(b + 16).
#pragma once

#include "formats/format.h"

namespace {

struct Q4_0 : Plainly<Q4_0> {
    static int64_t row_bytes(int64_t n) { return groups_of(n) * (kGroup / 2 + 2); }
    static int64_t column_bytes(int64_t q) { return groups_of(q) * (kGroup / 2); }
    static int32_t at(const uint8_t *codes, int64_t i) { return (codes[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4) & 15) - 8; }

#if MOYU_INTEGERS == 512
    template <int C, bool Ahead>
    static void dot(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const Rounded &x,
                    int64_t groups, float *out) {
        const int8_t *q = x.halves;
        const float *x_scale = x.scale, *x_sums = x.sums;
        const __m512i low = _mm512_set1_epi8(15);
        dot_lines<C, Ahead, 4, 8>(w, scales, then, x_scale, x_sums, groups, out, [&](__m512i line, int64_t b) {
            const __m512i front = _mm512_and_si512(line, low), back = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
            const __m512i first = _mm512_dpbusd_epi32(_mm512_setzero_si512(), front, _mm512_loadu_si512(q + 32 * b));
            return _mm512_dpbusd_epi32(first, back, _mm512_loadu_si512(q + 32 * b + 64));
        });
    }

    // Sums are in 16 bits and of 128 outputs: the first eight of every 32, then the second, third and fourth eight.
    // They begin at `less`, -8 * the sum of v. On the way they may wrap; in the end 32 * 127 * 8 fits.
    struct Sums {
        using Reg = __m512i;
        static constexpr int offset = 8, lanes = 32, outputs = 2, step = 128;

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

    static void add_columns(const Columns &columns, float *y, int64_t q) { sum_columns<Q4_0, Sums>(columns, y, q); }
#elif MOYU_INTEGERS == 256
    // kBeside groups at a time; codes stand for code - 8, which the sums of x make up for.
    template <int C, bool Ahead>
    static void dot(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const Rounded &x,
                    int64_t groups, float *out) {
        const int8_t *q = x.halves;
        const float *x_scale = x.scale, *x_sums = x.sums;
        const __m256i low = _mm256_set1_epi8(15);
        __m256 sum[C];
        for (int c = 0; c < C; ++c) sum[c] = _mm256_setzero_ps();
        for (int64_t b = 0; b < groups; b += 8) {
            const int count = groups - b < 8 ? static_cast<int>(groups - b) : 8;
            const __m256 xs = _mm256_loadu_ps(x_scale + b);
            const __m256 less = _mm256_mul_ps(_mm256_loadu_ps(x_sums + b), _mm256_set1_ps(-8.0f));
            __m256 scale[C];
            for (int c = 0; c < C; ++c) {
                const __m256 s = count == 8 ? load_halves(scales[c] + 2 * b) : load_halves(scales[c] + 2 * b, count);
                scale[c] = _mm256_mul_ps(s, xs);
                sum[c] = _mm256_fmadd_ps(s, less, sum[c]);
            }
            const auto pair = [&](int k, auto load) {
                const __m256i first = load_bytes(q + 32 * (b + k)), second = load_bytes(q + 32 * (b + k) + 32);
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
        for (int c = 0; c < C && Ahead; ++c) prefetch<128>(then[c] + 16 * groups);
        for (int c = 0; c < C; ++c) out[c] = sum_lanes(sum[c]);
    }

    // Sums are in 16 bits and of 64 outputs: 0 .. 7 and 32 .. 39, 8 and 40, 16 and 48, 24 and 56. They begin at
    // `less`, -8 * the sum of v. On the way they may wrap; in the end 32 * 127 * 8 fits.
    struct Sums {
        using Reg = __m256i;
        static constexpr int offset = 8, lanes = 16, outputs = 2, step = 64;

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

    static void add_columns(const Columns &columns, float *y, int64_t q) { sum_columns<Q4_0, Sums>(columns, y, q); }
#else
    template <int C, bool>
    static void dot(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *, const Rounded &x,
                    int64_t groups, float *out) {
        for (int c = 0; c < C; ++c) {
            out[c] = 0.0f;
            for (int64_t b = 0; b < groups; ++b) {
                const int8_t *q = x.halves + b / 2 * 64 + b % 2 * 16;
                const uint8_t *codes = w[c] + 16 * b;
                int32_t total = 0;
                for (int i = 0; i < 16; ++i) total += ((codes[i] & 15) - 8) * q[i] + ((codes[i] >> 4) - 8) * q[32 + i];
                out[c] += static_cast<float>(total) * (half_at(scales[c], b) * x.scale[b]);
            }
        }
    }
#endif
};

}  // namespace
