// What the integer products of groups share on every instruction set. A group is 32 weights with one fp16 scale.
#pragma once

#include "core/pieces.h"

namespace {

constexpr int kGroup = 32;

inline float half_at(const uint8_t *p, int64_t i) {
    return widen(F16{static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8)});
}

// Some columns of a group. What add_columns of a format makes of them: y[o] += scale * scales[o] * sum over columns of v * code(column, o).
struct Columns {
    const uint8_t *column[kGroup];  // beyond the count one of them is repeated, and v is 0
    int count;
    const int8_t *v;
    float scale;
    const uint8_t *scales;          // fp16, one for each output
    const uint8_t *const *then;     // what is read next: up to 8 lines,
    int after;                      // so many of them; below 0 = nothing is prefetched
};

// Output by output from `from` on: the end of a column that vectors do not fill, or all of it where there are none.
template <class F>
inline void add_outputs(const Columns &c, float *y, int64_t from, int64_t q) {
    for (int64_t o = from; o < q; ++o) {
        int32_t total = 0;
        for (int i = 0; i < c.count; ++i) total += c.v[i] * F::at(c.column[i], o);
        y[o] += static_cast<float>(total) * (half_at(c.scales, o) * c.scale);
    }
}

}  // namespace
