// Arrays out of the calling thread's scratch memory.
#pragma once

#include "core/kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

constexpr int64_t kLineBytes = 64;

// On functions of which there is one for each weight format: a copy at each place that calls them would take minutes to compile.
#if defined(__GNUC__) || defined(__clang__)
#define MOYU_ONCE __attribute__((noinline))
#else
#define MOYU_ONCE
#endif

#if !defined(NDEBUG) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

// Gives out one array after the other, each on its own cache lines. A function that takes its arrays from an arena runs
// twice (see in_scratch): first on an arena without memory, which adds up the bytes, then on one that has so many. Debug
// and sanitizer builds check the bound, and AddressSanitizer finds accesses to the line between two arrays.
class Arena {
  public:
    Arena() = default;  // measures; its arrays are null
    explicit Arena(int64_t bytes) : memory(static_cast<char *>(moyu::scratch(bytes))), room(bytes) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(memory, static_cast<size_t>(bytes));
#endif
    }
    template <class T>
    T *take(int64_t count) {
        if (kChecked && count < 0) moyu::fail("an array of fewer than 0 elements");
        char *array = memory == nullptr ? nullptr : memory + used;
        used += (count * static_cast<int64_t>(sizeof(T)) + kLineBytes - 1) / kLineBytes * kLineBytes;
        if (kChecked) used += kLineBytes;
        if (kChecked && memory != nullptr && used > room) moyu::fail("the scratch memory is smaller than what is taken from it");
#if defined(__SANITIZE_ADDRESS__)
        if (memory != nullptr) __asan_poison_memory_region(memory + used - kLineBytes, kLineBytes);
#endif
        return reinterpret_cast<T *>(array);
    }
    int64_t bytes() const { return used; }

  private:
    char *memory = nullptr;
    int64_t used = 0, room = 0;
};

// lay_out(arena) takes arrays and keeps them. It may not read or write them: the first time they are null.
template <class F>
void in_scratch(F lay_out) {
    Arena measured;
    lay_out(measured);
    Arena arena(measured.bytes());
    lay_out(arena);
}

}  // namespace
