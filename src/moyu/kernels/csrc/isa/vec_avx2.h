// 8 floats in one AVX register; FMA and F16C come with every CPU that has AVX2.
#pragma once

#include <immintrin.h>

#include "core/element.h"

namespace {

struct Vec {
#ifdef __AVXVNNI__
    static constexpr const char *isa = "avxvnni";
#else
    static constexpr const char *isa = "avx2";
#endif
    static constexpr int width = 8;
    using Reg = __m256;

    static Reg zero() { return _mm256_setzero_ps(); }
    static Reg set(float value) { return _mm256_set1_ps(value); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
    static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
    static float sum(Reg a) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }

    static Reg load(const float *p) { return _mm256_loadu_ps(p); }

    // 2 * width elements in two registers; for bf16 the even and the odd ones, as in vec_avx512.h.
    struct Pair { Reg a, b; };
    template <class T>
    static constexpr bool split = is_bf16<T>;

    static Pair load2(const float *p) { return {load(p), load(p + width)}; }
    static Pair load2(const BF16 *p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    static Pair load2(const F16 *p) {
        const __m128i *q = reinterpret_cast<const __m128i *>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
    }
    // The first `count` < 2 * width elements, the others 0; touches no memory beyond them.
    template <class T>
    static Pair load2_part(const T *p, int count) {
        T all[2 * width] = {};
        for (int i = 0; i < count; ++i) all[i] = p[i];
        return load2(all);
    }
    static void store(float *p, Reg a) { _mm256_storeu_ps(p, a); }
};

}  // namespace
