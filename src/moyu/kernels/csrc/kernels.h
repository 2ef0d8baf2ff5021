// What the module and the per-instruction-set translation units share: arguments, tables, threads, scratch memory.
// Those units are compiled with instructions that the machine may not have, so nothing here may be an inline function
// of external linkage (the linker would keep one copy, possibly the AVX-512 one, for all): declarations and data only.
#pragma once

#include <cstdint>

namespace moyu {

enum class Act : int { relu, relu2, silu, gelu, gelu_tanh, quick_gelu, identity };
enum class Dtype : int { fp32, bf16, fp16 };

// Strides are in elements and step from one piece (row, column, neuron) to the next; inside a piece they are 1.
struct NeuronsArgs {
    int64_t rows, d, f, d_out, threads;
    Act act;
    const void *x;           // (rows, d)
    int64_t x_stride;
    const void *gate;        // (f, d) or null
    int64_t gate_stride;
    const void *up;          // (f, d) or null
    int64_t up_stride;
    const void *down;        // (d_out, f), a column contiguous
    int64_t down_stride;
    const uint8_t *mask;     // (rows, f)
    int64_t mask_stride;
    const void *gate_bias, *up_bias, *down_bias;  // (f,) (f,) (d_out,) or null
    const void *given;       // (rows, f) or null
    int64_t given_stride;
    void *out;               // (rows, d_out), contiguous
};

struct LinearArgs {          // both `rows` and `columns`
    int64_t rows, n, q, threads;
    const void *x;           // (rows, n)
    int64_t x_stride;
    const void *weight;      // (q, n), a row contiguous for `rows`, a column for `columns`
    int64_t weight_stride;
    const uint8_t *mask;     // (rows, q) for `rows`, (rows, n) for `columns`; null = all
    int64_t mask_stride;
    const void *bias;        // (q,) or null
    void *out;               // (rows, q), contiguous
};

// Each returns the bytes of weights and biases that it read. The arrays are indexed by Dtype.
struct Table {
    const char *isa;
    int64_t (*neurons[3])(const NeuronsArgs &);
    int64_t (*rows[3])(const LinearArgs &);
    int64_t (*columns[3])(const LinearArgs &);
    uint64_t (*read)(const void *data, int64_t bytes, int loop, int64_t threads);
};
constexpr int kReadLoops = 5;

const Table *avx512bf16_table();  // null where it was not compiled in
const Table *avx512_table();
const Table *avx2_table();
const Table *portable_table();

// Threads that work on one thing. wait() returns when all of them have called it.
struct Barrier;
struct Team {
    int64_t thread, threads;
    Barrier *barrier;
    void wait() const;
};

// Calls fn on a team of at most `threads` (fewer inside somebody else's parallel region) and returns when all are done.
void parallel(int64_t threads, void (*fn)(const Team &team, void *context), void *context);

// Memory of the calling thread, 64-byte aligned, kept between calls; valid until its next call.
void *scratch(int64_t bytes);

}  // namespace moyu
