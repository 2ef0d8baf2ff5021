// What a level is multiplied with, and what is added: the scale and the offset of each group of 32 weights, or of half a group.
//
// A kind of scales has `halves` parts in a group and `span` groups in a block of `bytes` bytes. Its fields lie one after the
// other, for a whole row or for all outputs of a block of columns. at(fields, i, j): block i of a row and its part j; by
// columns, both are the output.
#pragma once

#include "isa/integers.h"

namespace {

struct ScaleAndOffset { float scale, offset; };

// fp16 scales, and fp16 offsets where `Offset`, of each group.
template <bool Offset>
struct HalfScales {
    static constexpr int halves = 1, span = 1, bytes = Offset ? 4 : 2;
    static constexpr bool has_offset = Offset;
    struct Fields { const uint8_t *scale, *offset; };
    static Fields of_row(const uint8_t *all, int64_t groups) { return {all, all + 2 * groups}; }
    static Fields of_columns(const uint8_t *block, int64_t, int64_t q) { return {block, block + 2 * q}; }
    static ScaleAndOffset at(const Fields &f, int64_t i, int64_t) {
        return {half_at(f.scale, i), Offset ? half_at(f.offset, i) : 0.0f};
    }
    template <class Fn>
    static void each(const Fields &f, int64_t q, Fn fn) {
        fn(f.scale, 2 * q);
        if (Offset) fn(f.offset, 2 * q);
    }
#if MOYU_INTEGERS
    // Scales and offsets of 8 groups of a row from group b on; 0 beyond the count.
    static void row(const Fields &f, int64_t b, int count, __m256 *scale, __m256 *offset) {
        const auto take = [&](const uint8_t *p) { return count == 8 ? Eight::halves(p + 2 * b) : load_halves(p + 2 * b, count); };
        scale[0] = take(f.scale);
        if (Offset) offset[0] = take(f.offset);
    }
    // Those of some outputs from output o on.
    template <class V>
    static void columns(const Fields &f, int64_t o, typename V::Reg &scale, typename V::Reg &offset) {
        scale = V::halves(f.scale + 2 * o);
        if (Offset) offset = V::halves(f.offset + 2 * o);
    }
#endif
};

// One byte a group: 2^(byte - 128).
struct PowerScales {
    static constexpr int halves = 1, span = 1, bytes = 1;
    static constexpr bool has_offset = false;
    struct Fields { const uint8_t *power; };
    static Fields of_row(const uint8_t *all, int64_t) { return {all}; }
    static Fields of_columns(const uint8_t *block, int64_t, int64_t) { return {block}; }
    static ScaleAndOffset at(const Fields &f, int64_t i, int64_t) {
        const uint32_t power = f.power[i];
        return {from_bits(power > 1 ? (power - 1) << 23 : 0x00200000u << power), 0.0f};
    }
    template <class Fn>
    static void each(const Fields &f, int64_t q, Fn fn) { fn(f.power, q); }
#if MOYU_INTEGERS
    static void row(const Fields &f, int64_t b, int count, __m256 *scale, __m256 *) {
        uint8_t some[8] = {};
        for (int i = 0; i < count; ++i) some[i] = f.power[b + i];
        scale[0] = Eight::powers(some);
        if (count < 8) scale[0] = _mm256_and_ps(scale[0], first_lanes(count));
    }
    template <class V>
    static void columns(const Fields &f, int64_t o, typename V::Reg &scale, typename V::Reg &) { scale = V::powers(f.power + o); }
#endif
};

// Blocks of 8 groups with an fp16 factor, and a scale of 8 bits for each part. Minima: the parts' own times another fp16 factor,
// taken off; as bytes of their own, or in the upper half of the scales' bytes.
enum class Minima { none, bytes, nibbles };
template <int Halves, Minima kMinima>
struct BlockScales {
    static constexpr int halves = Halves, span = 8;
    static constexpr bool has_offset = kMinima != Minima::none;
    static constexpr int parts = span * halves, bytes = (has_offset ? 4 : 2) + parts * (kMinima == Minima::bytes ? 2 : 1);
    struct Fields { const uint8_t *factor, *least, *scale, *minimum; };
    static Fields fields(const uint8_t *all, int64_t factors, int64_t scales, int64_t from) {
        Fields f;
        f.factor = all;
        f.least = all + 2 * factors;
        f.scale = f.least + (has_offset ? 2 * factors : 0) + from;
        f.minimum = f.scale + (kMinima == Minima::bytes ? scales : 0);
        return f;
    }
    static Fields of_row(const uint8_t *all, int64_t groups) { return fields(all, groups / span, groups * halves, 0); }
    static Fields of_columns(const uint8_t *block, int64_t part, int64_t q) { return fields(block, q, parts * q, part * q); }
    static ScaleAndOffset at(const Fields &f, int64_t i, int64_t j) {
        const float factor = half_at(f.factor, i);
        if constexpr (kMinima == Minima::none) return {factor * static_cast<float>(static_cast<int8_t>(f.scale[j])), 0.0f};
        const bool nibbles = kMinima == Minima::nibbles;
        const int scale = nibbles ? f.scale[j] & 15 : f.scale[j], minimum = nibbles ? f.scale[j] >> 4 : f.minimum[j];
        return {factor * static_cast<float>(scale), -(half_at(f.least, i) * static_cast<float>(minimum))};
    }
    template <class Fn>
    static void each(const Fields &f, int64_t q, Fn fn) {
        fn(f.factor, 2 * q);
        if (has_offset) fn(f.least, 2 * q);
        fn(f.scale, q);
        if (kMinima == Minima::bytes) fn(f.minimum, q);
    }
#if MOYU_INTEGERS
    template <class V>
    static void products(typename V::Reg factor, typename V::Reg least, const uint8_t *scales, const uint8_t *minima,
                         typename V::Reg &scale, typename V::Reg &offset) {
        if constexpr (kMinima == Minima::none) {
            scale = V::times(factor, V::signed_bytes(scales));
        } else if constexpr (kMinima == Minima::bytes) {
            scale = V::times(factor, V::bytes(scales)), offset = V::times(least, V::bytes(minima));
        } else {
            scale = V::times(factor, V::low_nibbles(scales)), offset = V::times(least, V::high_nibbles(scales));
        }
    }
    static void row(const Fields &f, int64_t b, int, __m256 *scale, __m256 *offset) {
        const __m256 factor = Eight::set(half_at(f.factor, b / span)), least = Eight::set(has_offset ? -half_at(f.least, b / span) : 0.0f);
        for (int h = 0; h < halves; ++h) {
            const int64_t from = b * halves + 8 * h;
            products<Eight>(factor, least, f.scale + from, f.minimum + from, scale[h], offset[h]);
        }
    }
    template <class V>
    static void columns(const Fields &f, int64_t o, typename V::Reg &scale, typename V::Reg &offset) {
        const auto least = has_offset ? V::times(V::halves(f.least + 2 * o), V::set(-1.0f)) : V::set(0.0f);
        products<V>(V::halves(f.factor + 2 * o), least, f.scale + o, f.minimum + o, scale, offset);
    }
#endif
};

}  // namespace
