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

#include <algorithm>
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

void need(bool holds, const std::string &what) {
    if (!holds) throw std::invalid_argument(what);
}

// In the order of the enums.
const char *const kFormats[] = {
    "plain",
#define X(name, Struct) #name,
#include "formats/formats.def"
#undef X
};
const char *const kOrders[] = {"rows", "columns", "planes", "parted"};
const char *const kActivations[] = {"relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu", "identity"};

// An enum's value by its number or its name; raises for one that it does not have.
template <class E, size_t count>
E numbered(const char *what, int value, const char *const (&)[count]) {
    if (value >= 0 && static_cast<size_t>(value) < count) return static_cast<E>(value);
    throw std::invalid_argument(std::string(what) + " has no value " + std::to_string(value) + ", the last is " +
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
    const bool apart = w.order == Order::planes || w.order == Order::parted;
    need(!apart || (w.format != Format::plain && w.first_stride >= 0 && (w.first != nullptr || empty)), name,
         " has no first bits that lie apart");
}
void check_order(const char *name, const Weight &w, Order order) {
    static const char *const wrong[] = {" does not lie by rows", " does not lie by columns", " does not lie in planes",
                                        " is not parted"};
    need(w.order == order, name, wrong[static_cast<int>(order)]);
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
    const auto &kernels = order == Order::rows      ? table->rows
                          : order == Order::columns ? table->columns
                          : order == Order::planes  ? table->levels
                                                    : table->words;
    return kernels[static_cast<int>(call.dtype)](a);
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
                uintptr_t address, int64_t stride, uintptr_t scales, int64_t scales_stride, uintptr_t first,
                int64_t first_stride) {
                 new (self) Weight{named<Format>("weight format", format, kFormats), named<Order>("order", order, kOrders),
                                   outputs, inputs, pointer(address), stride, pointer(scales), scales_stride, pointer(first),
                                   first_stride};
                 check("weight", *self);
             },
             nb::kw_only(), "format"_a, "order"_a, "outputs"_a, "inputs"_a, "address"_a, "stride"_a, "scales"_a = 0,
             "scales_stride"_a = 0, "first"_a = 0, "first_stride"_a = 0);

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
    m.def("levels", &multiply<Order::planes>, release());
    m.def("words", &multiply<Order::parted>, release());

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

    m.def("values", [](const Weight &weight, bool first, int dtype, int64_t threads, uintptr_t out) {
        check("weight", weight);
        need(weight.format != Format::plain, "weight", " is plain: it holds its values");
        need(!first || weight.order != Order::columns, "weight", " lies by columns, which do not tell first bits apart");
        need(threads >= 1 && out != 0, "values", " needs threads >= 1 and memory to write to");
        table->values[static_cast<int>(dtype_of(dtype))]({threads, weight, first, reinterpret_cast<void *>(out)});
    }, release(), "weight"_a, "first"_a, "dtype"_a, "threads"_a, "out"_a);

    m.attr("formats") = names(kFormats);
    m.attr("activations") = names(kActivations);
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
            need(w.kind == Format::plain || w.scales != nullptr, std::string(name) + " is in blocks without scales");
            need(!w.parted || w.first != nullptr, std::string(name) + " is parted and has no first bits");
            need(!w.parted || !std::isfinite(w.threshold), std::string(name) + " is parted, and only a head lists its outputs");
            need(w.first == nullptr || (w.kind != Format::plain && !w.by_columns), std::string(name) + " has a first plane and does not lie in planes");
            widest = std::max({widest, n, q});
        };
        linear("q", layer.q, width, heads);
        linear("k", layer.k, width, kv_heads);
        linear("v", layer.v, width, kv_heads);
        linear("o", layer.o, heads, width);
        if (layer.gate.weight != nullptr) linear("gate", layer.gate, width, layer.up.q);
        linear("up", layer.up, width, layer.up.q);
        linear("down", layer.down, layer.up.q, width);
        need(layer.window >= 0 && layer.angles >= 0, "a layer's window and its angles are numbers from 0 on");
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
                         (w->kind == Format::plain || w->scales != nullptr) && w->parted == (w->first != nullptr) &&
                         (w->kind != Format::plain || !w->parted),
                     "a step from ids needs an embedding and a head, both by rows or parted, of the layers' width");
            need(ends.norm.weight != nullptr, "a step from ids needs the norm before the head");
        }
        for (int64_t r = 0; r < step.rows; ++r) {
            within("length", r, step.past[r], step.capacity);
            if (step.sequences != nullptr) {
                within("sequence", r, step.sequences[r], step.sequences_count);
                need(r == 0 || step.sequences[r] > step.sequences[r - 1] ||
                         (step.sequences[r] == step.sequences[r - 1] && step.past[r] == step.past[r - 1] + 1),
                     "rows of one sequence must be tokens that follow each other, and sequences in order");
            }
            if (step.ids != nullptr) within("token id", r, step.ids[r], ends.embedding.q);
            need(step.mask == nullptr || step.mask_row == 0 || step.mask_row > step.past[r],
                 "the mask has fewer positions than a row");
        }
        need(step.rotary >= 0 && step.rotary % 2 == 0 && step.angles_row >= 0 && (step.rotary == 0 || step.angles != nullptr),
             "rotary is the even width of cos and sin, which must be there, or 0");
        for (int64_t i = 0; i < step.angles_count && step.rotary != 0; ++i)
            need(step.angles[i].cos != nullptr && step.angles[i].sin != nullptr, "there are angles without cos or sin");
        for (size_t l = 0; l < layers.size(); ++l) {
            need(step.rotary <= layers[l].head_dim, "cos and sin are wider than the heads");
            need(step.rotary == 0 || layers[l].angles < step.angles_count, "a layer names angles that the step does not have");
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
    norm.def_rw("eps", &DecodeNorm::eps).def_rw("plus", &DecodeNorm::plus).def_rw("centred", &DecodeNorm::centred);

    nb::class_<DecodeLinear> linear(m, "Linear");
    linear.def("__init__", [](DecodeLinear *self) { new (self) DecodeLinear{}; });
    def_address(linear, "weight", &DecodeLinear::weight);
    def_address(linear, "bias", &DecodeLinear::bias);
    def_address(linear, "factor", &DecodeLinear::factor);
    def_address(linear, "scales", &DecodeLinear::scales);
    def_address(linear, "first", &DecodeLinear::first);
    linear.def_rw("first_stride", &DecodeLinear::first_stride);
    linear.def_rw("scales_stride", &DecodeLinear::scales_stride);
    linear.def_prop_rw("kind", [](const DecodeLinear &self) { return static_cast<int>(self.kind); },
                       [](DecodeLinear &self, int value) { self.kind = numbered<Format>("kind", value, kFormats); });
    linear.def_rw("stride", &DecodeLinear::stride).def_rw("n", &DecodeLinear::n).def_rw("q", &DecodeLinear::q);
    linear.def_rw("rest", &DecodeLinear::rest).def_rw("parted", &DecodeLinear::parted);
    linear.def_rw("by_columns", &DecodeLinear::by_columns).def_rw("threshold", &DecodeLinear::threshold);

    nb::class_<DecodeLayer> layer(m, "Layer");
    layer.def("__init__", [](DecodeLayer *self) { new (self) DecodeLayer{}; });
    layer.def_rw("before_attention", &DecodeLayer::before_attention).def_rw("q_norm", &DecodeLayer::q_norm);
    layer.def_rw("k_norm", &DecodeLayer::k_norm).def_rw("before_network", &DecodeLayer::before_network);
    layer.def_rw("q", &DecodeLayer::q).def_rw("k", &DecodeLayer::k).def_rw("v", &DecodeLayer::v);
    layer.def_rw("o", &DecodeLayer::o).def_rw("gate", &DecodeLayer::gate).def_rw("up", &DecodeLayer::up);
    layer.def_rw("down", &DecodeLayer::down).def_rw("heads", &DecodeLayer::heads);
    layer.def_rw("kv_heads", &DecodeLayer::kv_heads).def_rw("head_dim", &DecodeLayer::head_dim);
    layer.def_rw("scale", &DecodeLayer::scale).def_rw("softcap", &DecodeLayer::softcap);
    layer.def_rw("window", &DecodeLayer::window).def_rw("angles", &DecodeLayer::angles);
    layer.def_rw("after_attention", &DecodeLayer::after_attention).def_rw("after_network", &DecodeLayer::after_network);
    def_enum(layer, "network", &DecodeLayer::network, Network::up_first);
    def_enum(layer, "act", &DecodeLayer::act, Act::identity);

    nb::class_<DecodeEnds> ends(m, "Ends");
    ends.def("__init__", [](DecodeEnds *self) { new (self) DecodeEnds{}; });
    ends.def_rw("embedding", &DecodeEnds::embedding).def_rw("norm", &DecodeEnds::norm);
    ends.def_rw("head", &DecodeEnds::head).def_rw("scale", &DecodeEnds::scale).def_rw("softcap", &DecodeEnds::softcap);

    nb::class_<DecodeStep> step(m, "Step");
    step.def("__init__", [](DecodeStep *self) { new (self) DecodeStep{}; });
    def_enum(step, "dtype", &DecodeStep::dtype, Dtype::fp16);
    step.def_rw("rows", &DecodeStep::rows).def_rw("threads", &DecodeStep::threads);
    def_address(step, "hidden", &DecodeStep::hidden);
    def_address(step, "ids", &DecodeStep::ids);
    def_address(step, "logits", &DecodeStep::logits);
    def_address(step, "past", &DecodeStep::past);
    step.def_rw("capacity", &DecodeStep::capacity).def_rw("rotary", &DecodeStep::rotary);
    def_address(step, "sequences", &DecodeStep::sequences);
    step.def_rw("sequences_count", &DecodeStep::sequences_count);
    def_address(step, "angles", &DecodeStep::angles);
    step.def_rw("angles_count", &DecodeStep::angles_count).def_rw("angles_row", &DecodeStep::angles_row);
    def_address(step, "mask", &DecodeStep::mask);
    step.def_rw("mask_row", &DecodeStep::mask_row);
    def_address(step, "memory", &DecodeStep::memory);
    def_address(step, "columns", &DecodeStep::columns);
    step.def_prop_rw("words_given", [](const DecodeStep &self) { return reinterpret_cast<uintptr_t>(self.words.given); },
                     [](DecodeStep &self, uintptr_t value) { self.words.given = reinterpret_cast<const uint8_t *>(value); });
    step.def_prop_rw("words_taken", [](const DecodeStep &self) { return reinterpret_cast<uintptr_t>(self.words.taken); },
                     [](DecodeStep &self, uintptr_t value) { self.words.taken = reinterpret_cast<uint8_t *>(value); });
    step.def_prop_rw("words_row", [](const DecodeStep &self) { return self.words.given_row; },
                     [](DecodeStep &self, int64_t value) { self.words.given_row = value; });

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
