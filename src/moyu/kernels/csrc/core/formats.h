// From a weight's format, known at run time, to the struct of that format.
#pragma once

#include "format_headers.h"  // made by CMakeLists.txt: the headers of formats/formats.def

namespace {

using moyu::Format;

// f(F{}) for the struct F of a format with groups.
template <class Fn>
inline decltype(auto) with_format(Format format, Fn f) {
    switch (format) {
#define X(name, Struct) case Format::name: return f(Struct{});
#include "formats/formats.def"
#undef X
        case Format::plain: break;
    }
    moyu::fail("a weight whose format has no groups came to the loops for groups");
}

MOYU_ONCE int64_t row_bytes(Format format, int64_t n) {
    return with_format(format, [&](auto f) { return decltype(f)::row_bytes(n); });
}
MOYU_ONCE int64_t column_bytes(Format format, int64_t q) {
    return with_format(format, [&](auto f) { return decltype(f)::column_bytes(q); });
}
// Of a weight by columns: bytes of the scales that a group of 32 columns shares.
MOYU_ONCE int64_t scale_bytes(const Weight &w) {
    return with_format(w.format, [&](auto f) { return decltype(f)::scale_bytes(w.outputs); });
}
// By rows those of row i, by columns those of block i.
inline const uint8_t *scales_of(const Weight &w, int64_t i) { return at<uint8_t>(w.scales, i * w.scales_stride); }

// The scales of group `number` of columns into the cache.
MOYU_ONCE void prefetch_scales(const Weight &w, int64_t number) {
    with_format(w.format, [&](auto f) {
        using S = typename decltype(f)::Scales;
        const auto fields = S::of_columns(scales_of(w, number / S::span), number % S::span * S::halves, w.outputs);
        S::each(fields, w.outputs, [](const uint8_t *from, int64_t bytes) {
            for (int64_t b = 0; b < bytes; b += kLineBytes) prefetch<kLineBytes>(from + b);
        });
    });
}

// to[0 .. inputs) = row i of a weight that lies by rows; `first`: what its first bits alone stand for.
MOYU_ONCE void widen_row(const Weight &w, int64_t i, bool first, float *to) {
    with_format(w.format, [&](auto f) { decltype(f)::widen(piece_of(w, i), scales_of(w, i), w.inputs, first, to); });
}

}  // namespace
