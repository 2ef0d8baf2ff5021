// Loops that only read, to measure the ceiling that the kernels are held against. Which one is best differs by machine,
// so there are several: plain streaming, streaming with prefetch at two distances, and 2 or 4 streams a thread.
#pragma once

#include "core/pieces.h"

namespace {

template <int Streams, int64_t Distance>
float read_streams(const float *p, int64_t count) {
    constexpr int W = Vec::width, U = 4;
    const int64_t length = count / Streams / (U * W) * (U * W);
    typename Vec::Reg sum[U];
    for (int u = 0; u < U; ++u) sum[u] = Vec::zero();
    for (int64_t i = 0; i < length; i += U * W)
        for (int s = 0; s < Streams; ++s) {
            const float *q = p + s * length + i;
            if (Distance) prefetch<U * W * sizeof(float)>(q + Distance / static_cast<int64_t>(sizeof(float)));
            for (int u = 0; u < U; ++u) sum[u] = Vec::add(sum[u], Vec::load(q + u * W));
        }
    return Vec::sum(Vec::add(Vec::add(sum[0], sum[1]), Vec::add(sum[2], sum[3])));
}

uint64_t read(const void *data, int64_t bytes, int loop, int64_t threads) {
    static float (*const loops[moyu::kReadLoops])(const float *, int64_t) = {
        read_streams<1, 0>, read_streams<1, 4096>, read_streams<1, 16384>, read_streams<2, 0>, read_streams<4, 0>};
    const int64_t count = bytes / static_cast<int64_t>(sizeof(float)) / threads / 16 * 16;
    int64_t total = 0;
    float *sums;
    in_scratch([&](Arena &arena) { sums = arena.take<float>(threads * 16); });
    for (int64_t t = 0; t < threads; ++t) sums[t * 16] = 0.0f;
    auto work = [&](const moyu::Team &team) {
        for (int64_t part = team.thread; part < threads; part += team.threads)
            sums[part * 16] = loops[loop](at<float>(data, part * count), count);
    };
    run_parallel(threads, work);
    for (int64_t t = 0; t < threads; ++t) total += to_bits(sums[t * 16]);  // keeps the loads alive
    return static_cast<uint64_t>(total);
}

}  // namespace
