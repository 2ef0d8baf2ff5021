// Integer products of blocks in 256 bits: AVX2, and the same with VNNI's one instruction for two where there is one.
#pragma once

#include <immintrin.h>

#include "blocks_rest.h"

namespace {

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

inline __m256i load_bytes(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline __m256 load_halves(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline __m256 load_halves(const uint8_t *p, int count) {  // 8 of them, 0 beyond the count
    uint8_t all[16] = {};
    for (int i = 0; i < 2 * count; ++i) all[i] = p[i];
    return load_halves(all);
}

inline float sum_lanes(__m256 a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// 32 values as 8 bits and a scale, half to even; returns the sum of the integers. What is not finite gives no number.
inline int32_t quantise_block(const float *x, int8_t *q, float *scale) {
    const __m256 a = _mm256_loadu_ps(x), b = _mm256_loadu_ps(x + 8), c = _mm256_loadu_ps(x + 16), d = _mm256_loadu_ps(x + 24);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 most = _mm256_max_ps(_mm256_max_ps(_mm256_andnot_ps(sign, a), _mm256_andnot_ps(sign, b)),
                                      _mm256_max_ps(_mm256_andnot_ps(sign, c), _mm256_andnot_ps(sign, d)));
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    const float widest = _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
    *scale = widest / 127.0f;
    const __m256 inverse = _mm256_set1_ps(widest != 0.0f ? 127.0f / widest : 0.0f);
    const auto whole = [&](__m256 values) { return _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse)); };
    const __m256i low = _mm256_packs_epi32(whole(a), whole(b)), high = _mm256_packs_epi32(whole(c), whole(d));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(q), bytes);
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), ones);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 1)));
}

// out[c] = row c · x for C rows of Q8_0 in lockstep; with Ahead `then` is prefetched line by line. The loops over 8 blocks are
// unrolled because what depends on a block's number is then a constant.
template <int C, bool Ahead>
inline void dot_q8(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const int8_t *x,
                   const float *x_scale, int64_t blocks, float *out) {
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

// The same for Q4_0, two blocks at a time; codes stand for code - 8, which `x_sums` makes up for.
template <int C, bool Ahead>
inline void dot_q4(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const int8_t *x,
                   const float *x_scale, const float *x_sums, int64_t blocks, float *out) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256 sum[C];
    for (int c = 0; c < C; ++c) sum[c] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b += 8) {
        const int count = blocks - b < 8 ? static_cast<int>(blocks - b) : 8;
        const __m256 xs = _mm256_loadu_ps(x_scale + b), less = _mm256_loadu_ps(x_sums + b);
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

// Of a group's columns few are read side by side, each over a whole tile of outputs before the next ones begin: 32 streams of
// half lines cost a fifth to a quarter of the rate at which memory gives them. A tile's integers lie in L1 meanwhile.
constexpr int64_t kTile = 2048;
inline int side_by_side(int left) { return left <= 12 ? left : 8; }

// What is prefetched while some columns are read: the columns after them in this tile, or the first ones' next tile, or,
// after the last, `then`.
struct Following {
    const uint8_t *line[8];
    int count = 0;
    Following(const uint8_t *const *column, int end, int columns, int64_t tile, int64_t next_tile, bool last,
              const uint8_t *const *then, int after) {
        if (after < 0) return;
        if (end < columns) {
            for (int i = end; i < columns && count < 8; ++i) line[count++] = column[i] + tile;
        } else if (!last) {
            for (int i = 0; i < columns && count < 8; ++i) line[count++] = column[i] + next_tile;
        } else {
            for (; count < after; ++count) line[count] = then[count];
        }
    }
    template <int64_t bytes>
    void at(int64_t offset) const {
        for (int i = 0; i < count; ++i) prefetch<bytes>(line[i] + offset);
    }
};

// The lower and the upper lanes of two.
inline __m256i lower(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x20); }
inline __m256i upper(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x31); }

// y[0 .. 16) += integers * scales, for integers of 32 bits in two halves, and of 16 bits.
#if defined(__AVX512F__)
inline void add_scaled(__m512i integers, const uint8_t *scales, float scale, float *y) {
    const __m512 by = _mm512_mul_ps(_mm512_cvtph_ps(load_bytes(scales)), _mm512_set1_ps(scale));
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers), by, _mm512_loadu_ps(y)));
}
inline void add_scaled(__m256i front, __m256i back, const uint8_t *scales, float scale, float *y) {
    add_scaled(_mm512_inserti64x4(_mm512_castsi256_si512(front), back, 1), scales, scale, y);
}
inline void add_scaled(__m256i integers, const uint8_t *scales, float scale, float *y) {
    add_scaled(_mm512_cvtepi16_epi32(integers), scales, scale, y);
}
#else
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
#endif

// sums[0 .. n) = (First) or += sum over some columns of v * column, 32 outputs at a time: 0 .. 3 and 16 .. 19, 4 .. 7 and
// 20 .. 23, 8 .. 11 and 24 .. 27, the others. Beyond the count v is 0 and `column` repeats one.
template <bool First>
inline void add_q8(const uint8_t *const *column, int count, const int8_t *v, int64_t from, int64_t n, __m256i *sums,
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

// y += scale * scales * (sum over columns of v * column). `then` are up to 8 lines that are read next; `after` of them, or
// below 0 where nothing is to be prefetched.
inline void sum_q8(const uint8_t *const *column, int count, const int8_t *v, float scale, const uint8_t *scales, float *y,
                   int64_t q, const uint8_t *const *then, int after) {
    __m256i sums[kTile / 8];
    const int64_t whole = q / 32 * 32;
    for (int64_t from = 0; from < whole; from += kTile) {
        const int64_t n = whole - from < kTile ? whole - from : kTile;
        for (int c = 0, some; c < count; c += some) {
            some = side_by_side(count - c);
            const Following ahead(column, c + some, count, from, from + n, from + n == whole, then, after);
            if (c == 0) add_q8<true>(column, some, v, from, n, sums, ahead);
            else add_q8<false>(column + c, some, v + c, from, n, sums, ahead);
        }
        for (int64_t o = 0; o < n; o += 32) {
            const __m256i *s = sums + o / 8;
            const uint8_t *own = scales + 2 * (from + o);
            float *to = y + from + o;
            add_scaled(lower(s[0], s[1]), lower(s[2], s[3]), own, scale, to);
            add_scaled(upper(s[0], s[1]), upper(s[2], s[3]), own + 32, scale, to + 16);
        }
    }
    sum_rest(column, count, v, scale, scales, y, whole, q, at_q8);
}

// The same of 4-bit columns, in 16 bits, 64 outputs at a time: 0 .. 7 and 32 .. 39, 8 and 40, 16 and 48, 24 and 56. Codes
// stand for code - 8: the sums begin at `less`, -8 * the sum of v. On the way they may wrap; in the end 32 * 127 * 8 fits.
template <bool First>
inline void add_q4(const uint8_t *const *column, int count, const int8_t *v, int64_t from, int64_t n, int less,
                   __m256i *sums, const Following &ahead) {
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

inline void sum_q4(const uint8_t *const *column, int count, const int8_t *v, float scale, const uint8_t *scales, float *y,
                   int64_t q, const uint8_t *const *then, int after) {
    __m256i sums[kTile / 16];
    int less = 0;
    for (int i = 0; i < count; ++i) less -= 8 * v[i];
    const int64_t whole = q / 64 * 64;
    for (int64_t from = 0; from < whole; from += kTile) {
        const int64_t n = whole - from < kTile ? whole - from : kTile;
        for (int c = 0, some; c < count; c += some) {
            some = side_by_side(count - c);
            const Following ahead(column, c + some, count, from / 2, (from + n) / 2, from + n == whole, then, after);
            if (c == 0) add_q4<true>(column, some, v, from, n, less, sums, ahead);
            else add_q4<false>(column + c, some, v + c, from, n, less, sums, ahead);
        }
        for (int64_t o = 0; o < n; o += 64) {
            const __m256i *s = sums + o / 16;
            const uint8_t *own = scales + 2 * (from + o);
            float *to = y + from + o;
            add_scaled(lower(s[0], s[1]), own, scale, to);
            add_scaled(lower(s[2], s[3]), own + 32, scale, to + 16);
            add_scaled(upper(s[0], s[1]), own + 64, scale, to + 32);
            add_scaled(upper(s[2], s[3]), own + 96, scale, to + 48);
        }
    }
    sum_rest(column, count, v, scale, scales, y, whole, q, at_q4);
}

}  // namespace
