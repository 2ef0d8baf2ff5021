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

// 32 values as 8 bits and a scale, half to even; returns the sum of the integers, and in `first` that of the first 16. What is
// not finite gives no number.
inline int32_t quantise_group(const float *x, int8_t *q, float *scale, int32_t *first) {
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
    const auto sum = [](__m128i four) {
        const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
    };
    *first = sum(_mm256_castsi256_si128(fours));
    return *first + sum(_mm256_extracti128_si256(fours, 1));
}

inline __m256 load_eight(const float *p) { return _mm256_loadu_ps(p); }
// to(part) gets the four values of a part: a[part], b[part], c[part], d[part].
template <class Fn>
inline void transpose_scales(__m256 a, __m256 b, __m256 c, __m256 d, Fn to) {
    const __m256 s = _mm256_unpacklo_ps(a, b), t = _mm256_unpackhi_ps(a, b), u = _mm256_unpacklo_ps(c, d), v = _mm256_unpackhi_ps(c, d);
    const __m256 parts[4] = {_mm256_shuffle_ps(s, u, 0x44), _mm256_shuffle_ps(s, u, 0xee), _mm256_shuffle_ps(t, v, 0x44), _mm256_shuffle_ps(t, v, 0xee)};
    for (int i = 0; i < 4; ++i) {
        _mm_storeu_ps(to(i), _mm256_castps256_ps128(parts[i]));
        _mm_storeu_ps(to(4 + i), _mm256_extractf128_ps(parts[i], 1));
    }
}
inline __m256 twice_each(__m256 a, int half) {  // its first or its second four, each two times
    const __m256i which = half == 0 ? _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3) : _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
    return _mm256_permutevar8x32_ps(a, which);
}

// 8 floats of what scales are made of.
struct Eight {
    using Reg = __m256;
    static Reg set(float value) { return _mm256_set1_ps(value); }
    static Reg times(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
    static Reg halves(const uint8_t *p) { return load_halves(p); }
    static __m256i whole(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))); }
    static Reg bytes(const uint8_t *p) { return _mm256_cvtepi32_ps(whole(p)); }
    static Reg signed_bytes(const uint8_t *p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
    }
    static Reg low_nibbles(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_and_si256(whole(p), _mm256_set1_epi32(15))); }
    static Reg high_nibbles(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(whole(p), 4)); }
    static Reg powers(const uint8_t *p) {  // 2^(byte - 128); below 2 they are subnormal
        const __m256i power = whole(p), usual = _mm256_slli_epi32(_mm256_sub_epi32(power, _mm256_set1_epi32(1)), 23);
        const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), power);
        return _mm256_castsi256_ps(_mm256_blendv_epi8(small, usual, _mm256_cmpgt_epi32(power, _mm256_set1_epi32(1))));
    }
};
inline __m256 first_lanes(int count) {  // all bits of so many
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}

}  // namespace
