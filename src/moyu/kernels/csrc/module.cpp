// The Python face: chooses the instruction set once, turns integers into arguments, releases the GIL.
// Addresses and strides come as integers, so that the extension is built and linked without torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace moyu;

namespace {

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
// By hand: not every compiler that has the instructions knows their name here.
bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#else
bool has_avx512() { return false; }
bool has_avx512bf16() { return false; }
bool has_avx512vnni() { return false; }
bool has_avx2() { return false; }
bool has_avxvnni() { return false; }
#endif

std::vector<const Table *> usable_tables() {  // best first
    std::vector<const Table *> tables;
    if (avx512bf16_table() != nullptr && has_avx512bf16()) tables.push_back(avx512bf16_table());
    if (avx512vnni_table() != nullptr && has_avx512vnni()) tables.push_back(avx512vnni_table());
    if (avx512_table() != nullptr && has_avx512()) tables.push_back(avx512_table());
    if (avxvnni_table() != nullptr && has_avxvnni()) tables.push_back(avxvnni_table());
    if (avx2_table() != nullptr && has_avx2()) tables.push_back(avx2_table());
    tables.push_back(portable_table());
    return tables;
}

const Table *choose_table() {
    const auto tables = usable_tables();
    const char *asked = std::getenv("MOYU_ISA");
    if (asked == nullptr || *asked == '\0') return tables.front();
    std::string names;
    for (const Table *table : tables) {
        if (table->isa == std::string(asked)) return table;
        names += std::string(names.empty() ? "" : ", ") + table->isa;
    }
    throw std::runtime_error("MOYU_ISA=" + std::string(asked) +
                             " cannot be used here; unset it or set it to one of: " + names);
}

const Table *table = nullptr;

const void *pointer(uintptr_t address) { return reinterpret_cast<const void *>(address); }

int64_t neurons(int dtype, int act, int64_t threads, int64_t rows, int64_t d, int64_t f, int64_t d_out, uintptr_t x,
                int64_t x_stride, uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t down,
                int64_t down_stride, uintptr_t mask, int64_t mask_stride, uintptr_t gate_bias, uintptr_t up_bias,
                uintptr_t down_bias, uintptr_t given, int64_t given_stride, uintptr_t out) {
    const NeuronsArgs args = {rows, d, f, d_out, threads, static_cast<Act>(act), pointer(x), x_stride, pointer(gate),
                              gate_stride, pointer(up), up_stride, pointer(down), down_stride,
                              static_cast<const uint8_t *>(pointer(mask)), mask_stride, pointer(gate_bias),
                              pointer(up_bias), pointer(down_bias), pointer(given), given_stride,
                              reinterpret_cast<void *>(out)};
    return table->neurons[dtype](args);
}

template <bool by_columns>
int64_t multiply(int dtype, int64_t threads, int64_t rows, int64_t n, int64_t q, uintptr_t x, int64_t x_stride,
                 uintptr_t weight, int64_t weight_stride, uintptr_t mask, int64_t mask_stride, uintptr_t bias,
                 uintptr_t out) {
    const LinearArgs args = {rows, n, q, threads, pointer(x), x_stride, pointer(weight), weight_stride,
                             static_cast<const uint8_t *>(pointer(mask)), mask_stride, pointer(bias),
                             reinterpret_cast<void *>(out)};
    return by_columns ? table->columns[dtype](args) : table->rows[dtype](args);
}

int64_t block_neurons(int dtype, int act, int64_t threads, int64_t rows, int64_t d, int64_t f, int64_t d_out, uintptr_t x,
                      int64_t x_stride, const Blocks &gate, const Blocks &up, const Blocks &down, uintptr_t mask,
                      int64_t mask_stride, uintptr_t gate_bias, uintptr_t up_bias, uintptr_t down_bias, uintptr_t given,
                      int64_t given_stride, uintptr_t out) {
    const NeuronsArgs args = {rows, d, f, d_out, threads, static_cast<Act>(act), pointer(x), x_stride, gate.quants,
                              gate.quants_stride, up.quants, up.quants_stride, down.quants, down.quants_stride,
                              static_cast<const uint8_t *>(pointer(mask)), mask_stride, pointer(gate_bias),
                              pointer(up_bias), pointer(down_bias), pointer(given), given_stride,
                              reinterpret_cast<void *>(out)};
    return table->block_neurons[dtype](args, gate, up, down);
}

template <bool by_columns>
int64_t block_multiply(int dtype, int64_t threads, int64_t rows, int64_t n, int64_t q, uintptr_t x, int64_t x_stride,
                       const Blocks &weight, uintptr_t mask, int64_t mask_stride, uintptr_t bias, uintptr_t out) {
    const LinearArgs args = {rows, n, q, threads, pointer(x), x_stride, weight.quants, weight.quants_stride,
                             static_cast<const uint8_t *>(pointer(mask)), mask_stride, pointer(bias),
                             reinterpret_cast<void *>(out)};
    return by_columns ? table->block_columns[dtype](args, weight) : table->block_rows[dtype](args, weight);
}

// Fields that hold addresses are integers in Python.
template <class C>
void def_address(nb::class_<C> &cls, const char *name, const void *C::*field) {
    cls.def_prop_rw(name, [field](const C &self) { return reinterpret_cast<uintptr_t>(self.*field); },
                    [field](C &self, uintptr_t value) { self.*field = pointer(value); });
}

// Layers that one step goes through. Immutable once built, so that threads can share it.
struct Decoder {
    std::vector<DecodeLayer> layers;

    DecodeEnds ends{};

    void add(const DecodeLayer &layer) { layers.push_back(layer); }
    // From `ids` to `logits`, or (where these are 0) from `hidden` to `hidden`.
    int64_t step(int dtype, int64_t threads, int64_t rows, int64_t d, int64_t past, int64_t rotary, int64_t widest,
                 uintptr_t hidden, uintptr_t ids, uintptr_t logits, uintptr_t cos, uintptr_t sin, int64_t angles_row,
                 uintptr_t mask, uintptr_t memory) const {
        const DecodeArgs args = {rows, d, threads, past, rotary, widest, reinterpret_cast<void *>(hidden),
                                 ids ? &ends : nullptr, static_cast<const int64_t *>(pointer(ids)),
                                 reinterpret_cast<void *>(logits), static_cast<const float *>(pointer(cos)),
                                 static_cast<const float *>(pointer(sin)), angles_row,
                                 static_cast<const uint8_t *>(pointer(mask)), layers.data(),
                                 static_cast<const DecodeMemory *>(pointer(memory)),
                                 static_cast<int64_t>(layers.size())};
        return table->decode[dtype](args);
    }
};

void bind_decode(nb::module_ &m) {
    nb::class_<DecodeNorm> norm(m, "Norm");
    norm.def("__init__", [](DecodeNorm *self) { new (self) DecodeNorm{}; });
    def_address(norm, "weight", &DecodeNorm::weight);
    def_address(norm, "bias", &DecodeNorm::bias);
    norm.def_rw("eps", &DecodeNorm::eps).def_rw("centred", &DecodeNorm::centred);

    nb::class_<DecodeLinear> linear(m, "Linear");
    linear.def("__init__", [](DecodeLinear *self) { new (self) DecodeLinear{}; });
    def_address(linear, "weight", &DecodeLinear::weight);
    def_address(linear, "bias", &DecodeLinear::bias);
    def_address(linear, "factor", &DecodeLinear::factor);
    def_address(linear, "scales", &DecodeLinear::scales);
    linear.def_rw("scales_stride", &DecodeLinear::scales_stride);
    linear.def_prop_rw("kind", [](const DecodeLinear &self) { return static_cast<int>(self.kind); },
                       [](DecodeLinear &self, int value) { self.kind = static_cast<Kind>(value); });
    linear.def_rw("stride", &DecodeLinear::stride).def_rw("n", &DecodeLinear::n).def_rw("q", &DecodeLinear::q);
    linear.def_rw("rest", &DecodeLinear::rest);
    linear.def_rw("by_columns", &DecodeLinear::by_columns).def_rw("threshold", &DecodeLinear::threshold);

    nb::class_<DecodeLayer> layer(m, "Layer");
    layer.def("__init__", [](DecodeLayer *self) { new (self) DecodeLayer{}; });
    layer.def_rw("before_attention", &DecodeLayer::before_attention).def_rw("q_norm", &DecodeLayer::q_norm);
    layer.def_rw("k_norm", &DecodeLayer::k_norm).def_rw("before_network", &DecodeLayer::before_network);
    layer.def_rw("q", &DecodeLayer::q).def_rw("k", &DecodeLayer::k).def_rw("v", &DecodeLayer::v);
    layer.def_rw("o", &DecodeLayer::o).def_rw("gate", &DecodeLayer::gate).def_rw("up", &DecodeLayer::up);
    layer.def_rw("down", &DecodeLayer::down).def_rw("heads", &DecodeLayer::heads);
    layer.def_rw("kv_heads", &DecodeLayer::kv_heads).def_rw("head_dim", &DecodeLayer::head_dim);
    layer.def_rw("scale", &DecodeLayer::scale);
    layer.def_prop_rw("network", [](const DecodeLayer &self) { return static_cast<int>(self.network); },
                      [](DecodeLayer &self, int value) { self.network = static_cast<Network>(value); });
    layer.def_prop_rw("act", [](const DecodeLayer &self) { return static_cast<int>(self.act); },
                      [](DecodeLayer &self, int value) { self.act = static_cast<Act>(value); });

    nb::class_<DecodeEnds> ends(m, "Ends");
    ends.def("__init__", [](DecodeEnds *self) { new (self) DecodeEnds{}; });
    ends.def_rw("embedding", &DecodeEnds::embedding).def_rw("norm", &DecodeEnds::norm);
    ends.def_rw("head", &DecodeEnds::head);

    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<>())
        .def("add", &Decoder::add)
        .def_rw("ends", &Decoder::ends)
        .def("step", &Decoder::step, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

NB_MODULE(_cpu, m) {
    table = choose_table();
    using release = nb::call_guard<nb::gil_scoped_release>;
    m.def("neurons", &neurons, release());
    m.def("rows", &multiply<false>, release());
    m.def("columns", &multiply<true>, release());
    nb::class_<Blocks>(m, "Blocks")
        .def("__init__", [](Blocks *self, int kind, uintptr_t quants, int64_t quants_stride, uintptr_t scales,
                            int64_t scales_stride) {
            new (self) Blocks{static_cast<Kind>(kind), static_cast<const uint8_t *>(pointer(quants)), quants_stride,
                              static_cast<const uint8_t *>(pointer(scales)), scales_stride};
        });
    m.def("block_neurons", &block_neurons, release());
    m.def("block_rows", &block_multiply<false>, release());
    m.def("block_columns", &block_multiply<true>, release());
    m.def("read", [](uintptr_t data, int64_t bytes, int loop, int64_t threads) {
        return table->read(pointer(data), bytes, loop, threads);
    }, release());
    m.def("isa", [] { return std::string(table->isa); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Table *usable : usable_tables()) names.emplace_back(usable->isa);
        return names;
    });
    bind_decode(m);
    m.attr("read_loops") = kReadLoops;
    // In the order of enum Act.
    m.attr("activations") = nb::make_tuple("relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu", "identity");
}
