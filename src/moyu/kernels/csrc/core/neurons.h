// y = sum over kept neurons of value_j * down[:, j], for plain weights.
#pragma once

#include "core/activations.h"
#include "core/products.h"
#include "core/sums.h"

namespace {

// The width of x: gate or up is there.
inline int64_t inputs_of(const NeuronsArgs &a) { return a.gate.address ? a.gate.inputs : a.up.inputs; }

// sums (rows, padded d_out) = the kept neurons that are this thread's; x as load_rows leaves it. Returns the bytes read.
template <class T>
int64_t neurons_share(const NeuronsArgs &a, const Factor<T> *x, const int32_t *kept, int64_t count,
                      const moyu::Team &team, float *sums) {
    const Weight gate = a.gate, up = a.up, down = a.down;  // copies, which no store can change: 1.5 % faster
    const bool has_gate = gate.address != nullptr, has_up = up.address != nullptr;
    const int64_t d = inputs_of(a), d_out = down.outputs;
    const int64_t neuron_bytes = bytes_of<T>((has_gate + has_up) * d + d_out);
    const int64_t bias_bytes = bytes_of<T>((a.gate_bias ? 1 : 0) + (a.up_bias ? 1 : 0));

    // The prefetch goes the way of the arithmetic: gate, up, down, the next step's gate. Where the parts are too short for
    // that, it goes to the same part of a later neuron instead.
    const bool chained = bytes_of<T>(d < d_out ? d : d_out) >= kAheadBytes;
    const int64_t hop = chained ? 1 : Taken::hop(neuron_bytes);
    const int streams = together(bytes_of<T>(d), a.mask && a.rows > kFewRows);

    const Share share(count, team);
    clear(sums, a.rows, d_out);
    float g[kMostRows][kTogether] = {}, u[kMostRows][kTogether] = {};
    int64_t read = 0;
    // Part by part and not row by row: the pieces of one part and a row of x fit in L1, whole neurons do not.
    for (int64_t step = 0; step < Taken::steps(share, streams); ++step) {
        const Taken taken(kept, share, streams, step, hop);
        const Takers takers(taken, a.mask, a.mask_stride, a.rows);
        auto weights = [&](const Weight &weight, const Weight &after, const int64_t *after_pieces) {
            return [&, after_pieces](int64_t r) {
                return chained ? Pieces<T>(taken, takers.which[r], takers.own[r], weight, after, after_pieces)
                               : Pieces<T>(taken, takers.which[r], takers.own[r], weight, weight, taken.next);
            };
        };
        auto add_bias = [&](int64_t r, const void *bias, float *value) {
            if (bias)
                for (int i = 0; i < takers.own[r]; ++i) value[i] += bias_at<T>(bias, taken.piece[takers.which[r][i]]);
        };
        if (has_gate) {
            project<T>(takers, weights(gate, has_up ? up : down, taken.piece), x, a.rows, d, g);
            for (int64_t r = 0; r < a.rows; ++r) {
                add_bias(r, a.gate_bias, g[r]);
                activate<kTogether>(a.act, g[r]);  // here and not later: it runs while up's weights arrive
            }
        }
        if (has_up) {
            project<T>(takers, weights(up, down, taken.piece), x, a.rows, d, u);
            for (int64_t r = 0; r < a.rows; ++r) {
                add_bias(r, a.up_bias, u[r]);
                if (!has_gate && !a.given) activate<kTogether>(a.act, u[r]);
            }
        }
        float(*value)[kTogether] = has_gate ? g : u;
        for (int64_t r = 0; r < a.rows; ++r) {
            for (int i = 0; i < kTogether && has_gate && has_up; ++i) value[r][i] *= u[r][i];
            for (int i = 0; i < takers.own[r]; ++i) {
                const int64_t j = taken.piece[takers.which[r][i]];
                if (!takers.keeps(a.mask, a.mask_stride, r, j)) value[r][i] = 0.0f;
                else if (a.given) value[r][i] *= widen(*at<T>(a.given, r * a.given_stride + j));
            }
        }
        accumulate<T>(takers, weights(down, has_gate ? gate : up, taken.next), value, sums, a.rows, d_out);
        read += taken.count * (neuron_bytes + bias_bytes);
    }
    return read;
}

template <class T>
int64_t plain_neurons(const NeuronsArgs &a) {
    const int64_t d = inputs_of(a), f = a.down.inputs, d_out = a.down.outputs, sums_size = a.rows * round_up(d_out);
    Factor<T> *x;
    float *sums;
    int32_t *kept;
    uint8_t *any;
    int64_t *bytes;
    in_scratch([&](Arena &arena) {
        x = arena.take<Factor<T>>(a.rows * round_up(d));
        sums = arena.take<float>(a.threads * sums_size);
        kept = arena.take<int32_t>(f);
        any = arena.take<uint8_t>(f);
        bytes = arena.take<int64_t>(a.threads);
    });
    load_rows<T>(a.x, a.x_stride, a.rows, d, x);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, f, any, kept);
    auto work = [&](const moyu::Team &team) {
        bytes[team.thread] = neurons_share<T>(a, x, kept, count, team, sums + team.thread * sums_size);
        team.wait();
        bytes[team.thread] += write_sums<T>(sums, team.threads, a.rows, d_out, a.down_bias, static_cast<T *>(a.out), team);
    };
    const int64_t parts = (a.gate.address ? 1 : 0) + (a.up.address ? 1 : 0);
    return total_of(bytes, a.threads, threads_for(count * bytes_of<T>(parts * d + d_out), count, a.threads), work);
}

}  // namespace
