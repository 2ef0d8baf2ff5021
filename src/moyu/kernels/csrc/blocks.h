// Products with weights in blocks of 32 (Q8_0, Q4_0; src/moyu/blocks.py says how they lie), in integers: what they are
// multiplied with is rounded to 8 bits, a float scale for every 32 values. A block's sum is exact; sums of blocks are float.
//
// By rows: dot products of rows with x. By columns: the kept columns of a group of 32 share a row of scales, so a group's
// integers are summed first and meet the scales once. What a mask skips is 0 before it is rounded.
#pragma once

#include "activations.h"
#include "pieces.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "blocks_avx512.h"
#elif defined(__AVX2__)
#include "blocks_avx2.h"
#else
#include "blocks_portable.h"
#endif

namespace {

using moyu::Blocks;
using moyu::Kind;

inline int64_t blocks_of(int64_t values) { return (values + kBlock - 1) / kBlock; }
inline int64_t row_bytes(Kind kind, int64_t n) { return blocks_of(n) * (kind == Kind::q8_0 ? 34 : 18); }  // with its scales
inline int64_t column_bytes(Kind kind, int64_t q) { return kind == Kind::q8_0 ? q : blocks_of(q) * 16; }
inline int64_t round_up8(int64_t count) { return (count + 7) / 8 * 8; }

// Rows of x as the dot products take them, each padded to 8 blocks.
struct Rounded {
    int8_t *q8, *q4;      // in their order; and for Q4_0, kBeside blocks at a time: elements 0 .. 15 of each, then 16 .. 31
    float *scale, *sums;  // sums: scale * sum of a block's integers, because unsigned codes stand for code - offset
    int64_t blocks;       // of a row, padded

    static int64_t room(int64_t rows, int64_t n) { return rows * round_up8(blocks_of(n)) * (2 * kBlock + 8) + 4 * kLineBytes; }
    static Rounded take(Arena &arena, int64_t rows, int64_t n) {
        Rounded r;
        r.blocks = round_up8(blocks_of(n));
        r.q8 = arena.take<int8_t>(rows * r.blocks * kBlock);
        r.q4 = arena.take<int8_t>(rows * r.blocks * kBlock);
        r.scale = arena.take<float>(rows * r.blocks);
        r.sums = arena.take<float>(rows * r.blocks);
        return r;
    }
    Rounded fitted(int64_t n) const { return {q8, q4, scale, sums, round_up8(blocks_of(n))}; }  // for rows as long or shorter
    Rounded row(int64_t r) const {
        return {q8 + r * blocks * kBlock, q4 + r * blocks * kBlock, scale + r * blocks, sums + r * blocks, blocks};
    }
    template <class T>
    void fill(const T *x, int64_t n) {  // one row
        for (int64_t b = 0; b < blocks; ++b) {
            float values[kBlock];
            int8_t *q = q8 + b * kBlock, *halves = q4 + b / kBeside * kBeside * kBlock + b % kBeside * 16;
            const int64_t left = n - b * kBlock;
            if (left >= kBlock) {
                for (int i = 0; i < kBlock; ++i) values[i] = widen(x[b * kBlock + i]);
            } else {
                for (int i = 0; i < kBlock; ++i) values[i] = i < left ? widen(x[b * kBlock + i]) : 0.0f;
            }
            sums[b] = static_cast<float>(quantise_block(values, q, scale + b)) * scale[b];
            for (int i = 0; i < 16; ++i) halves[i] = q[i], halves[16 * kBeside + i] = q[16 + i];
        }
    }
};

template <class T>
void fill_rows(const Rounded &to, const void *x, int64_t stride, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; ++r) to.row(r).fill(at<T>(x, r * stride), n);
}

// Rows of weights at once, and what is prefetched meanwhile.
struct Lines {
    const uint8_t *quants[kTogether], *scales[kTogether], *then[kTogether];
    int count = 0;
};

// out[c] = row c · x, for every row of weights; `ahead` for the first row of x.
template <bool Ahead>
inline void dot_blocks(Kind kind, const Lines &w, const Rounded &x, int64_t n, float *out) {
    const int64_t blocks = blocks_of(n);
    int c = 0;
    const auto some = [&](auto at_once) {
        constexpr int C = decltype(at_once)::value;
        for (; c + C <= w.count; c += C) {
            const auto dot = kind == Kind::q8_0 ? dot_q8<C, Ahead> : dot_q4<C, Ahead>;
            const int8_t *own = kind == Kind::q8_0 ? x.q8 : x.q4;
            dot(w.quants + c, w.scales + c, w.then + c, own, x.scale, x.sums, blocks, out + c);
        }
    };
    some(std::integral_constant<int, 4>{});
    some(std::integral_constant<int, 2>{});
    some(std::integral_constant<int, 1>{});
}
inline void dot_blocks(Kind kind, const Lines &w, const Rounded &x, int64_t n, bool ahead, float *out) {
    if (ahead) dot_blocks<true>(kind, w, x, n, out);
    else dot_blocks<false>(kind, w, x, n, out);
}

// The kept columns of one group, as the sums take them.
struct Group {
    const uint8_t *column[kBlock], *then[8];  // what is read after them
    int count = 0, after = 0;
    void follow(const uint8_t *line) {
        if (after < 8) then[after++] = line;
    }
};

// y += scale * sum over the group's columns of v * column, `scales` a row of fp16; v: kBlock integers, 0 beyond the count.
inline void add_group(Kind kind, const Group &group, const int8_t *v, float scale, const uint8_t *scales, float *y, int64_t q,
                      bool ahead) {
    const int after = ahead ? group.after : -1;
    const uint8_t *column[kBlock];
    for (int i = 0; i < kBlock; ++i) column[i] = group.column[i < group.count ? i : 0];
    if (kind == Kind::q8_0) sum_columns<SumsQ8>(column, group.count, v, scale, scales, y, q, group.then, after);
    else sum_columns<SumsQ4>(column, group.count, v, scale, scales, y, q, group.then, after);
}

// A thread's part of a list of kept columns or neurons, cut where one group of 32 ends and the next begins.
inline Share share_groups(const int32_t *kept, int64_t count, const moyu::Team &team) {
    Share share(count, team);
    const auto next = [&](int64_t i) {
        if (kept == nullptr) return i >= count ? count : round_up(i) < count ? round_up(i) : count;
        while (i > 0 && i < count && kept[i] / kBlock == kept[i - 1] / kBlock) ++i;
        return i;
    };
    share.begin = next(share.begin);
    share.end = next(share.end);
    return share;
}

// Where the group that begins at `i` ends.
inline int64_t group_end(const int32_t *kept, int64_t i, int64_t end) {
    int64_t k = i;
    while (k < end && (kept ? kept[k] : k) / kBlock == (kept ? kept[i] : i) / kBlock) ++k;
    return k;
}

inline const uint8_t *quants_at(const Blocks &w, int64_t i) { return w.quants + i * w.quants_stride; }
inline const uint8_t *scales_at(const Blocks &w, int64_t i) { return w.scales + i * w.scales_stride; }

// to[0 .. n) = row i of a weight.
inline void widen_row(const Blocks &w, int64_t i, int64_t n, float *to) {
    const uint8_t *quants = quants_at(w, i), *scales = scales_at(w, i);
    for (int64_t k = 0; k < n; ++k)
        to[k] = half_at(scales, k / kBlock) * static_cast<float>(w.kind == Kind::q8_0 ? at_q8(quants, k) : at_q4(quants, k));
}

// out (rows, q): the kept rows of W that are this thread's. Returns the bytes read.
template <class T>
int64_t block_rows_share(const LinearArgs &a, const Blocks &w, const Rounded &x, const int32_t *kept, int64_t count,
                         const moyu::Team &team) {
    const int64_t bytes = row_bytes(w.kind, a.n) + (a.bias ? static_cast<int64_t>(sizeof(T)) : 0);
    const Share share(count, team);
    T *out = static_cast<T *>(a.out);
    const int64_t hop = Taken::hop(bytes);
    for (int64_t step = 0; step < Taken::steps(share, 4); ++step) {
        const Taken taken(kept, share, 4, step, hop);
        Lines lines;
        for (; lines.count < taken.count; ++lines.count) {
            lines.quants[lines.count] = quants_at(w, taken.piece[lines.count]);
            lines.scales[lines.count] = scales_at(w, taken.piece[lines.count]);
            lines.then[lines.count] = quants_at(w, taken.next[lines.count]);
        }
        for (int64_t r = 0; r < a.rows; ++r) {
            float value[kTogether];
            dot_blocks(w.kind, lines, x.row(r), a.n, r == 0, value);
            for (int c = 0; c < lines.count; ++c) {
                const int64_t j = taken.piece[c];
                if (a.mask == nullptr || a.rows == 1 || a.mask[r * a.mask_stride + j])
                    narrow(value[c] + bias_at<T>(a.bias, j), out[r * a.q + j]);
            }
        }
    }
    return (share.end - share.begin) * bytes;
}

// sums (rows, padded q) += the kept columns of W that are this thread's, times their x. Returns the bytes read.
template <class T>
int64_t block_columns_share(const LinearArgs &a, const Blocks &w, const int32_t *kept, int64_t count,
                            const moyu::Team &team, float *sums) {
    const Share share = share_groups(kept, count, team);
    int64_t read = 0;
    for (int64_t i = share.begin; i < share.end;) {
        const int64_t end = group_end(kept, i, share.end), after = group_end(kept, end, share.end);
        const int64_t number = (kept ? kept[i] : i) / kBlock;
        Group group;
        for (int64_t k = i; k < end; ++k) group.column[group.count++] = quants_at(w, kept ? kept[k] : k);
        for (int64_t k = end; k < after; ++k) group.follow(quants_at(w, kept ? kept[k] : k));
        for (int64_t r = 0; r < a.rows; ++r) {
            float values[kBlock], scale;
            int8_t v[kBlock];
            for (int c = 0; c < kBlock; ++c) values[c] = 0.0f;
            for (int c = 0; c < group.count; ++c) {
                const int64_t j = kept ? kept[i + c] : i + c;
                const bool keeps = a.mask == nullptr || a.mask[r * a.mask_stride + j];
                values[c] = keeps ? widen(*at<T>(a.x, r * a.x_stride + j)) : 0.0f;
            }
            quantise_block(values, v, &scale);
            add_group(w.kind, group, v, scale, scales_at(w, number), sums + r * round_up(a.q), a.q, r == 0);
        }
        read += (end - i) * column_bytes(w.kind, a.q) + a.q * 2;
        i = end;
    }
    return read;
}

// sums (rows, padded d_out) = the kept neurons that are this thread's, as many groups after the other as have 32 of them, and
// at least one: gate and up of four neurons at a time, then all of down. What is prefetched meanwhile is what the next four
// neurons or the next columns need.
template <class T>
int64_t block_neurons_share(const NeuronsArgs &a, const Blocks &gate, const Blocks &up, const Blocks &down, const Rounded &x,
                            const int32_t *kept, int64_t count, const moyu::Team &team, float *sums) {
    const int64_t neuron_bytes = (a.gate ? row_bytes(gate.kind, a.d) : 0) + (a.up ? row_bytes(up.kind, a.d) : 0) +
                                 column_bytes(down.kind, a.d_out);
    const int64_t bias_bytes = ((a.gate_bias ? 1 : 0) + (a.up_bias ? 1 : 0)) * static_cast<int64_t>(sizeof(T));
    const Share share = share_groups(kept, count, team);
    clear(sums, a.rows, a.d_out);
    int64_t read = 0;
    for (int64_t i = share.begin, end; i < share.end; i = end) {
        int ends[kBlock], groups = 0;  // of the groups, among the neurons taken
        for (end = i; groups == 0 || (end < share.end && group_end(kept, end, share.end) - i <= kBlock); ++groups) {
            end = group_end(kept, end, share.end);
            ends[groups] = static_cast<int>(end - i);
        }
        const int size = ends[groups - 1];
        int64_t neuron[kBlock];
        for (int c = 0; c < size; ++c) neuron[c] = kept ? kept[i + c] : i + c;
        const auto scales = [&](int c) { return scales_at(down, neuron[c] / kBlock); };
        float value[kRowBlock][kBlock], rise[kRowBlock][kBlock];
        // After row k row k + 4; after the last four columns of down, those of gate's before those of up's.
        const auto project = [&](const Blocks &w, int c, int columns, float(*to)[kBlock]) {
            Lines lines;
            for (int k = c; k < c + 4 && k < size; ++k, ++lines.count) {
                const int column = k + 4 - size + columns;
                lines.quants[lines.count] = quants_at(w, neuron[k]);
                lines.scales[lines.count] = scales_at(w, neuron[k]);
                lines.then[lines.count] = column < columns ? quants_at(w, neuron[k + 4])
                                                           : quants_at(down, neuron[column < size ? column : 0]);
            }
            for (int64_t r = 0; r < a.rows; ++r) dot_blocks(w.kind, lines, x.row(r), a.d, r == 0, to[r] + c);
        };
        for (int c = 0, g = 0, first = 0; c < size; c += 4) {
            if (a.gate) project(gate, c, 0, value);
            if (a.up) project(up, c, a.gate ? 4 : 0, a.gate ? rise : value);
            for (; g < groups && first < c + 4; first = ends[g++])
                for (int64_t b = 0; b < 2 * a.d_out; b += kLineBytes) prefetch<kLineBytes>(scales(first) + b);
        }
        for (int64_t r = 0; r < a.rows; ++r) {
            const auto add_bias = [&](const void *bias, float *to) {
                for (int c = 0; c < size && bias; ++c) to[c] += bias_at<T>(bias, neuron[c]);
            };
            if (a.gate) add_bias(a.gate_bias, value[r]);
            if (a.up) add_bias(a.up_bias, a.gate ? rise[r] : value[r]);
            if (a.gate || !a.given) activate(a.act, value[r], size);
            for (int c = 0; c < size && a.gate && a.up; ++c) value[r][c] *= rise[r][c];
            for (int c = 0; c < size; ++c) {
                if (a.mask && !a.mask[r * a.mask_stride + neuron[c]]) value[r][c] = 0.0f;
                else if (a.given) value[r][c] *= widen(*at<T>(a.given, r * a.given_stride + neuron[c]));
            }
        }
        for (int g = 0, c = 0; g < groups; c = ends[g++]) {
            Group group;
            for (int k = c; k < ends[g]; ++k) group.column[group.count++] = quants_at(down, neuron[k]);
            for (int k = ends[g]; k < size; ++k) group.follow(quants_at(down, neuron[k]));
            for (int64_t k = end; k < share.end && k < end + 4 && g + 1 == groups; ++k) {
                if (a.gate) group.follow(quants_at(gate, kept ? kept[k] : k));
                if (a.up) group.follow(quants_at(up, kept ? kept[k] : k));
            }
            for (int64_t r = 0; r < a.rows; ++r) {
                float own[kBlock], scale;
                int8_t v[kBlock];
                for (int k = 0; k < kBlock; ++k) own[k] = k < group.count ? value[r][c + k] : 0.0f;
                quantise_block(own, v, &scale);
                add_group(down.kind, group, v, scale, scales(c), sums + r * round_up(a.d_out), a.d_out, r == 0);
            }
        }
        read += size * (neuron_bytes + bias_bytes) + groups * 2 * a.d_out;
    }
    return read;
}

template <class T>
int64_t block_rows_part(const LinearArgs &a, const Blocks &w) {
    Arena arena(Rounded::room(a.rows, a.n) + 5 * a.q + 8 * a.threads);
    const Rounded x = Rounded::take(arena, a.rows, a.n);
    int32_t *kept = arena.take<int32_t>(a.q);
    uint8_t *any = arena.take<uint8_t>(a.q);
    int64_t *bytes = arena.take<int64_t>(a.threads);
    fill_rows<T>(x, a.x, a.x_stride, a.rows, a.n);
    if (a.mask)
        for (int64_t i = 0; i < a.rows * a.q; ++i) static_cast<T *>(a.out)[i] = T{};
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.q, any, kept);
    auto work = [&](const moyu::Team &team) { bytes[team.thread] = block_rows_share<T>(a, w, x, kept, count, team); };
    return total_of(bytes, a.threads, threads_for(count * row_bytes(w.kind, a.n), count, a.threads), work);
}

template <class T>
int64_t block_columns_part(const LinearArgs &a, const Blocks &w) {
    const int64_t sums_size = a.rows * round_up(a.q);
    Arena arena(4 * (a.threads * sums_size + a.n) + a.n + 8 * a.threads);
    float *sums = arena.take<float>(a.threads * sums_size);
    int32_t *kept = arena.take<int32_t>(a.n);
    uint8_t *any = arena.take<uint8_t>(a.n);
    int64_t *bytes = arena.take<int64_t>(a.threads);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.n, any, kept);
    auto work = [&](const moyu::Team &team) {
        float *own = sums + team.thread * sums_size;
        clear(own, a.rows, a.q);
        bytes[team.thread] = block_columns_share<T>(a, w, kept, count, team, own);
        team.wait();
        bytes[team.thread] +=
            write_sums<T, false>(sums, team.threads, a.rows, a.q, a.bias, static_cast<T *>(a.out), team);
    };
    return total_of(bytes, a.threads, threads_for(count * column_bytes(w.kind, a.q), count, a.threads), work);
}

template <class T, int64_t (*part)(const LinearArgs &, const Blocks &)>
int64_t block_linear(const LinearArgs &all, const Blocks &w) {
    int64_t bytes = 0;
    for (int64_t row = 0; row < all.rows; row += kRowBlock) bytes += part(rows_of<T>(all, row), w);
    return bytes;
}

template <class T>
int64_t block_neurons_part(const NeuronsArgs &a, const Blocks &gate, const Blocks &up, const Blocks &down) {
    const int64_t sums_size = a.rows * round_up(a.d_out);
    Arena arena(Rounded::room(a.rows, a.d) + 4 * (a.threads * sums_size + a.f) + a.f + 8 * a.threads);
    const Rounded x = Rounded::take(arena, a.rows, a.d);
    float *sums = arena.take<float>(a.threads * sums_size);
    int32_t *kept = arena.take<int32_t>(a.f);
    uint8_t *any = arena.take<uint8_t>(a.f);
    int64_t *bytes = arena.take<int64_t>(a.threads);
    fill_rows<T>(x, a.x, a.x_stride, a.rows, a.d);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.f, any, kept);
    auto work = [&](const moyu::Team &team) {
        bytes[team.thread] =
            block_neurons_share<T>(a, gate, up, down, x, kept, count, team, sums + team.thread * sums_size);
        team.wait();
        bytes[team.thread] +=
            write_sums<T, false>(sums, team.threads, a.rows, a.d_out, a.down_bias, static_cast<T *>(a.out), team);
    };
    return total_of(bytes, a.threads, threads_for(count * column_bytes(down.kind, a.d_out), count, a.threads), work);
}

template <class T>
int64_t block_neurons(const NeuronsArgs &all, const Blocks &gate, const Blocks &up, const Blocks &down) {
    int64_t bytes = 0;
    for (int64_t row = 0; row < all.rows; row += kRowBlock)
        bytes += block_neurons_part<T>(rows_of<T>(all, row), gate, up, down);
    return bytes;
}

}  // namespace
