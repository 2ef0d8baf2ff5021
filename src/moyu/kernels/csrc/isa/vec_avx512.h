// 16 floats in one AVX-512 register; with AVX512-BF16, products of bf16 as it is stored.
#pragma once

#include <immintrin.h>

#include "core/element.h"

namespace {

struct Vec {
#if defined(__AVX512BF16__)
    static constexpr const char *isa = "avx512bf16";
#elif defined(__AVX512VNNI__)
    static constexpr const char *isa = "avx512vnni";
#else
    static constexpr const char *isa = "avx512";
#endif
    static constexpr int width = 16;
    using Reg = __m512;

    static Reg zero() { return _mm512_setzero_ps(); }
    static Reg set(float value) { return _mm512_set1_ps(value); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
    static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
    static float sum(Reg a) { return _mm512_reduce_add_ps(a); }

    static Reg load(const float *p) { return _mm512_loadu_ps(p); }

    // 2 * width elements in two registers. For bf16 the first holds the even and the second the odd ones: one load, a
    // shift and a mask instead of two loads, two lane-crossing widenings and two shifts. x and the sums are kept in the
    // same order (see `place`), so nobody else notices.
    struct Pair { Reg a, b; };
    template <class T>
    static constexpr bool split = is_bf16<T>;

    static Pair halves(__m512i bits) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    static Pair halves(__m256i low, __m256i high) { return {_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)}; }

    static Pair load2(const float *p) { return {load(p), load(p + width)}; }
    static Pair load2(const BF16 *p) { return halves(_mm512_loadu_si512(p)); }
    static Pair load2(const F16 *p) {
        const __m256i *q = reinterpret_cast<const __m256i *>(p);
        return halves(_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1));
    }
    // The first `count` < 2 * width elements, the others 0; touches no memory beyond them.
    static __mmask32 lanes(int count) { return (1u << count) - 1u; }
    static Pair load2_part(const float *p, int count) {
        const __mmask32 mask = lanes(count);
        return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p),
                _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + width)};
    }
    static Pair load2_part(const BF16 *p, int count) { return halves(_mm512_maskz_loadu_epi16(lanes(count), p)); }
    static Pair load2_part(const F16 *p, int count) {
        const __m512i bits = _mm512_maskz_loadu_epi16(lanes(count), p);
        return halves(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
    }
    static void store(float *p, Reg a) { _mm512_storeu_ps(p, a); }
};

template <>
inline int64_t list_set<Vec>(const uint8_t *mask, int64_t n, int32_t *kept) {
    int64_t count = 0, i = 0;
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + Vec::width <= n; i += Vec::width) {  // writes at most up to kept[i + width)
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(mask + i));
        const __mmask16 set = _mm_test_epi8_mask(bytes, bytes);
        _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(set, at));
        count += __builtin_popcount(set);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(Vec::width));
    }
    for (; i < n; ++i)
        if (mask[i] != 0) kept[count++] = static_cast<int32_t>(i);
    return count;
}

#ifdef __AVX512BF16__
// One instruction a line of weights instead of a shift, a mask and two FMAs: the core's window then holds more lines that
// wait for memory. Sums are fp32 as elsewhere, but subnormal bf16 counts as 0.
template <>
constexpr bool stored_products<BF16> = true;

inline __m512i load_factor(const BF16 *x) { return _mm512_loadu_si512(x); }
inline __m512i load_weights(const BF16 *w) { return _mm512_loadu_si512(w); }
inline __m512i load_weights_part(const BF16 *w, int count) { return _mm512_maskz_loadu_epi16(Vec::lanes(count), w); }
inline void add_products(Vec::Reg &sum, __m512i w, __m512i x) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}
#endif

}  // namespace
