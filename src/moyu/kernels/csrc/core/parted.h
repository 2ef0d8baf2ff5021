// Parted weights: rows whose first bits lie apart from the others, as structs that the loops along rows take.
//
// A code of `bits` bits is first << s | further, and a weight is scale * (code - zero) + offset. So a row is the sum of two rows with
// the same scales: one of the first bits in the middle of the codes that share them, and one of what the others are beside it.
#pragma once

#include "core/formats.h"

namespace {

// Scales of a code that counts kStep each, from kTwice / 2 on; `Keeps`: with the weight's own offsets.
template <class S, int kStep, int kTwice, bool Keeps>
struct Stepped {
    static constexpr int halves = S::halves, span = S::span, bytes = S::bytes;
    static constexpr bool has_offset = true;
    using Fields = typename S::Fields;
    static Fields of_row(const uint8_t *all, int64_t groups) { return S::of_row(all, groups); }
    static ScaleAndOffset at(const Fields &f, int64_t i, int64_t j) {
        const auto own = S::at(f, i, j);
        return {own.scale * kStep, (Keeps ? own.offset : 0.0f) + own.scale * (0.5f * kTwice)};
    }
#if MOYU_INTEGERS
    static void row(const Fields &f, int64_t b, int count, __m256 *scale, __m256 *offset) {
        S::row(f, b, count, scale, offset);
        for (int h = 0; h < halves; ++h) {
            const __m256 more = Eight::times(scale[h], Eight::set(0.5f * kTwice));
            offset[h] = Keeps && S::has_offset ? _mm256_add_ps(offset[h], more) : more;
            scale[h] = Eight::times(scale[h], Eight::set(static_cast<float>(kStep)));
        }
    }
#endif
};

template <class F>
struct Parted {
    static constexpr int further = F::further, first = F::bits - further, middle = (1 << further) - 1;  // twice the middle
    using First = Planar<first, Stepped<typename F::Scales, 1 << further, middle - 2 * F::zero, true>>;
    using Further = Planar<further, Stepped<typename F::Scales, 1, -middle, false>>;
    struct Whole;
};

// All bits of a row, joined where they are multiplied: the same products and sums as those of a weight that lies by rows.
template <class F>
struct Parted<F>::Whole {
    using Scales = typename F::Scales;
    struct Line { const uint8_t *first, *further; };
    static int32_t level(const Line &line, int64_t i, int64_t groups) {
        return (code_at<Parted::first>(line.first, i, groups) << Parted::further | code_at<Parted::further>(line.further, i, groups)) - F::zero;
    }
    static void ahead(const Line &line, int64_t b) { First::ahead(line.first, b), Further::ahead(line.further, b); }
    static void ahead_of_end(const Line &line, int64_t groups) { Further::ahead_of_end(line.further, groups); }
#if MOYU_INTEGERS
    static constexpr bool stands_signed = F::stands_signed;
    static constexpr int lift = F::lift;
    static void codes(const Line &line, int64_t groups, int64_t g, int here, Bytes &front, Bytes &back) {
        Bytes first[2], more[2];
        codes_of_groups<Parted::first>(line.first, groups, g, here, first[0], first[1]);
        codes_of_groups<Parted::further>(line.further, groups, g, here, more[0], more[1]);
        const auto joined = [&](int half) {
            const Bytes code = either_of(shifted_up<Parted::further>(first[half]), more[half]);
            return stands_signed ? opposite_signs(code) : code;
        };
        front = joined(0), back = joined(1);
    }
#endif
};

// f(F{}) for the struct F of a format that can be parted.
template <class Fn>
inline void with_parts(Format format, Fn f) {
    with_format(format, [&](auto of) {
        using F = decltype(of);
        if constexpr (F::splits && F::bits >= 4) f(of);
        else moyu::fail("a weight whose format has no parts came to their loops");
    });
}

inline const uint8_t *first_of(const Weight &w, int64_t row) { return at<uint8_t>(w.first, row * w.first_stride); }

// Bytes of a row's first bits and scales, and of its further bits.
struct PartBytes { int64_t first, further; };
MOYU_ONCE PartBytes part_bytes(const Weight &w) {
    PartBytes bytes{};
    with_parts(w.format, [&](auto f) {
        using F = decltype(f);
        bytes.further = Parted<F>::Further::line_bytes(groups_of(w.inputs) * kGroup);
        bytes.first = F::row_bytes(w.inputs) - bytes.further;
    });
    return bytes;
}

}  // namespace
