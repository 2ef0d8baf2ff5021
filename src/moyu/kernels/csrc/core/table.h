// All of one instruction set's kernels, written in terms of the Vec that was included before, in one table.
#pragma once

#include "core/decode.h"
#include "core/grouped.h"
#include "core/levels.h"
#include "core/linear.h"
#include "core/neurons.h"
#include "core/read.h"
#include "core/words.h"

namespace {

template <class T>
int64_t rows(const LinearArgs &a) {
    return in_parts<T>(a, a.weight.format == Format::plain ? plain_rows<T> : grouped_rows<T>);
}
template <class T>
int64_t columns(const LinearArgs &a) {
    return in_parts<T>(a, a.weight.format == Format::plain ? plain_columns<T> : grouped_columns<T>);
}
template <class T>
int64_t levels(const LinearArgs &a) {
    return in_parts<T>(a, grouped_levels<T>);
}
template <class T>
int64_t words(const LinearArgs &a) {
    return in_parts<T>(a, grouped_words<T>);
}
template <class T>
int64_t neurons(const NeuronsArgs &a) {
    return in_parts<T>(a, a.down.format == Format::plain ? plain_neurons<T> : grouped_neurons<T>);
}

const moyu::Table table = {
    Vec::isa,
    {neurons<float>, neurons<BF16>, neurons<F16>},
    {rows<float>, rows<BF16>, rows<F16>},
    {columns<float>, columns<BF16>, columns<F16>},
    {levels<float>, levels<BF16>, levels<F16>},
    {words<float>, words<BF16>, words<F16>},
    {decode<float>, decode<BF16>, decode<F16>},
    {grouped_values<float>, grouped_values<BF16>, grouped_values<F16>},
    read,
};

}  // namespace
