// Integer products of groups in 256 bits: AVX2, and the same with VNNI's one instruction for two where there is one.
#pragma once

#include "isa/integers_vector.h"

namespace {

constexpr int kBeside = 2;  // groups of x.halves that lie side by side (see core/rounded.h)

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

}  // namespace
