// y = sum over kept neurons of value_j * down[:, j].
#pragma once

#include <math.h>

#include "pieces.h"

namespace {

using moyu::Act;

// The C functions, not std::exp: that one is an inline function (see kernels.h). NaN goes through everywhere.
inline float activate(Act act, float z) {
    switch (act) {
        case Act::relu: return z < 0.0f ? 0.0f : z;
        case Act::relu2: return z < 0.0f ? 0.0f : z * z;
        case Act::silu: return z / (1.0f + expf(-z));
        case Act::gelu: return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
        case Act::gelu_tanh: return 0.5f * z * (1.0f + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
        case Act::quick_gelu: return z / (1.0f + expf(-1.702f * z));
        case Act::identity: return z;
    }
    return z;
}

template <class T>
int64_t neurons_block(const NeuronsArgs &a) {
    const int64_t parts = (a.gate ? 1 : 0) + (a.up ? 1 : 0);
    const int64_t neuron_bytes = (parts * a.d + a.d_out) * static_cast<int64_t>(sizeof(T));
    const int64_t bias_bytes = ((a.gate_bias ? 1 : 0) + (a.up_bias ? 1 : 0)) * static_cast<int64_t>(sizeof(T));
    const int64_t sums_size = a.rows * round_up(a.d_out);

    Arena arena(4 * (a.rows * round_up(a.d) + a.threads * sums_size + a.f) + a.f + 8 * a.threads);
    float *x = arena.take<float>(a.rows * round_up(a.d));
    float *sums = arena.take<float>(a.threads * sums_size);
    int32_t *kept = arena.take<int32_t>(a.f);
    uint8_t *any = arena.take<uint8_t>(a.f);
    int64_t *bytes = arena.take<int64_t>(a.threads);

    load_rows<T>(a.x, a.x_stride, a.rows, a.d, x);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.f, any, kept);
    const int64_t threads = threads_for(count * neuron_bytes, count, a.threads);

    // The prefetch runs from gate to up to down to the next neuron's first part, in neuron_major layout a straight
    // line. Parts shorter than its distance prefetch the same part of a later neuron instead.
    struct Part { const void *weight; int64_t stride; };
    const Part gate_part{a.gate, a.gate_stride}, up_part{a.up, a.up_stride}, down_part{a.down, a.down_stride};
    const bool chained = (a.d < a.d_out ? a.d : a.d_out) * static_cast<int64_t>(sizeof(T)) >= kAheadBytes;
    const int64_t hop = Taken::hop(neuron_bytes);
    auto weights = [&](const Part &part, const Taken &taken, const int *which, int own) {
        const bool last = part.weight == a.down;
        const Part &after = !chained ? part : last ? (a.gate ? gate_part : up_part)
                            : part.weight == a.gate && a.up ? up_part : down_part;
        return Weights<T>(taken, which, own, part.weight, part.stride, after.weight, after.stride, last || !chained);
    };

    auto work = [&](int64_t thread) {
        const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
        float *y = sums + thread * sums_size;
        for (int64_t i = 0; i < sums_size; ++i) y[i] = 0.0f;
        int which[kRowBlock][kTogether], own[kRowBlock];
        float gate[kRowBlock][kTogether], up[kRowBlock][kTogether];
        int64_t read = 0;
        // Part by part and not row by row: 4 pieces of one part and a row of x fit in L1, 4 whole neurons do not.
        for (int64_t step = 0; step < Taken::steps(begin, end); ++step) {
            const Taken taken(kept, begin, end, step, hop);
            for (int64_t r = 0; r < a.rows; ++r) {
                own[r] = taken.kept_by(a.rows == 1 ? nullptr : a.mask + r * a.mask_stride, which[r]);
                if (a.gate) project(weights(gate_part, taken, which[r], own[r]), x, r, a.d, gate[r]);
            }
            if (a.up)
                for (int64_t r = 0; r < a.rows; ++r)
                    project(weights(up_part, taken, which[r], own[r]), x, r, a.d, up[r]);
            for (int64_t r = 0; r < a.rows; ++r) {
                float value[kTogether];
                for (int i = 0; i < own[r]; ++i) {
                    const int64_t j = taken.piece[which[r][i]];
                    const float g = a.gate ? gate[r][i] + bias_at<T>(a.gate_bias, j) : 0.0f;
                    const float u = a.up ? up[r][i] + bias_at<T>(a.up_bias, j) : 0.0f;
                    if (a.given) {
                        const float given = widen(*at<T>(a.given, r * a.given_stride + j));
                        value[i] = a.gate ? activate(a.act, g) * given : given * u;
                    } else {
                        value[i] = a.gate ? activate(a.act, g) * u : activate(a.act, u);
                    }
                }
                accumulate(weights(down_part, taken, which[r], own[r]), value, y, r, a.d_out);
            }
            read += taken.count * (neuron_bytes + bias_bytes);
        }
        bytes[thread] = read;
    };
    run_parallel(threads, work);

    int64_t total = write_sums<T>(sums, threads, a.rows, a.d_out, a.down_bias, static_cast<T *>(a.out));
    for (int64_t t = 0; t < threads; ++t) total += bytes[t];
    return total;
}

template <class T>
int64_t neurons(const NeuronsArgs &all) {
    int64_t bytes = 0;
    for (int64_t row = 0; row < all.rows; row += kRowBlock) {
        NeuronsArgs a = all;
        a.rows = all.rows - row < kRowBlock ? all.rows - row : kRowBlock;
        a.x = at<T>(all.x, row * all.x_stride);
        a.mask = all.mask + row * all.mask_stride;
        if (all.given) a.given = at<T>(all.given, row * all.given_stride);
        a.out = static_cast<T *>(all.out) + row * all.d_out;
        bytes += neurons_block<T>(a);
    }
    return bytes;
}

}  // namespace
