// Threads and scratch memory, in one unit so that only this one meets OpenMP.
//
// OpenMP on purpose: torch has loaded libgomp by the time we are, we get the same copy (same SONAME), and so share its
// workers, which spin for a while after each torch op. A pool of our own would have to compete with them for the cores.
#include "kernels.h"

#include <cstddef>
#include <new>
#ifndef _OPENMP
#include <thread>
#include <vector>
#endif

namespace moyu {

void parallel(int64_t threads, void (*fn)(int64_t, void *), void *context) {
    if (threads <= 1) {
        fn(0, context);
        return;
    }
#ifdef _OPENMP
    // A loop and not thread numbers: inside someone else's parallel region the team may have fewer threads than asked.
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static, 1)
    for (int64_t thread = 0; thread < threads; ++thread) fn(thread, context);
#else
    std::vector<std::thread> team;
    for (int64_t thread = 1; thread < threads; ++thread) team.emplace_back(fn, thread, context);
    fn(0, context);
    for (auto &member : team) member.join();
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

void *scratch(int64_t bytes) {
    if (bytes > buffer.bytes) {
        buffer.release();
        buffer.memory = ::operator new(static_cast<size_t>(bytes), kLine);
        buffer.bytes = bytes;
    }
    return buffer.memory;
}

}  // namespace moyu
