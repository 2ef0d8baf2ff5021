// Codes of a few bits. A line (a row of a weight, or a column) is a plane of the codes' low bits and one of the high bits, if
// any. A plane of B bits has 4 B bytes for 32 numbers: number i is in byte i % (4 B), from bit B * (i // (4 B)) on. So one load,
// one shift by lanes and one mask give many of them in their order.
#pragma once

#include "isa/integers.h"

namespace {

constexpr int low_bits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }

template <int B>
inline int plane_at(const uint8_t *plane, int64_t i) {
    return plane[i / 32 * (4 * B) + i % (4 * B)] >> (i % 32 / (4 * B) * B) & ((1 << B) - 1);
}

// groups: of the line.
template <int Bits>
inline int code_at(const uint8_t *line, int64_t i, int64_t groups) {
    constexpr int low = low_bits(Bits), high = Bits - low;
    const int code = plane_at<low>(line, i);
    if constexpr (high > 0) return code | plane_at<high>(line + groups * 4 * low, i) << low;
    return code;
}

#if MOYU_INTEGERS
// Codes of kBeside groups from group g on as x.halves lies: the first 16 of each, then the others. Beyond `here` groups: 0.
template <int Bits>
inline void codes_of_groups(const uint8_t *line, int64_t groups, int64_t g, int here, Bytes &front, Bytes &back) {
    constexpr int low = low_bits(Bits), high = Bits - low;
    static_assert(high == 0 || high == 1 || (high == 2 && low == 4), "planes");
    const auto masked = [](Bytes bytes, int mask) { return both_of(bytes, every(mask)); };
    if constexpr (low == 4) {
        const Bytes two = load_some(line + 16 * g, 16 * here);
        front = masked(two, 15), back = masked(shifted_down<4>(two), 15);
    } else {
        const Bytes two = spread_eights(line + 8 * g, here);
        front = masked(two, 3), back = masked(shifted_down<4>(two), 3);
    }
    if constexpr (high > 0) {
        const uint8_t *plane = line + groups * 4 * low + g * 4 * high;
        const Bytes two = high == 1 ? spread_fours(plane, here) : spread_eights(plane, here);
        constexpr int mask = (1 << high) - 1;
        front = either_of(front, masked(shifted_up<low>(two), mask << low));
        back = either_of(back, masked(low == 4 ? two : shifted_down<2>(two), mask << low));
    }
}

// Codes of kWhole groups from group g on in their order.
template <int Bits>
inline Bytes codes_in_order(const uint8_t *line, int64_t groups, int64_t g) {
    constexpr int low = low_bits(Bits), high = Bits - low;
    if constexpr (low == 8) return load_some(line + 32 * g, kBytes);
    Bytes codes = low == 4 ? both_of(nibbles_in_order(line + 16 * g), every(15)) : both_of(pairs_in_order(line + 8 * g), every(3));
    if constexpr (high > 0) {
        const uint8_t *plane = line + groups * 4 * low + g * 4 * high;
        const Bytes more = high == 1 ? both_of(bits_in_order(plane), every(1)) : both_of(pairs_in_order(plane), every(3));
        codes = either_of(codes, shifted_up<low>(more));
    }
    return codes;
}
#endif

}  // namespace
