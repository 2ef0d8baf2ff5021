// Parted weights (core/parted.h) of which only some rows are read with all bits: all rows are multiplied with their first bits, and the
// further ones are added for the rows that a mask keeps, or that come close to the largest product.
#pragma once

#include "core/grouped.h"

namespace {

// to[0 .. inputs) = row i of a parted weight; `first`: what its first bits alone stand for.
MOYU_ONCE void widen_parted(const Weight &w, int64_t i, bool first, float *to) {
    with_parts(w.format, [&](auto f) {
        using F = decltype(f);
        using P = Parted<F>;
        const int64_t groups = groups_of(w.inputs);
        const auto fields = F::Scales::of_row(scales_of(w, i), groups);
        const uint8_t *high = first_of(w, i), *low = piece_of(w, i);
        constexpr int size = kGroup / F::Scales::halves;
        for (int64_t part = 0; part * size < w.inputs; ++part) {
            const auto own = F::Scales::at(fields, part / (F::Scales::halves * F::Scales::span), part);
            for (int64_t k = part * size; k < (part + 1) * size && k < w.inputs; ++k) {
                const int code = code_at<P::first>(high, k, groups) << P::further;
                const float level = first ? static_cast<float>(code - F::zero) + F::middle
                                          : static_cast<float>((code | code_at<P::further>(low, k, groups)) - F::zero);
                to[k] = own.scale * level + own.offset;
            }
        }
    });
}

// out[r * stride + c] = what the first (or the further) bits of row c of lines give for row r of x.
template <bool First>
MOYU_ONCE void dot_parts(const Weight &w, const Lines &lines, const Rounded &x, int64_t rows, float *out, int64_t stride) {
    with_parts(w.format, [&](auto f) {
        using P = Parted<decltype(f)>;
        using F = std::conditional_t<First, typename P::First, typename P::Further>;
        dot_lines<F>(lines, x, rows, groups_of(w.inputs), out, stride);
    });
}

// y (rows, stride): what the first bits of the rows of `share` give, with the bias.
template <class T>
void first_parts(const Weight &w, const void *bias, const Rounded &x, int64_t rows, const Share &share, float *y, int64_t stride) {
    const int64_t hop = Taken::hop(part_bytes(w).first);
    const int together = lines_beside(rows);
    for (int64_t step = 0; step < Taken::steps(share, together); ++step) {
        const Taken taken(nullptr, share, together, step, hop);
        Lines lines;
        for (int c = 0; c < taken.count; ++c)
            lines.add(first_of(w, taken.piece[c]), scales_of(w, taken.piece[c]), first_of(w, taken.next[c]));
        float value[kMostRows][kMostPieces];
        dot_parts<true>(w, lines, x, rows, value[0], kMostPieces);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < lines.count; ++c) y[r * stride + taken.piece[c]] = value[r][c] + bias_at<T>(bias, taken.piece[c]);
    }
}

// y += what the further bits of some rows of the weight give, of each row of x those that its mask keeps.
inline void further_parts(const Weight &w, const Rounded &x, int64_t rows, const uint8_t *mask, int64_t mask_stride,
                          const int32_t *kept, int64_t count, float *y, int64_t stride) {
    for (int64_t i = 0; i < count; i += 4) {
        Lines lines;
        const int here = static_cast<int>(count - i < 4 ? count - i : 4);
        for (int c = 0; c < here; ++c) lines.add(piece_of(w, kept[i + c]), scales_of(w, kept[i + c]), piece_of(w, kept[i + 4 + c < count ? i + 4 + c : i + c]));
        float value[kMostRows][kTogether];
        dot_parts<false>(w, lines, x, rows, value[0], kTogether);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < here; ++c)
                if (mask[r * mask_stride + kept[i + c]]) y[r * stride + kept[i + c]] += value[r][c];
    }
}

template <class T>
int64_t grouped_words(const LinearArgs &a) {
    if (a.mask == nullptr) return grouped_rows<T>(a);
    const Weight &w = a.weight;
    const int64_t q = w.outputs, stride = round_up(q);
    Rounded x;
    float *y;
    int32_t *kept;
    uint8_t *any;
    in_scratch([&](Arena &arena) {
        x = Rounded::take(arena, a.rows, w.inputs);
        y = arena.take<float>(a.rows * stride);
        kept = arena.take<int32_t>(q);
        any = arena.take<uint8_t>(q);
    });
    fill_rows<T>(x, a.x, a.x_stride, a.rows, w.inputs);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, q, any, kept);
    const PartBytes bytes = part_bytes(w);
    auto work = [&](const moyu::Team &team) {
        const Share own(q, team), further(count, team);
        first_parts<T>(w, a.bias, x, a.rows, own, y, stride);
        team.wait();
        further_parts(w, x, a.rows, a.mask, a.mask_stride, kept + further.begin, further.end - further.begin, y, stride);
        team.wait();
        for (int64_t r = 0; r < a.rows; ++r)
            for (int64_t o = own.begin; o < own.end; ++o) narrow(y[r * stride + o], static_cast<T *>(a.out)[r * q + o]);
    };
    run_parallel(threads_for(q * bytes.first, q, a.threads), work);
    return q * (bytes.first + (a.bias ? bytes_of<T>(1) : 0)) + count * bytes.further;
}

// The values of a thread's rows of a parted weight.
template <class T>
void values_of_parts(const ValuesArgs &a, const moyu::Team &team, float *row) {
    const Share share(a.weight.outputs, team);
    T *out = static_cast<T *>(a.out);
    for (int64_t i = share.begin; i < share.end; ++i) {
        widen_parted(a.weight, i, a.first, row);
        for (int64_t k = 0; k < a.weight.inputs; ++k) narrow(row[k], out[i * a.weight.inputs + k]);
    }
}

}  // namespace
