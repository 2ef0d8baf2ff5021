// What a weight format is to the kernels. formats.def lists them; each has a header with a struct F of static members:
//
//   row_bytes(n)        bytes that a row of n inputs takes, scales included
//   column_bytes(q)     bytes of the codes that a column of q outputs takes; its scales belong to 32 columns
//   at(codes, i)        the integer of input i of a row, or of output i of a column
//   dot<C, Ahead>(...)  C rows times a row of x
//   add_columns(...)    columns of a group, times what x has for them
//   widen(...)          a row in float
//
// A format whose groups have 32 weights and one fp16 scale gets the last three from Plainly<F>, in plain loops over `at`,
// and may put vector code in their place.
#pragma once

#include "core/rounded.h"

namespace {

template <class F>
struct Plainly {
    // out[c] = row w[c] · x; with Ahead the lines `then` are prefetched. groups: of a row.
    template <int C, bool Ahead>
    static void dot(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *, const Rounded &x,
                    int64_t groups, float *out) {
        for (int c = 0; c < C; ++c) {
            out[c] = 0.0f;
            for (int64_t b = 0; b < groups; ++b) {
                int32_t total = 0;
                for (int64_t i = kGroup * b; i < kGroup * (b + 1); ++i) total += F::at(w[c], i) * x.ordered[i];
                out[c] += static_cast<float>(total) * (half_at(scales[c], b) * x.scale[b]);
            }
        }
    }
    // y (q,) += what Columns says.
    static void add_columns(const Columns &columns, float *y, int64_t q) { add_outputs<F>(columns, y, 0, q); }
    // to[0 .. n) = a row.
    static void widen(const uint8_t *codes, const uint8_t *scales, int64_t n, float *to) {
        for (int64_t i = 0; i < n; ++i) to[i] = half_at(scales, i / kGroup) * static_cast<float>(F::at(codes, i));
    }
};

}  // namespace
