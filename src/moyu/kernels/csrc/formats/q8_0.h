// Q8_0: x_i = scale * q_i, q_i in -127 .. 127, a byte each.
#pragma once

#include "formats/format.h"

namespace {

struct Q8_0 : Plainly<Q8_0> {
    static int64_t row_bytes(int64_t n) { return groups_of(n) * (kGroup + 2); }
    static int64_t column_bytes(int64_t q) { return q; }
    static int32_t at(const uint8_t *codes, int64_t i) { return static_cast<int8_t>(codes[i]); }

#if MOYU_INTEGERS == 512
    template <int C, bool Ahead>
    static void dot(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const Rounded &x,
                    int64_t groups, float *out) {
        const int8_t *q = x.ordered;
        const float *x_scale = x.scale, *x_sums = x.sums;
        dot_lines<C, Ahead, 2, 128>(w, scales, then, x_scale, x_sums, groups, out, [&](__m512i line, int64_t b) {
            return _mm512_dpbusd_epi32(_mm512_setzero_si512(), lifted(line), _mm512_loadu_si512(q + 32 * b));
        });
    }

    // Sums are of 64 outputs: the first four of every 16, then the second, third and fourth four.
    struct Sums {
        using Reg = __m512i;
        static constexpr int offset = 128, lanes = 16, outputs = 1, step = 64;

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

    static void add_columns(const Columns &columns, float *y, int64_t q) { sum_columns<Q8_0, Sums>(columns, y, q); }
#elif MOYU_INTEGERS == 256
    // The loops over 8 groups are unrolled because what depends on a group's number is then a constant.
    template <int C, bool Ahead>
    static void dot(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const Rounded &x,
                    int64_t groups, float *out) {
        const int8_t *q = x.ordered;
        const float *x_scale = x.scale;
        __m256 sum[C];
        for (int c = 0; c < C; ++c) sum[c] = _mm256_setzero_ps();
        for (int64_t b = 0; b < groups; b += 8) {
            const int count = groups - b < 8 ? static_cast<int>(groups - b) : 8;
            const __m256 xs = _mm256_loadu_ps(x_scale + b);
            alignas(32) float scale[C][8];
            for (int c = 0; c < C; ++c) {
                const __m256 s = count == 8 ? load_halves(scales[c] + 2 * b) : load_halves(scales[c] + 2 * b, count);
                _mm256_store_ps(scale[c], _mm256_mul_ps(s, xs));
            }
            const auto group = [&](int k) {
                const __m256i xq = load_bytes(q + 32 * (b + k));
                for (int c = 0; c < C; ++c) {
                    if (Ahead && k % 2 == 0) prefetch<64>(then[c] + 32 * (b + k));
                    const __m256i products = add_signed(_mm256_setzero_si256(), load_bytes(w[c] + 32 * (b + k)), xq);
                    sum[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_broadcast_ss(scale[c] + k), sum[c]);
                }
            };
            if (count == 8) {
#pragma GCC unroll 8
                for (int k = 0; k < 8; ++k) group(k);
            } else {
                for (int k = 0; k < count; ++k) group(k);
            }
        }
        for (int c = 0; c < C && Ahead; ++c) prefetch<128>(then[c] + 32 * groups);
        for (int c = 0; c < C; ++c) out[c] = sum_lanes(sum[c]);
    }

    // Sums are of 32 outputs: 0 .. 3 and 16 .. 19, 4 .. 7 and 20 .. 23, 8 .. 11 and 24 .. 27, the others.
    struct Sums {
        using Reg = __m256i;
        static constexpr int offset = 0, lanes = 8, outputs = 1, step = 32;

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

    static void add_columns(const Columns &columns, float *y, int64_t q) { sum_columns<Q8_0, Sums>(columns, y, q); }
#endif
};

}  // namespace
