// Threads and scratch memory, in one unit so that only this one meets OpenMP.
//
// OpenMP on purpose: torch has loaded libgomp by the time we are, we get the same copy (same SONAME), and so share its
// workers, which spin for a while after each torch op. A pool of our own would have to compete with them for the cores.
#include "core/kernels.h"

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
#else
#include <vector>
#endif

namespace moyu {

// Threads count up to a multiple of their number. They spin for a while (some µs: what they wait for is short), then let
// others have the core, because on a shared machine the last one may be waiting for it.
struct alignas(64) Barrier {
    std::atomic<int64_t> arrived{0};
};

void Team::wait() const {
    if (threads <= 1) return;
    const int64_t target = (barrier->arrived.fetch_add(1, std::memory_order_acq_rel) / threads + 1) * threads;
    for (int spins = 0; barrier->arrived.load(std::memory_order_acquire) < target; ++spins) {
        if (spins < 10000) {
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#endif
        } else {
            std::this_thread::yield();
        }
    }
}

void parallel(int64_t threads, void (*fn)(const Team &, void *), void *context) {
    Barrier barrier;
    if (threads <= 1) {
        fn(Team{0, 1, &barrier}, context);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads))
    fn(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier}, context);
#else
    std::vector<std::thread> members;
    for (int64_t thread = 1; thread < threads; ++thread) members.emplace_back(fn, Team{thread, threads, &barrier}, context);
    fn(Team{0, threads, &barrier}, context);
    for (auto &member : members) member.join();
#endif
}

namespace {
constexpr std::align_val_t kLine{64};
struct Buffer {
    void *memory = nullptr;
    int64_t bytes = 0;
    void release() {
        if (memory != nullptr) ::operator delete(memory, kLine);
        memory = nullptr;
        bytes = 0;
    }
    ~Buffer() { release(); }
};
thread_local Buffer buffer;
}  // namespace

void fail(const char *what) {
    std::fprintf(stderr, "moyu.kernels._cpu: %s\n", what);
    std::abort();
}

void *scratch(int64_t bytes) {
    if (bytes > buffer.bytes) {
        buffer.release();
        buffer.memory = ::operator new(static_cast<size_t>(bytes), kLine);
        buffer.bytes = bytes;
    }
    return buffer.memory;
}

}  // namespace moyu
