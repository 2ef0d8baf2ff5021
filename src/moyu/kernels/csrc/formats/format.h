// What a weight format is to the kernels. formats.def lists them; each has a header with a struct F, most of them one line:
//
//   struct F : Planar<bits of a code, its kind of scales (core/scales.h), the code that stands for 0, its table> {};
//
//   F::Scales, F::bits
//   row_bytes(n)        bytes that a row of n inputs takes, scales included
//   column_bytes(q)     bytes of the codes that a column of q outputs takes
//   scale_bytes(q)      bytes of the scales that a group of 32 columns shares
//   level(line, i, g)   the integer of input i of a row, or of output i of a column; the line has g groups of 32
//   Line                what is known of where a row's codes lie; codes(line, ...) gives them for products along a row
//   ahead(line, b)      prefetches the codes of 8 groups from group b on
//   add_columns(...)    columns of a group, times what x has for them
//   widen(...)          a row in float
#pragma once

#include "core/planes.h"
#include "core/scales.h"
// In this order: the loops are written in terms of the two.
#include "core/group_columns.h"
#include "core/group_tiles.h"

namespace {

struct NoTable {};

template <int Bits, class ItsScales, int Zero = 0, class Table = NoTable>
struct Planar {
    using Self = Planar;
    using Scales = ItsScales;
    using Line = const uint8_t *;
    static constexpr int bits = Bits;
    static constexpr int zero = Bits == 8 ? 128 : Zero;  // the code that stands for 0, where codes are not signed
    static constexpr bool has_table = !std::is_same_v<Table, NoTable>;
    // A weight in planes (core/levels.h): whether it can be, and how many bits of a code are read for chosen inputs only. What the
    // others stand for alone is the middle of the codes that share them.
    static constexpr bool splits = !has_table && Bits > 2;
    static constexpr int further = Bits == 8 ? 4 : Bits > 3 ? 2 : 1;
    static constexpr float middle = 0.5f * ((1 << further) - 1);
    static constexpr bool is_signed = has_table || Bits == 8;  // what codes stand for takes 8 bits with a sign

    static void ahead(Line line, int64_t b) { prefetch<32 * Bits>(line + 4 * Bits * b); }
    static void ahead_of_end(Line line, int64_t groups) { prefetch<128>(line + 4 * Bits * groups); }  // what follows a row: its scales

    static int64_t line_bytes(int64_t count) { return Bits == 8 ? count : groups_of(count) * 4 * Bits; }
    static int64_t row_bytes(int64_t n) {
        return line_bytes(groups_of(n) * kGroup) + (groups_of(n) + Scales::span - 1) / Scales::span * Scales::bytes;
    }
    static int64_t column_bytes(int64_t q) { return line_bytes(q); }
    static int64_t scale_bytes(int64_t q) { return (q * Scales::bytes + Scales::span - 1) / Scales::span; }

    static int32_t level(Line line, int64_t i, int64_t groups) {
        if constexpr (Bits == 8) return static_cast<int8_t>(line[i]);
        else if constexpr (has_table) return Table::levels[code_at<Bits>(line, i, groups)];
        else return code_at<Bits>(line, i, groups) - Zero;
    }
    // The same without its further bits.
    static float first_level(int32_t level) {
        return static_cast<float>(((level + zero) >> further << further) - zero) + middle;
    }
    // to[0 .. n) = the values of a row; `first`: of its first bits alone. Exact: a product of a level and a scale fits into a float,
    // and is rounded once when an offset is added.
    MOYU_ONCE static void widen(const uint8_t *line, const uint8_t *scales, int64_t n, bool first, float *to) {
        const int64_t groups = groups_of(n);
        const auto fields = Scales::of_row(scales, groups);
        int64_t i = 0;
#if MOYU_INTEGERS
        for (; i + kBytes <= n; i += kBytes) {
            alignas(64) float levels[kBytes];
            levels_in_order(line, groups, i / kGroup, first, levels);
            for (int k = 0; k < kBytes; k += kGroup / Scales::halves) {
                const int64_t part = (i + k) * Scales::halves / kGroup;
                const auto own = Scales::at(fields, part / (Scales::halves * Scales::span), part);
                const auto scale = Wide::set(own.scale), offset = Wide::set(own.offset);
                for (int l = k; l < k + kGroup / Scales::halves; l += kLanes)
                    store_floats(to + i + l, add_product(load_floats(levels + l), scale, offset));
            }
        }
#endif
        for (; i < n; ++i) {
            const int64_t part = i * Scales::halves / kGroup;
            const auto own = Scales::at(fields, part / (Scales::halves * Scales::span), part);
            const int32_t whole = level(line, i, groups);
            to[i] = own.scale * (first ? first_level(whole) : static_cast<float>(whole)) + own.offset;
        }
    }
    // to[output][0 .. width) = the values of up to 32 columns of group `number` from output o on, up to 32 of them.
    MOYU_ONCE static void widen_columns(const Columns &columns, int64_t o, int outputs, int64_t q, float (*to)[kGroup]) {
        const int64_t groups = groups_of(q);
        for (int i = 0; i < columns.count; ++i) {
            const auto fields = Scales::of_columns(columns.scales, columns.place * Scales::halves + i * Scales::halves / kGroup, q);
            for (int k = 0; k < outputs; ++k) {
                const auto own = Scales::at(fields, o + k, o + k);
                to[k][i] = own.scale * static_cast<float>(level(columns.column[i], o + k, groups)) + own.offset;
            }
        }
    }
    // y (q,) += what Columns says.
    static void add_columns(const Columns &columns, float *y, int64_t q) { add_columns_of<Self>(columns, y, q); }

#if MOYU_INTEGERS
    // What codes in registers are more than levels, and whether they are signed bytes.
    static constexpr bool stands_signed = is_signed && kLifted == 0;
    static constexpr int lift = is_signed ? kLifted : Zero;

    static Bytes stand(Bytes codes) {
        if constexpr (has_table) codes = looked_up(Table::levels, codes);
        return is_signed ? lifted(codes) : codes;
    }
    static void codes(Line line, int64_t groups, int64_t g, int here, Bytes &front, Bytes &back) {
        if constexpr (Bits == 8) {
            constexpr int whole = kBytes / kGroup;  // groups of a register
            const Bytes first = load_some(line + 32 * g, 32 * (here < whole ? here : whole));
            const Bytes second = here > whole ? load_some(line + 32 * (g + whole), 32 * (here - whole)) : every(0);
            front = first_halves(first, second), back = second_halves(first, second);
        } else {
            codes_of_groups<Bits>(line, groups, g, here, front, back);
        }
        front = stand(front), back = stand(back);
    }
    static Bytes in_order(const uint8_t *line, int64_t groups, int64_t g) { return stand(codes_in_order<Bits>(line, groups, g)); }
    // kBytes levels of groups from g on.
    static void levels_in_order(const uint8_t *line, int64_t groups, int64_t g, bool first, float *to) {
        alignas(64) uint8_t bytes[kBytes];
        const Bytes codes = codes_in_order<Bits>(line, groups, g);
        store_bytes(bytes, stand(first ? both_of(codes, every(256 - (1 << further))) : codes));
        const float more = (first ? middle : 0.0f) - static_cast<float>(lift);
        for (int i = 0; i < kBytes; i += kLanes)
            store_floats(to + i, plus(stands_signed ? Wide::signed_bytes(bytes + i) : Wide::bytes(bytes + i), more));
    }
#endif
};

}  // namespace
