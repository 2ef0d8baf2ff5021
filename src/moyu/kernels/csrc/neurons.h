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

constexpr int64_t kNeuronWindow = 24576;  // two neurons of 3 x 2048 bf16: the best of 1, 2, 3 and 4 in trials

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
    int64_t threads = threads_for(count * neuron_bytes, count, a.threads);
    const int64_t ahead = pieces_ahead(XW(kNeuronWindow), neuron_bytes);

    auto work = [&](int64_t thread) {
        const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
        float *y = sums + thread * sums_size;
        for (int64_t i = 0; i < sums_size; ++i) y[i] = 0.0f;
        int rows[kRowBlock];
        float gate[kRowBlock], up[kRowBlock], value[kRowBlock];
        int64_t read = 0;
        for (int64_t t = begin; t < end; ++t) {
            const int64_t j = kept[t], next = kept[t + ahead < end ? t + ahead : end - 1];
            const int m = rows_keeping(a.mask, a.mask_stride, a.rows, j, rows);
            if (a.gate) dots(at<T>(a.gate, j * a.gate_stride), x, rows, m, a.d, at<T>(a.gate, next * a.gate_stride), gate);
            if (a.up) dots(at<T>(a.up, j * a.up_stride), x, rows, m, a.d, at<T>(a.up, next * a.up_stride), up);
            const float gate_bias = bias_at<T>(a.gate_bias, j), up_bias = bias_at<T>(a.up_bias, j);
            for (int r = 0; r < m; ++r) {
                const float g = gate[r] + gate_bias, u = up[r] + up_bias;
                if (a.given) {
                    const float given = widen(*at<T>(a.given, rows[r] * a.given_stride + j));
                    value[r] = a.gate ? activate(a.act, g) * given : given * u;
                } else {
                    value[r] = a.gate ? activate(a.act, g) * u : activate(a.act, u);
                }
            }
            axpys(at<T>(a.down, j * a.down_stride), value, y, rows, m, a.d_out, at<T>(a.down, next * a.down_stride));
            read += neuron_bytes + bias_bytes;
        }
        bytes[thread] = read;
    };
    if (threads < 1) threads = 1;
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
