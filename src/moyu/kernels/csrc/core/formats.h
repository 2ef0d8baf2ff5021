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

inline int64_t row_bytes(Format format, int64_t n) {
    return with_format(format, [&](auto f) { return decltype(f)::row_bytes(n); });
}
inline int64_t column_bytes(Format format, int64_t q) {
    return with_format(format, [&](auto f) { return decltype(f)::column_bytes(q); });
}
inline const uint8_t *scales_of(const Weight &w, int64_t i) { return at<uint8_t>(w.scales, i * w.scales_stride); }

// to[0 .. inputs) = row i of a weight that lies by rows.
inline void widen_row(const Weight &w, int64_t i, float *to) {
    with_format(w.format, [&](auto f) { decltype(f)::widen(piece_of(w, i), scales_of(w, i), w.inputs, to); });
}

}  // namespace
