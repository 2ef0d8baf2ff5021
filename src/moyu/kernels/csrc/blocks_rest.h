// Columns of blocks output by output: their ends, and all of them where there is no vector code.
#pragma once

#include "element.h"

namespace {

constexpr int kBlock = 32;

// The integer that output `o` of a column has.
inline int32_t at_q8(const uint8_t *column, int64_t o) { return static_cast<int8_t>(column[o]); }
inline int32_t at_q4(const uint8_t *column, int64_t o) { return (column[o / 32 * 16 + o % 16] >> (o % 32 / 16 * 4) & 15) - 8; }

inline float half_at(const uint8_t *p, int64_t i) {
    return widen(F16{static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8)});
}

// y[o] += scale * scales[o] * sum over columns of v * value(column, o), o in from .. q.
template <class F>
inline void sum_rest(const uint8_t *const *column, int count, const int8_t *v, float scale, const uint8_t *scales, float *y,
                     int64_t from, int64_t q, F value) {
    for (int64_t o = from; o < q; ++o) {
        int32_t total = 0;
        for (int i = 0; i < count; ++i) total += v[i] * value(column[i], o);
        y[o] += static_cast<float>(total) * (half_at(scales, o) * scale);
    }
}

}  // namespace
