// What the module and the per-instruction-set translation units share: arguments, tables, threads, scratch memory.
// Those units are compiled with instructions that the machine may not have, so nothing here may be an inline function
// of external linkage (the linker would keep one copy, possibly the AVX-512 one, for all): declarations and data only.
#pragma once

#include <cstdint>

namespace moyu {

enum class Act : int { relu, relu2, silu, gelu, gelu_tanh, quick_gelu, identity };
enum class Dtype : int { fp32, bf16, fp16 };

// How a weight's numbers are stored: plain (in the Dtype of the call), or one of formats/formats.def.
enum class Format : int {
    plain,
#define X(name, Struct) name,
#include "formats/formats.def"
#undef X
};
constexpr int64_t kMostRows = 32;  // of x that are taken together; weights are read once for them

enum class Order : int { rows, columns, planes, parted };

// A weight (outputs, inputs). By rows, the inputs of an output are contiguous; by columns, the outputs of an input. In planes
// (core/levels.h), the first bits of all codes lie apart from the others, of which those of an input are contiguous. Parted
// (core/words.h), it lies by rows, and the first bits of a row apart from its others.
struct Weight {
    Format format;
    Order order;
    int64_t outputs, inputs;
    const void *address;     // null = no weight
    int64_t stride;          // bytes from one row to the next, or from one column, or from one input's further bits
    const void *scales;      // of a format with groups: those of a row, or of a block of columns (core/scales.h)
    int64_t scales_stride;   // bytes from one row's or block's scales to the next
    const void *first;       // in planes: the first bits, group of inputs by group; parted: those of a row
    int64_t first_stride;    // bytes from one group's, or row's, to the next
};

// Strides of x, masks and `given` are in elements, from one row to the next; inside a row they are 1.
struct NeuronsArgs {
    int64_t rows, threads;
    Act act;
    const void *x;           // (rows, d)
    int64_t x_stride;
    Weight gate, up;         // (f, d) by rows; one of them may be null
    Weight down;             // (d_out, f) by columns
    const uint8_t *mask;     // (rows, f)
    int64_t mask_stride;
    const void *gate_bias, *up_bias, *down_bias;  // (f,) (f,) (d_out,) or null
    const void *given;       // (rows, f) or null
    int64_t given_stride;
    void *out;               // (rows, d_out), contiguous
};

struct LinearArgs {          // `rows` takes a weight by rows, `columns` one by columns, `levels` one in planes, `words` a parted one
    int64_t rows, threads;
    const void *x;           // (rows, inputs)
    int64_t x_stride;
    Weight weight;
    const uint8_t *mask;     // (rows, outputs) for `rows` and `words`, (rows, inputs) for `columns` and `levels`; null = all
    int64_t mask_stride;
    const void *bias;        // (outputs,) or null
    void *out;               // (rows, outputs), contiguous
};

struct ValuesArgs {          // the values of a weight that is not plain
    int64_t threads;
    Weight weight;
    bool first;              // of its first bits alone; not by columns
    void *out;               // (outputs, inputs), contiguous
};

// A decode step of consecutive decoder layers. Nothing here has initialisers (see above): make them with {}.
struct DecodeNorm {          // RMSNorm, or LayerNorm where `centred`
    const void *weight;      // null = none
    const void *bias;
    float eps, plus;         // plus: what is added to the weight, in float; where it is not 0 the norm rounds once, at its end
    bool centred;
};

struct DecodeLinear {
    const void *weight;      // (q, n); a row contiguous, or a column where `by_columns`
    int64_t stride;
    const void *bias;        // (q,) or null
    int64_t n, q;
    bool by_columns;         // skip columns whose |x_i| * factor_i is not above the threshold
    float threshold;
    const void *factor;      // (n,) float or null = 1
    Format kind;             // not plain: `weight` are codes, and strides are bytes
    const void *scales;
    int64_t scales_stride;
    const void *first;       // not null: in planes, all bits of the inputs that `by_columns` would keep are read; or parted
    int64_t first_stride;
    bool parted;             // all bits of the outputs are read that are above the largest one plus the threshold; infinite but of a head
    Weight rest;             // not null: columns that skipped inputs are multiplied with instead, where `by_columns`
};

// How the network skips: each product by columns (or not at all), or whole neurons by a mask that is known before
// (`neurons`), or neurons by what gate or up says once it is computed; down's threshold and factor decide then.
enum class Network : int { separate, neurons, gate_first, up_first };

struct DecodeLayer {
    DecodeNorm before_attention, q_norm, k_norm, after_attention, before_network, after_network;  // each may be absent
    DecodeLinear q, k, v, o, gate, up, down;  // gate.weight null: a plain network
    Network network;
    Act act;
    int64_t heads, kv_heads, head_dim;
    int64_t window;          // a row attends to so many positions, its own included; 0 = all
    int64_t angles;          // which of the step's
    float scale, softcap;    // scores become softcap * tanh(score / softcap); 0 = they do not
};

// Which of n units each row keeps: bytes, 0 = skipped.
struct DecodeLevels {
    const uint8_t *given;    // (rows, n) to replay in place of deciding; null = decide
    int64_t given_row;       // bytes from one row to the next
    uint8_t *taken;          // (rows, n), contiguous: gets what was kept; null = nobody asks
};

// What a layer has from its sequences. Python fills it in as an array of 64-bit integers.
struct DecodeMemory {
    void *keys;              // (sequences, kv_heads, capacity, head_dim), the last two contiguous
    int64_t keys_row, keys_head;
    void *values;
    int64_t values_row, values_head;
    DecodeLevels neurons;    // (rows, f); Network::neurons does not decide: there, `given` null = all
};
static_assert(sizeof(DecodeMemory) == 9 * sizeof(int64_t), "the array of integers that Python fills in");

// The columns that a layer's linears keep, each (rows, its n), where it skips columns. Filled in like DecodeMemory.
struct DecodeColumns {
    DecodeLevels q, k, v, o, gate, up, down;
};
static_assert(sizeof(DecodeColumns) == 21 * sizeof(int64_t), "the array of integers that Python fills in");

// What comes before and after the layers.
struct DecodeEnds {
    DecodeLinear embedding;  // (vocabulary, d), by rows or parted
    DecodeNorm norm;
    DecodeLinear head;       // by rows or parted
    float scale, softcap;    // of the embedding's rows, and of the logits; 0 = none
};

// Of a rotary embedding, each (rows, rotary). Python fills it in as an array of 64-bit integers.
struct DecodeAngles {
    const float *cos, *sin;
};
static_assert(sizeof(DecodeAngles) == 2 * sizeof(int64_t), "the array of integers that Python fills in");

// One step of `rows` tokens, each of a sequence of its own or several of one. Python fills it in; module.cpp checks it.
struct DecodeStep {
    Dtype dtype;
    int64_t rows, threads;
    void *hidden;                  // (rows, d), contiguous, in and out; or null, and from `ids` to `logits`:
    const int64_t *ids;            // (rows,), in [0, vocabulary)
    void *logits;                  // (rows, vocabulary), contiguous, out
    const int64_t *past;           // (rows,): positions that a row's keys and values hold; its new ones come after them
    int64_t capacity;              // positions that there is room for; more than any `past`
    const int64_t *sequences;      // (rows,): whose keys and values a row has; null = its own. Rows of one sequence are next tokens
    int64_t sequences_count;       // of it, in order, and the later ones attend to the earlier ones
    int64_t rotary;                // width of cos and sin, 0 = no rotary embedding
    const DecodeAngles *angles;    // as many as the layers name
    int64_t angles_count, angles_row;  // angles_row: elements from one row's to the next's; 0 = all rows have the same
    const uint8_t *mask;           // (rows, past + 1): which positions a row attends to; null = all
    int64_t mask_row;              // bytes from one row to the next
    const DecodeMemory *memory;    // one a layer
    const DecodeColumns *columns;  // one a layer; null = every linear decides and nobody asks
    DecodeLevels words;            // (rows, vocabulary): of which outputs of a parted head all bits are read
};

struct DecodeArgs : DecodeStep {
    int64_t d, widest;             // widest: the largest n or q of a layer's linears
    const DecodeEnds *ends;        // null = from hidden to hidden
    const DecodeLayer *layers;
    int64_t count;
};
constexpr int kMostThreads = 256;  // of a step

// Each but `values` and `read` returns the bytes of weights and biases that it read. The arrays are indexed by Dtype.
struct Table {
    const char *isa;
    int64_t (*neurons[3])(const NeuronsArgs &);
    int64_t (*rows[3])(const LinearArgs &);
    int64_t (*columns[3])(const LinearArgs &);
    int64_t (*levels[3])(const LinearArgs &);
    int64_t (*words[3])(const LinearArgs &);
    int64_t (*decode[3])(const DecodeArgs &);
    void (*values[3])(const ValuesArgs &);
    uint64_t (*read)(const void *data, int64_t bytes, int loop, int64_t threads);
};
constexpr int kReadLoops = 5;

const Table *avx512bf16_table();  // null where it was not compiled in
const Table *avx512vnni_table();
const Table *avx512_table();
const Table *avxvnni_table();
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

// Prints what is wrong with MOYU's own code and ends the process. What callers can get wrong is refused by module.cpp.
[[noreturn]] void fail(const char *what);

// Memory of the calling thread, 64-byte aligned, kept between calls; valid until its next call.
void *scratch(int64_t bytes);

}  // namespace moyu
