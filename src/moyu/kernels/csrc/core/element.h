// The 16-bit element types and their exact widening and round-to-nearest-even narrowing, without any hardware support.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<BF16> = true;

// Whether products take the 16 bits of this type as they are stored; the other types are multiplied in fp32.
template <class T>
constexpr bool stored_products = false;

// kept = the positions of the set bytes, ascending; returns how many. `kept` has room for n.
template <class V>
inline int64_t list_set(const uint8_t *mask, int64_t n, int32_t *kept) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        kept[count] = static_cast<int32_t>(i);
        count += mask[i] != 0;
    }
    return count;
}

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// value or 0, as bits: a loop over it becomes vectors.
inline float or_zero(bool keep, float value) { return keep ? value : 0.0f; }
template <class T>
T or_zero(bool keep, T value) { return {static_cast<uint16_t>(keep ? value.bits : 0)}; }

inline float widen(float value) { return value; }
inline float widen(BF16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(F16 value) {
    const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // infinity, NaN
    if (rest < 0x0400u) {                                                  // zero and subnormal: rest * 2^-24
        const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
        return sign ? -magnitude : magnitude;
    }
    return from_bits(sign | ((rest << 13) + 0x38000000u));
}

inline void narrow(float value, float &out) { out = value; }
inline void narrow(float value, BF16 &out) {
    const uint32_t bits = to_bits(value);
    const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    out.bits = (bits & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>((bits >> 16) | 0x40u) : rounded;
}
inline void narrow(float value, F16 &out) {
    const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u;                                                    // NaN
    } else if (rest >= 0x477ff000u) {
        half = 0x7c00u;                                                    // 65520 and more round to infinity
    } else if (rest < 0x38800000u) {
        half = to_bits(from_bits(rest) + 0.5f) - 0x3f000000u;              // subnormal: the addition rounds at 2^-24
    } else {
        half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    }
    out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
