// What the integer products of groups share on every instruction set. A group is 32 weights.
#pragma once

#include "core/pieces.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int kGroup = 32;

inline float half_at(const uint8_t *p, int64_t i) {
    const uint16_t bits = static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    return widen(F16{bits});
#endif
}

// Some columns of a group. What add_columns of a format makes of them:
// y[o] += by * sum over columns of v * (scale[o] * level(column, o) + offset[o]).
struct Columns {
    const uint8_t *column[kGroup];  // beyond the count one of them is repeated, and v is 0
    int8_t v[kGroup];
    int count, first;               // first: how many are of the group's first half
    float by;
    const uint8_t *scales;          // of the block of groups
    int64_t place;                  // of the group in its block
    const uint8_t *const *then;     // what is read next: up to 8 lines,
    int after;                      // so many of them; below 0 = nothing is prefetched
};

}  // namespace
