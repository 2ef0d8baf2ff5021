// The Python face: chooses the instruction set once, checks the arguments, releases the GIL.
// Addresses and strides come as integers, so that the extension is built and linked without torch. Everything else is in
// structs whose fields are passed by name.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/kernels.h"

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

// Raises "<name><what>" unless it holds; makes no string where it does.
void need(bool holds, const char *name, const char *what) {
    if (!holds) throw std::invalid_argument(std::string(name) + what);
}

// In the order of the enums.
const char *const kFormats[] = {
    "plain",
#define X(name, Struct) #name,
#include "formats/formats.def"
#undef X
};
const char *const kOrders[] = {"rows", "columns"};
const char *const kActivations[] = {"relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu", "identity"};

// An enum's value by its number or its name; raises for one that it does not have.
template <class E, size_t count>
E numbered(const char *what, int value, const char *const (&)[count]) {
    if (value >= 0 && static_cast<size_t>(value) < count) return static_cast<E>(value);
    throw std::invalid_argument(std::string("there is no ") + what + " " + std::to_string(value) + ", the last is " +
                                std::to_string(count - 1));
}
template <class E, size_t count>
E named(const char *what, const char *name, const char *const (&names)[count]) {
    for (size_t i = 0; i < count; ++i)
        if (std::strcmp(name, names[i]) == 0) return static_cast<E>(i);
    std::string all = names[0];
    for (size_t i = 1; i < count; ++i) all += std::string(", ") + names[i];
    throw std::invalid_argument("the C++ kernels have no " + std::string(what) + " '" + name + "', only " + all);
}
template <size_t count>
nb::tuple names(const char *const (&all)[count]) {
    nb::list out;
    for (const char *name : all) out.append(name);
    return nb::tuple(out);
}

Dtype dtype_of(int code) {
    static const char *const dtypes[] = {"fp32", "bf16", "fp16"};
    return numbered<Dtype>("dtype", code, dtypes);
}

// What would read memory that is not there; shapes and strides of tensors are checked in Python (checks.py).
void check(const char *name, const Weight &w) {
    const bool empty = w.outputs == 0 || w.inputs == 0;
    need(w.outputs >= 0 && w.inputs >= 0 && w.stride >= 0 && w.scales_stride >= 0, name, " has a negative size or stride");
    need(w.address != nullptr || empty, name, " has no address");
    need(w.format == Format::plain || w.scales != nullptr || empty, name, " has no scales");
}
void check_order(const char *name, const Weight &w, Order order) {
    need(w.order == order, name, order == Order::rows ? " lies by columns, not by rows" : " lies by rows, not by columns");
}
void check_rows(int64_t rows, int64_t threads, int64_t width, int64_t outputs, int64_t x_stride, const void *x,
                const void *out) {
    need(rows >= 0, "rows", " must be 0 or more");
    need(threads >= 1, "threads", " must be 1 or more");
    need(rows == 0 || width == 0 || x != nullptr, "x", " has no address");
    need(rows == 0 || outputs == 0 || out != nullptr, "out", " has no address");
    need(x_stride >= 0, "x", " has a negative stride");
}

struct Linear {
    Dtype dtype;
    LinearArgs args;
};
template <Order order>
int64_t multiply(const Linear &call) {
    const LinearArgs &a = call.args;
    check("weight", a.weight);
    check_order("weight", a.weight, order);
    check_rows(a.rows, a.threads, a.weight.inputs, a.weight.outputs, a.x_stride, a.x, a.out);
    return (order == Order::rows ? table->rows : table->columns)[static_cast<int>(call.dtype)](a);
}

struct Neurons {
    Dtype dtype;
    NeuronsArgs args;
};
int64_t neurons(const Neurons &call) {
    const NeuronsArgs &a = call.args;
    const std::pair<const char *, const Weight *> parts[] = {{"gate", &a.gate}, {"up", &a.up}};
    check("down", a.down);
    check_order("down", a.down, Order::columns);
    int64_t width = -1;
    for (const auto &[name, w] : parts) {
        if (w->address == nullptr) continue;
        check(name, *w);
        check_order(name, *w, Order::rows);
        need(w->outputs == a.down.inputs, name, " has another number of neurons than down");
        need(width < 0 || w->inputs == width, "gate and up", " have different widths");
        need((w->format == Format::plain) == (a.down.format == Format::plain), name, " and down must both be plain, or neither");
        width = w->inputs;
    }
    need(width >= 0 || a.down.inputs == 0, "gate and up", " have no address");
    need(a.mask != nullptr || a.rows == 0 || a.down.inputs == 0, "mask", " has no address");
    check_rows(a.rows, a.threads, width, a.down.outputs, a.x_stride, a.x, a.out);
    return table->neurons[static_cast<int>(call.dtype)](a);
}

void bind_products(nb::module_ &m) {
    using namespace nb::literals;
    using release = nb::call_guard<nb::gil_scoped_release>;
    const auto bytes = [](uintptr_t address) { return static_cast<const uint8_t *>(pointer(address)); };

    nb::class_<Weight>(m, "Weight")
        .def("__init__",
             [](Weight *self, const char *format, const char *order, int64_t outputs, int64_t inputs,
                uintptr_t address, int64_t stride, uintptr_t scales, int64_t scales_stride) {
                 new (self) Weight{named<Format>("weight format", format, kFormats), named<Order>("order", order, kOrders),
                                   outputs, inputs, pointer(address), stride, pointer(scales), scales_stride};
                 check("weight", *self);
             },
             nb::kw_only(), "format"_a, "order"_a, "outputs"_a, "inputs"_a, "address"_a, "stride"_a, "scales"_a = 0,
             "scales_stride"_a = 0);

    nb::class_<Linear>(m, "LinearArgs")
        .def("__init__",
             [bytes](Linear *self, int dtype, int64_t threads, int64_t rows, uintptr_t x, int64_t x_stride,
                     const Weight &weight, uintptr_t mask, int64_t mask_stride, uintptr_t bias, uintptr_t out) {
                 new (self) Linear{dtype_of(dtype), {rows, threads, pointer(x), x_stride, weight, bytes(mask), mask_stride,
                                                     pointer(bias), reinterpret_cast<void *>(out)}};
             },
             nb::kw_only(), "dtype"_a, "threads"_a, "rows"_a, "x"_a, "x_stride"_a, "weight"_a, "mask"_a, "mask_stride"_a,
             "bias"_a, "out"_a);
    m.def("rows", &multiply<Order::rows>, release());
    m.def("columns", &multiply<Order::columns>, release());

    nb::class_<Neurons>(m, "NeuronsArgs")
        .def("__init__",
             [bytes](Neurons *self, int dtype, int act, int64_t threads, int64_t rows, uintptr_t x, int64_t x_stride,
                     const std::optional<Weight> &gate, const std::optional<Weight> &up, const Weight &down, uintptr_t mask,
                     int64_t mask_stride, uintptr_t gate_bias, uintptr_t up_bias, uintptr_t down_bias, uintptr_t given,
                     int64_t given_stride, uintptr_t out) {
                 new (self) Neurons{dtype_of(dtype),
                                    {rows, threads, numbered<Act>("activation", act, kActivations), pointer(x), x_stride,
                                     gate.value_or(Weight{}), up.value_or(Weight{}), down, bytes(mask), mask_stride,
                                     pointer(gate_bias), pointer(up_bias), pointer(down_bias), pointer(given), given_stride,
                                     reinterpret_cast<void *>(out)}};
             },
             nb::kw_only(), "dtype"_a, "act"_a, "threads"_a, "rows"_a, "x"_a, "x_stride"_a, "gate"_a.none(), "up"_a.none(),
             "down"_a, "mask"_a, "mask_stride"_a, "gate_bias"_a, "up_bias"_a, "down_bias"_a, "given"_a, "given_stride"_a,
             "out"_a);
    m.def("neurons", &neurons, release());

    m.attr("formats") = names(kFormats);
    m.attr("activations") = names(kActivations);
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
                       [](DecodeLinear &self, int value) { self.kind = numbered<Format>("weight format", value, kFormats); });
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
    bind_products(m);
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
}
