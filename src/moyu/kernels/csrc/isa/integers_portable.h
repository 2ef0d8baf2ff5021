// Rounding to groups in plain loops.
#pragma once

#include "isa/integers_common.h"

namespace {

constexpr int kBeside = 2;  // groups of x.halves that lie side by side (see core/rounded.h)

// 32 values as 8 bits and a scale, half to even; returns the sum of the integers, and in `first` that of the first 16. What is
// not finite gives no number. Sizes are compared as integers, and the addition leaves the integer in the low byte: loops that become vector code.
inline int32_t quantise_group(const float *x, int8_t *q, float *scale, int32_t *first) {
    int32_t most = 0, sum = 0;
    for (int i = 0; i < kGroup; ++i) {
        const int32_t size = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffffu);
        most = size > most ? size : most;
    }
    const float widest = from_bits(static_cast<uint32_t>(most)), inverse = most != 0 ? 127.0f / widest : 0.0f;
    *scale = widest / 127.0f;
    int32_t whole[kGroup];
    for (int i = 0; i < kGroup; ++i) whole[i] = static_cast<int32_t>(to_bits(x[i] * inverse + 12582912.0f) - 0x4b400000u);
    for (int i = 0; i < 16; ++i) sum += whole[i];
    *first = sum;
    for (int i = 16; i < kGroup; ++i) sum += whole[i];
    for (int i = 0; i < kGroup; ++i) q[i] = static_cast<int8_t>(whole[i]);
    return sum;
}

}  // namespace
