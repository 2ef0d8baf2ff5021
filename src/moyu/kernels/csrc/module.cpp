// The Python face: chooses the instruction set once, turns integers into arguments, releases the GIL.
// Addresses and strides come as integers, so that the extension is built and linked without torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#endif

#include <algorithm>
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
template <class C, class P>
void def_address(nb::class_<C> &cls, const char *name, P *C::*field) {
    cls.def_prop_rw(name, [field](const C &self) { return reinterpret_cast<uintptr_t>(self.*field); },
                    [field](C &self, uintptr_t value) { self.*field = reinterpret_cast<P *>(value); });
}

// Fields that hold an enum are integers in Python; raises for one that it does not have.
template <class C, class E>
void def_enum(nb::class_<C> &cls, const char *name, E C::*field, E last) {
    cls.def_prop_rw(name, [field](const C &self) { return static_cast<int>(self.*field); },
                    [field, last, name](C &self, int value) {
                        if (value < 0 || value > static_cast<int>(last))
                            throw std::invalid_argument(std::string(name) + " has no value " + std::to_string(value) +
                                                        ", the last is " + std::to_string(static_cast<int>(last)));
                        self.*field = static_cast<E>(value);
                    });
}

void need(bool holds, const std::string &what) {
    if (!holds) throw std::invalid_argument(what);
}

void within(const char *what, int64_t row, int64_t value, int64_t end) {
    if (value < 0 || value >= end)
        throw std::out_of_range(std::string("the ") + what + " of row " + std::to_string(row) + " is " +
                                std::to_string(value) + ", it must be in [0, " + std::to_string(end) + ")");
}

// Layers that one step goes through. Immutable once built, so that threads can share it.
struct Decoder {
    std::vector<DecodeLayer> layers;
    DecodeEnds ends{};
    int64_t d = 0, widest = 0;

    void add(const DecodeLayer &layer) {
        need(layer.heads > 0 && layer.kv_heads > 0 && layer.head_dim > 0 && layer.heads % layer.kv_heads == 0,
             "a layer needs heads > 0, a multiple of kv_heads > 0, and head_dim > 0");
        const int64_t width = layer.q.n, heads = layer.heads * layer.head_dim, kv_heads = layer.kv_heads * layer.head_dim;
        need(d == 0 || width == d, "all layers of a decoder have the same width");
        const auto linear = [&](const char *name, const DecodeLinear &w, int64_t n, int64_t q) {
            need(w.weight != nullptr && n > 0 && q > 0 && w.n == n && w.q == q,
                 std::string(name) + " must be (" + std::to_string(q) + ", " + std::to_string(n) + ") and have a weight");
            need(w.kind == Kind::plain || w.scales != nullptr, std::string(name) + " is in blocks without scales");
            widest = std::max({widest, n, q});
        };
        linear("q", layer.q, width, heads);
        linear("k", layer.k, width, kv_heads);
        linear("v", layer.v, width, kv_heads);
        linear("o", layer.o, heads, width);
        if (layer.gate.weight != nullptr) linear("gate", layer.gate, width, layer.up.q);
        linear("up", layer.up, width, layer.up.q);
        linear("down", layer.down, layer.up.q, width);
        need(layer.before_attention.weight != nullptr && layer.before_network.weight != nullptr,
             "a layer needs a norm before its attention and one before its network");
        need(layer.network != Network::gate_first || layer.gate.weight != nullptr, "gate cannot decide where there is none");
        d = width;
        layers.push_back(layer);
    }

    // From `ids` to `logits` (also without layers), or from `hidden` to `hidden`. Returns the bytes read; raises before it
    // touches memory.
    int64_t step(const DecodeStep &step) const {
        const int64_t width = layers.empty() ? ends.embedding.n : d;
        check(step, width);
        const DecodeArgs args = {step, width, std::max(widest, width), step.ids ? &ends : nullptr, layers.data(),
                                 static_cast<int64_t>(layers.size())};
        return table->decode[static_cast<int>(step.dtype)](args);
    }

  private:
    void check(const DecodeStep &step, int64_t width) const {
        need(!layers.empty() || step.ids != nullptr, "the decoder has no layers");
        need(step.rows >= 1 && step.rows <= kMostRows,
             "a step takes 1 to " + std::to_string(kMostRows) + " rows, got " + std::to_string(step.rows));
        need(step.threads >= 1, "a step needs threads >= 1, got " + std::to_string(step.threads));
        need(step.past != nullptr && (step.memory != nullptr || layers.empty()), "a step needs the lengths and the memory of its rows");
        if (step.ids == nullptr) {
            need(step.hidden != nullptr, "a step needs ids or hidden states");
        } else {
            need(step.logits != nullptr && step.hidden == nullptr, "a step from ids needs logits, and no hidden states");
            const DecodeLinear *const tables[] = {&ends.embedding, &ends.head};
            for (const DecodeLinear *w : tables)
                need(w->weight != nullptr && w->n == width && w->n > 0 && w->q > 0 && !w->by_columns &&
                         (w->kind == Kind::plain || w->scales != nullptr),
                     "a step from ids needs an embedding and a head, both by rows of the layers' width");
            need(ends.norm.weight != nullptr, "a step from ids needs the norm before the head");
        }
        for (int64_t r = 0; r < step.rows; ++r) {
            within("length", r, step.past[r], step.capacity);
            if (step.ids != nullptr) within("token id", r, step.ids[r], ends.embedding.q);
            need(step.mask == nullptr || step.mask_row == 0 || step.mask_row > step.past[r],
                 "the mask has fewer positions than a row");
        }
        need(step.rotary >= 0 && step.rotary % 2 == 0 && step.angles_row >= 0 &&
                 (step.rotary == 0 || (step.cos != nullptr && step.sin != nullptr)),
             "rotary is the even width of cos and sin, which must be there, or 0");
        for (size_t l = 0; l < layers.size(); ++l) {
            need(step.rotary <= layers[l].head_dim, "cos and sin are wider than the heads");
            need(step.memory[l].keys != nullptr && step.memory[l].values != nullptr,
                 "layer " + std::to_string(l) + " has no keys or values");
        }
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
    def_enum(linear, "kind", &DecodeLinear::kind, Kind::q4_0);
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
    def_enum(layer, "network", &DecodeLayer::network, Network::up_first);
    def_enum(layer, "act", &DecodeLayer::act, Act::identity);

    nb::class_<DecodeEnds> ends(m, "Ends");
    ends.def("__init__", [](DecodeEnds *self) { new (self) DecodeEnds{}; });
    ends.def_rw("embedding", &DecodeEnds::embedding).def_rw("norm", &DecodeEnds::norm);
    ends.def_rw("head", &DecodeEnds::head);

    nb::class_<DecodeStep> step(m, "Step");
    step.def("__init__", [](DecodeStep *self) { new (self) DecodeStep{}; });
    def_enum(step, "dtype", &DecodeStep::dtype, Dtype::fp16);
    step.def_rw("rows", &DecodeStep::rows).def_rw("threads", &DecodeStep::threads);
    def_address(step, "hidden", &DecodeStep::hidden);
    def_address(step, "ids", &DecodeStep::ids);
    def_address(step, "logits", &DecodeStep::logits);
    def_address(step, "past", &DecodeStep::past);
    step.def_rw("capacity", &DecodeStep::capacity).def_rw("rotary", &DecodeStep::rotary);
    def_address(step, "cos", &DecodeStep::cos);
    def_address(step, "sin", &DecodeStep::sin);
    step.def_rw("angles_row", &DecodeStep::angles_row);
    def_address(step, "mask", &DecodeStep::mask);
    step.def_rw("mask_row", &DecodeStep::mask_row);
    def_address(step, "memory", &DecodeStep::memory);
    def_address(step, "columns", &DecodeStep::columns);

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
