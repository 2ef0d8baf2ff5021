// Activations of a few values at once, in loops that compilers turn into vector code.
#pragma once

#include <math.h>

#include "core/element.h"
#include "core/kernels.h"

namespace {

using moyu::Act;

// Forced inline: what remains a call keeps its loop from becoming vector code.
#if defined(__GNUC__) || defined(__clang__)
#define MOYU_INLINE __attribute__((always_inline)) inline
#else
#define MOYU_INLINE inline
#endif

// e^x within 2 ulp; 1e-38 below -87.3, infinity above 88.4, and NaN goes through. The C library's is a call for each value.
MOYU_INLINE float exponential(float x) {
    x = x < -87.3f ? -87.3f : x;  // two comparisons that are always made: one inside the other would not become vector code
    x = x > 88.8f ? 88.8f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // the integer part of x / ln 2 in the low bits
    const float whole = shifted - 12582912.0f;
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts, the first exact in whole * it
    const float tail = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                        1.6666665459e-1f) * r + 5.0000001201e-1f;
    return (tail * r * r + r + 1.0f) * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

MOYU_INLINE float logistic_product(float z, float s) { return z / (1.0f + exponential(-s)); }

// z[0 .. n) in place; the C functions and not std:: ones, which are inline functions (see kernels.h).
MOYU_INLINE void activate(Act act, float *z, int64_t n) {
    switch (act) {
        case Act::relu:
            for (int64_t i = 0; i < n; ++i) z[i] = z[i] < 0.0f ? 0.0f : z[i];
            return;
        case Act::relu2:
            for (int64_t i = 0; i < n; ++i) z[i] = z[i] < 0.0f ? 0.0f : z[i] * z[i];
            return;
        case Act::silu:
            for (int64_t i = 0; i < n; ++i) z[i] = logistic_product(z[i], z[i]);
            return;
        case Act::gelu:
            for (int64_t i = 0; i < n; ++i) z[i] = 0.5f * z[i] * (1.0f + erff(z[i] * 0.70710678118654752f));
            return;
        case Act::gelu_tanh:  // (1 + tanh(y)) / 2 = 1 / (1 + e^(-2y))
            for (int64_t i = 0; i < n; ++i)
                z[i] = logistic_product(z[i], 1.59576912160573071f * (z[i] + 0.044715f * z[i] * z[i] * z[i]));
            return;
        case Act::quick_gelu:
            for (int64_t i = 0; i < n; ++i) z[i] = logistic_product(z[i], 1.702f * z[i]);
            return;
        case Act::identity: return;
    }
}

// The same for a number of values that the compiler knows: in one register, without loops.
template <int n>
inline void activate(Act act, float *z) {
    activate(act, z, n);
}

}  // namespace
