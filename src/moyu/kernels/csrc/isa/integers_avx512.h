// Integer products of groups in 512 bits, with VNNI. An instruction takes twice the weights of one of 256 bits, so that the
// core's window holds twice the lines that wait for memory (docs/LOG.md).
#pragma once

#include "isa/integers_vector.h"

namespace {

// 16 floats of what scales are made of.
struct Sixteen {
    using Reg = __m512;
    static Reg set(float value) { return _mm512_set1_ps(value); }
    static Reg times(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
    static Reg halves(const uint8_t *p) { return _mm512_cvtph_ps(load_bytes(p)); }
    static __m128i sixteen(const uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }
    static __m512i whole(const uint8_t *p) { return _mm512_cvtepu8_epi32(sixteen(p)); }
    static Reg bytes(const uint8_t *p) { return _mm512_cvtepi32_ps(whole(p)); }
    static Reg signed_bytes(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(p))); }
    static Reg low_nibbles(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_and_si512(whole(p), _mm512_set1_epi32(15))); }
    static Reg high_nibbles(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(whole(p), 4)); }
    static Reg powers(const uint8_t *p) {  // 2^(byte - 128); below 2 they are subnormal
        const __m512i power = whole(p), usual = _mm512_slli_epi32(_mm512_sub_epi32(power, _mm512_set1_epi32(1)), 23);
        const __m512i small = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), power);
        return _mm512_castsi512_ps(_mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(power, _mm512_set1_epi32(1)), small, usual));
    }
};

using Bytes = __m512i;
using Wide = Sixteen;
constexpr int kBytes = 64, kLanes = 16;
constexpr int kBeside = 4;  // groups of x.halves that lie side by side (see core/rounded.h)
constexpr bool kFourProducts = true;  // an instruction sums four products of bytes
constexpr int kLifted = 128;  // products are of unsigned bytes by signed ones: a signed byte stands for itself - 128

inline Bytes load_some(const uint8_t *p, int count) {  // 0 beyond the count, where nothing is read
    return count >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << count) - 1, p);
}
inline Bytes every(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
inline Bytes both_of(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes either_of(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
template <int n> inline Bytes shifted_down(Bytes a) { return _mm512_srli_epi16(a, n); }  // bits of the neighbour come in
template <int n> inline Bytes shifted_up(Bytes a) { return _mm512_slli_epi16(a, n); }
inline Bytes looked_up(const int8_t *table, Bytes codes) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table))), codes);
}
inline Bytes opposite_signs(Bytes bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }  // of signed bytes: + 128, as unsigned
inline Bytes lifted(Bytes bytes) { return opposite_signs(bytes); }

// See core/planes.h. Of each group: its 4 bytes shifted by 0 to 3, its 8 bytes by 0 and 2.
inline Bytes spread_fours(const uint8_t *p, int groups) {
    const __m512i own = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_srlv_epi32(_mm512_permutexvar_epi32(own, load_some(p, 4 * groups)),
                             _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3));
}
inline Bytes spread_eights(const uint8_t *p, int groups) {
    const __m512i own = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm512_srlv_epi64(_mm512_permutexvar_epi64(own, load_some(p, 8 * groups)), _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2));
}
// Of two groups: 16 bytes shifted by 0 and 4, 8 by 0 to 6, 4 by 0 to 7.
inline Bytes nibbles_in_order(const uint8_t *p) {
    const __m512i own = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
    return _mm512_srlv_epi64(_mm512_permutexvar_epi64(own, load_some(p, 32)), _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
}
inline Bytes pairs_in_order(const uint8_t *p) {
    const __m512i own = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm512_srlv_epi64(_mm512_permutexvar_epi64(own, load_some(p, 16)), _mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6));
}
inline Bytes bits_in_order(const uint8_t *p) {
    const __m512i own = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_srlv_epi32(_mm512_permutexvar_epi32(own, load_some(p, 8)),
                             _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7));
}

template <bool Signed>
inline Bytes add_products(Bytes acc, Bytes w, Bytes s) {
    static_assert(!Signed, "codes stand lifted");
    return _mm512_dpbusd_epi32(acc, w, s);
}
template <bool Signed>
inline Bytes two_products(Bytes front, Bytes s, Bytes back, Bytes t) {
    return add_products<Signed>(add_products<Signed>(_mm512_setzero_si512(), front, s), back, t);
}

inline __m512 in_floats(Bytes integers) { return _mm512_cvtepi32_ps(integers); }
inline __m512 plus(__m512 a, float b) { return _mm512_add_ps(a, _mm512_set1_ps(b)); }
inline __m512 add_product(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512 widened(__m256 a) { return _mm512_zextps256_ps512(a); }
// The scales of groups k to k + 3 in the lanes of their products; parts: those of 8 groups, two for each where Halves = 2.
template <int Halves>
inline __m512 own_scales(const __m256 *parts, int k, int half) {
    __m512 all = _mm512_castps256_ps512(parts[0]);
    if constexpr (Halves == 2) all = _mm512_insertf32x8(all, parts[1], 1);
    const int a = Halves * k + half, b = a + Halves, c = b + Halves, d = c + Halves;
    return _mm512_permutexvar_ps(_mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d), all);
}
// The first 16 bytes of each group of two registers of whole groups, and the others.
inline Bytes first_halves(Bytes a, Bytes b) { return _mm512_shuffle_i64x2(a, b, 0x88); }
inline Bytes second_halves(Bytes a, Bytes b) { return _mm512_shuffle_i64x2(a, b, 0xdd); }

// add(integers of 16 neighbouring outputs, the first of them) of four registers whose bytes unpack_four has put together, of 64
// outputs: the first four of every 16, then the second, third and fourth four.
template <class Fn>
inline void in_order_32(const Bytes *s, Fn add) {
    const __m512i a = _mm512_shuffle_i32x4(s[0], s[1], 0x44), b = _mm512_shuffle_i32x4(s[2], s[3], 0x44);  // 0 .. 31
    const __m512i c = _mm512_shuffle_i32x4(s[0], s[1], 0xee), d = _mm512_shuffle_i32x4(s[2], s[3], 0xee);  // 32 .. 63
    add(_mm512_shuffle_i32x4(a, b, 0x88), 0), add(_mm512_shuffle_i32x4(a, b, 0xdd), 16);
    add(_mm512_shuffle_i32x4(c, d, 0x88), 32), add(_mm512_shuffle_i32x4(c, d, 0xdd), 48);
}
// Of four registers of 16 bits, of 128 outputs: the first eight of every 32, then the second, third and fourth eight.
template <class Fn>
inline void in_order_16(const Bytes *s, Fn add) {
    const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int half = 0; half < 2; ++half) {  // outputs 0 .. 15 of every 32, then the others
        const __m512i a = s[2 * half], b = s[2 * half + 1];
        const __m512i low = _mm512_permutex2var_epi64(a, front, b), high = _mm512_permutex2var_epi64(a, back, b);
        add(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(low)), 16 * half);
        add(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(low, 1)), 16 * half + 32);
        add(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(high)), 16 * half + 64);
        add(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16 * half + 96);
    }
}
inline Bytes unpack_low_8(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes unpack_high_8(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes unpack_low_16(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes unpack_high_16(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
inline Bytes set_16(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }
inline Bytes set_32(int value) { return _mm512_set1_epi32(value); }
inline Bytes sum_16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline Bytes pairs_16(Bytes u, Bytes s) { return _mm512_maddubs_epi16(u, s); }
// fn(k, codes) for the registers k of 64 outputs: the codes of two lines of `bits` bits (see core/levels.h), one after the other.
template <int bits, class Fn>
inline void two_lines(const uint8_t *a, const uint8_t *b, Fn fn) {
    const Bytes mask = every((1 << bits) - 1);
    const auto sixteen = [](const uint8_t *p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); };
    Bytes codes;
    if constexpr (bits == 4) {
        codes = either_of(_mm512_cvtepu8_epi16(load_bytes(a)), shifted_up<8>(_mm512_cvtepu8_epi16(load_bytes(b))));
    } else if constexpr (bits == 2) {
        codes = _mm512_broadcast_i64x4(_mm256_or_si256(sixteen(a), _mm256_slli_epi16(sixteen(b), 8)));
        codes = _mm512_srlv_epi64(codes, _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2));
    } else {
        const auto eight = [](const uint8_t *p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)); };
        codes = _mm512_broadcast_i32x4(_mm_unpacklo_epi8(eight(a), eight(b)));
        codes = _mm512_srlv_epi64(codes, _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3));
    }
    fn(0, both_of(codes, mask)), fn(1, both_of(shifted_down<4>(codes), mask));
}
// fn(place, integers) of neighbouring outputs from `place` on, of integers of four outputs after the other in a and in b in turn.
template <class Fn>
inline void interleaved(Bytes a, Bytes b, Fn fn) {
    fn(0, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b));
    fn(16, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b));
}
// The same of the words of a and b, one after the other, times the words of `weights`.
template <class Fn>
inline void weighed_pairs(Bytes a, Bytes b, Bytes weights, Fn fn) {
    interleaved(_mm512_madd_epi16(_mm512_unpacklo_epi16(a, b), weights), _mm512_madd_epi16(_mm512_unpackhi_epi16(a, b), weights), fn);
}
// The i-th four bytes of each lane of 128 bits, four times.
template <int i>
inline Bytes each_four(Bytes a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(i * 0x55)); }
// In each lane of 128 bits: to[i] gets the i-th four bytes of all four.
inline void transpose_lanes(const Bytes *m, Bytes *to) {
    const Bytes a = _mm512_unpacklo_epi32(m[0], m[1]), b = _mm512_unpackhi_epi32(m[0], m[1]);
    const Bytes c = _mm512_unpacklo_epi32(m[2], m[3]), d = _mm512_unpackhi_epi32(m[2], m[3]);
    to[0] = _mm512_unpacklo_epi64(a, c), to[1] = _mm512_unpackhi_epi64(a, c);
    to[2] = _mm512_unpacklo_epi64(b, d), to[3] = _mm512_unpackhi_epi64(b, d);
}
// In each lane of 128 bits: the i-th four bytes are the sum of m[i]'s.
inline Bytes sums_of_lanes(const Bytes *m) {
    const Bytes a = _mm512_add_epi32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
    const Bytes b = _mm512_add_epi32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
// to[0 .. 4) = the sum of all lanes of 128 bits.
inline void store_four(float *to, __m512 a) {
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}
inline __m512 load_floats(const float *p) { return _mm512_loadu_ps(p); }
inline void store_floats(float *p, __m512 a) { _mm512_storeu_ps(p, a); }
inline void store_bytes(uint8_t *p, Bytes a) { _mm512_store_si512(p, a); }
inline float total(__m512 a) { return _mm512_reduce_add_ps(a); }

}  // namespace
