// Products with weights in groups (the formats of formats/), in integers: what they are multiplied with is rounded to 8 bits,
// a float scale for every 32 values. A group's sum is exact; sums of groups are float.
//
// By rows: dot products of rows with x. By columns: the kept columns of a group of 32 share a row of scales, so a group's
// integers are summed first and meet the scales once. What a mask skips is 0 before it is rounded.
#pragma once

#include "core/activations.h"
#include "core/formats.h"
#include "core/neurons.h"
#include "core/parted.h"
#include "core/sums.h"

namespace {

using moyu::ValuesArgs;

// Rows of weights at once, and what is prefetched meanwhile.
template <class Line>
struct LinesOf {
    Line codes[kMostPieces], then[kMostPieces];
    const uint8_t *scales[kMostPieces];
    int count = 0;
    void add(Line line, const uint8_t *its_scales, Line after) {
        codes[count] = line;
        scales[count] = its_scales;
        then[count++] = after;
    }
};

using Lines = LinesOf<const uint8_t *>;

// Rows of weights to take at once beside so many rows of x.
inline int lines_beside(int64_t rows) { return kTiles && rows >= kTileRows ? kTileLines : 4; }

// out[r * stride + c] = row c of weights · row r of x, for all of them; the first rows of x prefetch, the others find the lines
// in the cache. groups: of a row. In a four or a tile that is not full the last row stands for the missing ones; `stride` has room
// for them.
template <class F>
void dot_lines(const LinesOf<typename F::Line> &lines, const Rounded &x, int64_t rows, int64_t groups, float *out, int64_t stride) {
    const bool tile = lines_beside(rows) > 4 && lines.count > 4;
    auto full = lines;
    while (full.count % (tile ? kTileLines : 4) != 0)
        full.add(lines.codes[lines.count - 1], lines.scales[lines.count - 1], lines.then[lines.count - 1]);
#if MOYU_INTEGERS
    if constexpr (kTiles)
        if (tile) return dot_tile<F>(full.codes, full.scales, full.then, x, rows, groups, out, stride);
#endif
    for (int c = 0; c < full.count; c += 4) {
        const auto some = [&](int64_t r, auto at_once, bool ahead) {
            dot_four<F, at_once()>(full.codes + c, full.scales + c, ahead ? full.then + c : nullptr, x.row(r), groups,
                                   out + r * stride + c, stride);
        };
        using std::integral_constant;
        int64_t r = 0;
        for (; r + kDotRows <= rows; r += kDotRows) some(r, integral_constant<int, kDotRows>{}, r == 0);
        if (rows - r == 3) some(r, integral_constant<int, kDotRows == 4 ? 3 : 1>{}, r == 0);
        if (rows - r == 2) some(r, integral_constant<int, 2>{}, r == 0);
        if (rows - r == 1) some(r, integral_constant<int, 1>{}, r == 0);
    }
}
MOYU_ONCE void dot_rows_of(const Weight &w, const Lines &lines, const Rounded &x, int64_t rows, float *out, int64_t stride) {
    with_format(w.format, [&](auto f) { dot_lines<decltype(f)>(lines, x, rows, groups_of(w.inputs), out, stride); });
}

// The same of the rows that a step takes, by rows or parted; `first`: of a parted weight the first bits alone.
MOYU_ONCE void dot_taken(const Weight &w, const Taken &taken, const Rounded &x, int64_t rows, bool first, float *out) {
    const auto dot = [&](auto f, auto line) {
        using F = decltype(f);
        LinesOf<typename F::Line> lines;
        for (int c = 0; c < taken.count; ++c) lines.add(line(taken.piece[c]), scales_of(w, taken.piece[c]), line(taken.next[c]));
        dot_lines<F>(lines, x, rows, groups_of(w.inputs), out, kMostPieces);
    };
    if (w.order != moyu::Order::parted) return with_format(w.format, [&](auto f) { dot(f, [&](int64_t i) { return piece_of(w, i); }); });
    with_parts(w.format, [&](auto f) {
        using P = Parted<decltype(f)>;
        using Whole = typename P::Whole;
        if (first) dot(typename P::First{}, [&](int64_t i) { return first_of(w, i); });
        else dot(Whole{}, [&](int64_t i) { return typename Whole::Line{first_of(w, i), piece_of(w, i)}; });
    });
}

// The kept columns of one group, at most kGroup, and up to 8 lines that are read after them.
struct Group {
    const uint8_t *column[kGroup], *then[8];
    int count = 0, first = 0, after = 0;  // first: how many are of the group's first half
    void add(const Weight &w, int64_t i) {
        column[count++] = piece_of(w, i);
        if (i % kGroup < kGroup / 2) first = count;
    }
    void follow(const uint8_t *line) {
        if (after < 8) then[after++] = line;
    }
};

// y (outputs,) += sum over the columns of group `number` of value_c * column c, the values rounded to integers; `values` are 0
// beyond the count.
MOYU_ONCE void add_group(const Weight &w, const Group &group, const float *values, int64_t number, float *y, bool ahead) {
    Columns columns;
    int32_t first;
    quantise_group(values, columns.v, &columns.by, &first);
    for (int i = 0; i < kGroup; ++i) columns.column[i] = group.column[i < group.count ? i : 0];
    columns.count = group.count, columns.first = group.first;
    columns.then = group.then, columns.after = ahead ? group.after : -1;
    with_format(w.format, [&](auto f) {
        constexpr int64_t span = decltype(f)::Scales::span;
        columns.scales = scales_of(w, number / span), columns.place = number % span;
        decltype(f)::add_columns(columns, y, w.outputs);
    });
}

// A thread's part of a list of kept columns or neurons, cut where one group of 32 ends and the next begins.
inline Share share_groups(const int32_t *kept, int64_t count, const moyu::Team &team) {
    Share share(count, team);
    const auto next = [&](int64_t i) {
        if (kept == nullptr) return i >= count ? count : round_up(i) < count ? round_up(i) : count;
        while (i > 0 && i < count && kept[i] / kGroup == kept[i - 1] / kGroup) ++i;
        return i;
    };
    share.begin = next(share.begin);
    share.end = next(share.end);
    return share;
}

// Where the group that begins at `i` ends.
inline int64_t group_end(const int32_t *kept, int64_t i, int64_t end) {
    int64_t k = i;
    while (k < end && (kept ? kept[k] : k) / kGroup == (kept ? kept[i] : i) / kGroup) ++k;
    return k;
}

// out (rows, outputs): the kept rows of W that are this thread's; `first`: with their first bits alone. Returns the bytes read.
template <class T>
int64_t grouped_rows_share(const LinearArgs &a, const Weight &w, const Rounded &x, const int32_t *kept, int64_t count,
                           const moyu::Team &team, bool first = false) {
    const int64_t bytes = (first ? part_bytes(w).first : row_bytes(w.format, w.inputs)) + (a.bias ? bytes_of<T>(1) : 0);
    const Share share(count, team);
    T *out = static_cast<T *>(a.out);
    const int64_t hop = Taken::hop(bytes);
    const int together = lines_beside(a.rows);
    for (int64_t step = 0; step < Taken::steps(share, together); ++step) {
        const Taken taken(kept, share, together, step, hop);
        float value[kMostRows][kMostPieces];
        dot_taken(w, taken, x, a.rows, first, value[0]);
        for (int64_t r = 0; r < a.rows; ++r)
            for (int c = 0; c < taken.count; ++c) {
                const int64_t j = taken.piece[c];
                if (a.mask == nullptr || a.rows == 1 || a.mask[r * a.mask_stride + j])
                    narrow(value[r][c] + bias_at<T>(a.bias, j), out[r * w.outputs + j]);
            }
    }
    return (share.end - share.begin) * bytes;
}

// sums (rows, padded outputs) += the kept columns of W that are this thread's, times their x. Returns the bytes read.
template <class T>
int64_t grouped_columns_share(const LinearArgs &a, const Weight &w, const int32_t *kept, int64_t count,
                              const moyu::Team &team, float *sums) {
    const Share share = share_groups(kept, count, team);
    int64_t read = 0;
    for (int64_t i = share.begin; i < share.end;) {
        const int64_t end = group_end(kept, i, share.end), after = group_end(kept, end, share.end);
        const int64_t number = (kept ? kept[i] : i) / kGroup;
        Group group;
        for (int64_t k = i; k < end; ++k) group.add(w, kept ? kept[k] : k);
        for (int64_t k = end; k < after; ++k) group.follow(piece_of(w, kept ? kept[k] : k));
        for (int64_t r = 0; r < a.rows; ++r) {
            float values[kGroup];
            for (int c = 0; c < kGroup; ++c) values[c] = 0.0f;
            for (int c = 0; c < group.count; ++c) {
                const int64_t j = kept ? kept[i + c] : i + c;
                const bool keeps = a.mask == nullptr || a.mask[r * a.mask_stride + j];
                values[c] = keeps ? widen(*at<T>(a.x, r * a.x_stride + j)) : 0.0f;
            }
            add_group(w, group, values, number, sums + r * round_up(w.outputs), r == 0);
        }
        read += (end - i) * column_bytes(w.format, w.outputs) + scale_bytes(w);
        i = end;
    }
    return read;
}

// sums (rows, padded d_out) = the kept neurons that are this thread's, as many groups after the other as have 32 of them, and
// at least one: gate and up of four neurons at a time, then all of down. What is prefetched meanwhile is what the next four
// neurons or the next columns need.
template <class T>
int64_t grouped_neurons_share(const NeuronsArgs &a, const Rounded &x, const int32_t *kept, int64_t count,
                              const moyu::Team &team, float *sums) {
    const Weight &gate = a.gate, &up = a.up, &down = a.down;
    const bool has_gate = gate.address != nullptr, has_up = up.address != nullptr;
    const int64_t d_out = down.outputs;
    const int64_t neuron_bytes = (has_gate ? row_bytes(gate.format, gate.inputs) : 0) +
                                 (has_up ? row_bytes(up.format, up.inputs) : 0) + column_bytes(down.format, d_out);
    const int64_t bias_bytes = bytes_of<T>((a.gate_bias ? 1 : 0) + (a.up_bias ? 1 : 0));
    const Share share = share_groups(kept, count, team);
    clear(sums, a.rows, d_out);
    int64_t read = 0;
    for (int64_t i = share.begin, end; i < share.end; i = end) {
        int ends[kGroup], groups = 0;  // where each ends, among the neurons taken
        for (end = i; groups == 0 || (end < share.end && group_end(kept, end, share.end) - i <= kGroup); ++groups) {
            end = group_end(kept, end, share.end);
            ends[groups] = static_cast<int>(end - i);
        }
        const int size = ends[groups - 1];
        int64_t neuron[kGroup];
        for (int c = 0; c < size; ++c) neuron[c] = kept ? kept[i + c] : i + c;
        float value[kMostRows][kGroup], rise[kMostRows][kGroup];
        // After row k row k + 4; after the last four columns of down, those of gate's before those of up's.
        const auto project = [&](const Weight &w, int c, int columns, float(*to)[kGroup]) {
            Lines lines;
            for (int k = c; k < c + 4 && k < size; ++k) {
                const int column = k + 4 - size + columns;
                lines.add(piece_of(w, neuron[k]), scales_of(w, neuron[k]), column < columns ? piece_of(w, neuron[k + 4])
                                                         : piece_of(down, neuron[column < size ? column : 0]));
            }
            dot_rows_of(w, lines, x, a.rows, to[0] + c, kGroup);
        };
        for (int c = 0, g = 0, first = 0; c < size; c += 4) {
            if (has_gate) project(gate, c, 0, value);
            if (has_up) project(up, c, has_gate ? 4 : 0, has_gate ? rise : value);
            for (; g < groups && first < c + 4; first = ends[g++]) prefetch_scales(down, neuron[first] / kGroup);
        }
        for (int64_t r = 0; r < a.rows; ++r) {
            const auto add_bias = [&](const void *bias, float *to) {
                for (int c = 0; c < size && bias; ++c) to[c] += bias_at<T>(bias, neuron[c]);
            };
            if (has_gate) add_bias(a.gate_bias, value[r]);
            if (has_up) add_bias(a.up_bias, has_gate ? rise[r] : value[r]);
            if (has_gate || !a.given) activate(a.act, value[r], size);
            for (int c = 0; c < size && has_gate && has_up; ++c) value[r][c] *= rise[r][c];
            for (int c = 0; c < size; ++c) {
                if (a.mask && !a.mask[r * a.mask_stride + neuron[c]]) value[r][c] = 0.0f;
                else if (a.given) value[r][c] *= widen(*at<T>(a.given, r * a.given_stride + neuron[c]));
            }
        }
        for (int g = 0, c = 0; g < groups; c = ends[g++]) {
            Group group;
            for (int k = c; k < ends[g]; ++k) group.add(down, neuron[k]);
            for (int k = ends[g]; k < size; ++k) group.follow(piece_of(down, neuron[k]));
            for (int64_t k = end; k < share.end && k < end + 4 && g + 1 == groups; ++k) {
                if (has_gate) group.follow(piece_of(gate, kept ? kept[k] : k));
                if (has_up) group.follow(piece_of(up, kept ? kept[k] : k));
            }
            for (int64_t r = 0; r < a.rows; ++r) {
                float own[kGroup];
                for (int k = 0; k < kGroup; ++k) own[k] = k < group.count ? value[r][c + k] : 0.0f;
                add_group(down, group, own, neuron[c] / kGroup, sums + r * round_up(d_out), r == 0);
            }
        }
        read += size * (neuron_bytes + bias_bytes) + groups * scale_bytes(down);
    }
    return read;
}

template <class T>
int64_t grouped_rows(const LinearArgs &a) {
    const Weight &w = a.weight;
    Rounded x;
    int32_t *kept;
    uint8_t *any;
    int64_t *bytes;
    in_scratch([&](Arena &arena) {
        x = Rounded::take(arena, a.rows, w.inputs);
        kept = arena.take<int32_t>(w.outputs);
        any = arena.take<uint8_t>(w.outputs);
        bytes = arena.take<int64_t>(a.threads);
    });
    fill_rows<T>(x, a.x, a.x_stride, a.rows, w.inputs);
    clear_skipped<T>(a);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, w.outputs, any, kept);
    auto work = [&](const moyu::Team &team) { bytes[team.thread] = grouped_rows_share<T>(a, w, x, kept, count, team); };
    return total_of(bytes, a.threads, threads_for(count * row_bytes(w.format, w.inputs), count, a.threads), work);
}

template <class T>
int64_t grouped_columns(const LinearArgs &a) {
    const Weight &w = a.weight;
    const int64_t sums_size = a.rows * round_up(w.outputs);
    float *sums;
    int32_t *kept;
    uint8_t *any;
    int64_t *bytes;
    in_scratch([&](Arena &arena) {
        sums = arena.take<float>(a.threads * sums_size);
        kept = arena.take<int32_t>(w.inputs);
        any = arena.take<uint8_t>(w.inputs);
        bytes = arena.take<int64_t>(a.threads);
    });
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, w.inputs, any, kept);
    auto work = [&](const moyu::Team &team) {
        float *own = sums + team.thread * sums_size;
        clear(own, a.rows, w.outputs);
        bytes[team.thread] = grouped_columns_share<T>(a, w, kept, count, team, own);
        team.wait();
        bytes[team.thread] +=
            write_sums<T, false>(sums, team.threads, a.rows, w.outputs, a.bias, static_cast<T *>(a.out), team);
    };
    return total_of(bytes, a.threads, threads_for(count * column_bytes(w.format, w.outputs), count, a.threads), work);
}

template <class T>
int64_t grouped_neurons(const NeuronsArgs &a) {
    const int64_t d = inputs_of(a), f = a.down.inputs, d_out = a.down.outputs, sums_size = a.rows * round_up(d_out);
    Rounded x;
    float *sums;
    int32_t *kept;
    uint8_t *any;
    int64_t *bytes;
    in_scratch([&](Arena &arena) {
        x = Rounded::take(arena, a.rows, d);
        sums = arena.take<float>(a.threads * sums_size);
        kept = arena.take<int32_t>(f);
        any = arena.take<uint8_t>(f);
        bytes = arena.take<int64_t>(a.threads);
    });
    fill_rows<T>(x, a.x, a.x_stride, a.rows, d);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, f, any, kept);
    auto work = [&](const moyu::Team &team) {
        bytes[team.thread] = grouped_neurons_share<T>(a, x, kept, count, team, sums + team.thread * sums_size);
        team.wait();
        bytes[team.thread] +=
            write_sums<T, false>(sums, team.threads, a.rows, d_out, a.down_bias, static_cast<T *>(a.out), team);
    };
    return total_of(bytes, a.threads, threads_for(count * column_bytes(a.down.format, d_out), count, a.threads), work);
}

template <class T>
void values_share(const ValuesArgs &a, const moyu::Team &team, float *row) {
    const Weight &w = a.weight;
    T *out = static_cast<T *>(a.out);
    if (w.order == moyu::Order::rows) {
        const Share share(w.outputs, team);
        for (int64_t i = share.begin; i < share.end; ++i) {
            widen_row(w, i, a.first, row);
            for (int64_t k = 0; k < w.inputs; ++k) narrow(row[k], out[i * w.inputs + k]);
        }
        return;
    }
    const Share share(groups_of(w.outputs), team);
    for (int64_t part = share.begin; part < share.end; ++part) {
        const int64_t o = part * kGroup;
        const int outputs = static_cast<int>(w.outputs - o < kGroup ? w.outputs - o : kGroup);
        for (int64_t number = 0; number < groups_of(w.inputs); ++number) {
            const int64_t first = number * kGroup;
            Columns columns;
            columns.count = static_cast<int>(w.inputs - first < kGroup ? w.inputs - first : kGroup);
            for (int i = 0; i < columns.count; ++i) columns.column[i] = piece_of(w, first + i);
            float values[kGroup][kGroup];
            with_format(w.format, [&](auto f) {
                constexpr int64_t span = decltype(f)::Scales::span;
                columns.scales = scales_of(w, number / span), columns.place = number % span;
                decltype(f)::widen_columns(columns, o, outputs, w.outputs, values);
            });
            for (int k = 0; k < outputs; ++k)
                for (int i = 0; i < columns.count; ++i) narrow(values[k][i], out[(o + k) * w.inputs + first + i]);
        }
    }
}

}  // namespace
