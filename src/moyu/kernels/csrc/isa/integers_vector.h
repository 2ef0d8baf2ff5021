// What the integer products of groups share in 256 and in 512 bits: loads, rounding to groups, and the way through columns.
#pragma once

#include <immintrin.h>

#include "isa/integers_common.h"

namespace {

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
inline int32_t quantise_group(const float *x, int8_t *q, float *scale) {
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

// add_columns of a format F. Sums: codes stand for code - offset, a register has `lanes` integers, a byte of a column
// `outputs`; `add` and `scale` take `step` outputs at a time.
template <class F, class Sums>
inline void sum_columns(const Columns &c, float *y, int64_t q) {
    typename Sums::Reg sums[kTile / Sums::lanes];
    int less = 0;
    for (int i = 0; i < c.count; ++i) less -= Sums::offset * c.v[i];
    const int64_t whole = q / Sums::step * Sums::step;
    for (int64_t from = 0; from < whole; from += kTile) {
        const int64_t n = whole - from < kTile ? whole - from : kTile;
        for (int i = 0, some; i < c.count; i += some) {
            some = side_by_side(c.count - i);
            const Following ahead(c.column, i + some, c.count, from / Sums::outputs, (from + n) / Sums::outputs,
                                  from + n == whole, c.then, c.after);
            if (i == 0) Sums::template add<true>(c.column, some, c.v, from, n, less, sums, ahead);
            else Sums::template add<false>(c.column + i, some, c.v + i, from, n, less, sums, ahead);
        }
        for (int64_t o = 0; o < n; o += Sums::step)
            Sums::scale(sums + o / Sums::lanes, c.scales + 2 * (from + o), c.scale, y + from + o);
    }
    add_outputs<F>(c, y, whole, q);
}

}  // namespace
