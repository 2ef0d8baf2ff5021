// y = sum over kept neurons of value_j * down[:, j].
#pragma once

#include "activations.h"
#include "pieces.h"

namespace {

// sums (rows, padded d_out) = the kept neurons that are this thread's; x as load_rows leaves it. Returns the bytes read.
template <class T>
int64_t neurons_share(const NeuronsArgs &a, const Factor<T> *x, const int32_t *kept, int64_t count,
                      const moyu::Team &team, float *sums) {
    const int64_t parts = (a.gate ? 1 : 0) + (a.up ? 1 : 0);
    const int64_t neuron_bytes = (parts * a.d + a.d_out) * static_cast<int64_t>(sizeof(T));
    const int64_t bias_bytes = ((a.gate_bias ? 1 : 0) + (a.up_bias ? 1 : 0)) * static_cast<int64_t>(sizeof(T));

    // The prefetch goes the way of the arithmetic: gate, up, down, the next step's gate. Where the parts are too short for
    // that, it goes to the same part of a later neuron instead.
    const Part gate{a.gate, a.gate_stride}, up{a.up, a.up_stride}, down{a.down, a.down_stride};
    const bool chained = (a.d < a.d_out ? a.d : a.d_out) * static_cast<int64_t>(sizeof(T)) >= kAheadBytes;
    const int64_t hop = chained ? 1 : Taken::hop(neuron_bytes);
    const int streams = together(a.d * static_cast<int64_t>(sizeof(T)), a.mask && a.rows > kFewRows);

    const Share share(count, team);
    clear(sums, a.rows, a.d_out);
    float g[kRowBlock][kTogether] = {}, u[kRowBlock][kTogether] = {};
    int64_t read = 0;
    // Part by part and not row by row: the pieces of one part and a row of x fit in L1, whole neurons do not.
    for (int64_t step = 0; step < Taken::steps(share, streams); ++step) {
        const Taken taken(kept, share, streams, step, hop);
        const Takers takers(taken, a.mask, a.mask_stride, a.rows);
        auto weights = [&](const Part &part, const Part &after, const int64_t *after_pieces) {
            return [&, after_pieces](int64_t r) {
                return chained ? Weights<T>(taken, takers.which[r], takers.own[r], part, after, after_pieces)
                               : Weights<T>(taken, takers.which[r], takers.own[r], part, part, taken.next);
            };
        };
        auto add_bias = [&](int64_t r, const void *bias, float *value) {
            if (bias)
                for (int i = 0; i < takers.own[r]; ++i) value[i] += bias_at<T>(bias, taken.piece[takers.which[r][i]]);
        };
        if (a.gate) {
            project<T>(takers, weights(gate, a.up ? up : down, taken.piece), x, a.rows, a.d, g);
            for (int64_t r = 0; r < a.rows; ++r) {
                add_bias(r, a.gate_bias, g[r]);
                activate<kTogether>(a.act, g[r]);  // here and not later: it runs while up's weights arrive
            }
        }
        if (a.up) {
            project<T>(takers, weights(up, down, taken.piece), x, a.rows, a.d, u);
            for (int64_t r = 0; r < a.rows; ++r) {
                add_bias(r, a.up_bias, u[r]);
                if (!a.gate && !a.given) activate<kTogether>(a.act, u[r]);
            }
        }
        float(*value)[kTogether] = a.gate ? g : u;
        for (int64_t r = 0; r < a.rows; ++r) {
            for (int i = 0; i < kTogether && a.gate && a.up; ++i) value[r][i] *= u[r][i];
            for (int i = 0; i < takers.own[r]; ++i) {
                const int64_t j = taken.piece[takers.which[r][i]];
                if (!takers.keeps(a.mask, a.mask_stride, r, j)) value[r][i] = 0.0f;
                else if (a.given) value[r][i] *= widen(*at<T>(a.given, r * a.given_stride + j));
            }
        }
        accumulate<T>(takers, weights(down, a.gate ? gate : up, taken.next), value, sums, a.rows, a.d_out);
        read += taken.count * (neuron_bytes + bias_bytes);
    }
    return read;
}

template <class T>
int64_t neurons_block(const NeuronsArgs &a) {
    const int64_t sums_size = a.rows * round_up(a.d_out);
    Arena arena(4 * (a.rows * round_up(a.d) + a.threads * sums_size + a.f) + a.f + 8 * a.threads);
    Factor<T> *x = arena.take<Factor<T>>(a.rows * round_up(a.d));
    float *sums = arena.take<float>(a.threads * sums_size);
    int32_t *kept = arena.take<int32_t>(a.f);
    uint8_t *any = arena.take<uint8_t>(a.f);
    int64_t *bytes = arena.take<int64_t>(a.threads);

    load_rows<T>(a.x, a.x_stride, a.rows, a.d, x);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.f, any, kept);
    auto work = [&](const moyu::Team &team) {
        bytes[team.thread] = neurons_share<T>(a, x, kept, count, team, sums + team.thread * sums_size);
        team.wait();
        bytes[team.thread] +=
            write_sums<T>(sums, team.threads, a.rows, a.d_out, a.down_bias, static_cast<T *>(a.out), team);
    };
    const int64_t parts = (a.gate ? 1 : 0) + (a.up ? 1 : 0);
    const int64_t work_bytes = count * (parts * a.d + a.d_out) * static_cast<int64_t>(sizeof(T));
    return total_of(bytes, a.threads, threads_for(work_bytes, count, a.threads), work);
}

template <class T>
int64_t neurons(const NeuronsArgs &all) {
    int64_t bytes = 0;
    for (int64_t row = 0; row < all.rows; row += kRowBlock) bytes += neurons_block<T>(rows_of<T>(all, row));
    return bytes;
}

}  // namespace
