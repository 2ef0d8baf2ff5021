// Integer products of groups in 256 bits: AVX2, and the same with VNNI's one instruction for two where there is one.
#pragma once

#include "isa/integers_vector.h"

namespace {

using Bytes = __m256i;
using Wide = Eight;
constexpr int kBytes = 32, kLanes = 8;
constexpr int kBeside = 2;  // groups of x.halves that lie side by side (see core/rounded.h)
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
constexpr bool kFourProducts = true;  // an instruction sums four products of bytes
#else
constexpr bool kFourProducts = false;
#endif
constexpr int kLifted = 0;  // there are products of signed bytes

inline Bytes every(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
inline Bytes both_of(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes either_of(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
template <int n> inline Bytes shifted_down(Bytes a) { return _mm256_srli_epi16(a, n); }  // bits of the neighbour come in
template <int n> inline Bytes shifted_up(Bytes a) { return _mm256_slli_epi16(a, n); }
inline Bytes looked_up(const int8_t *table, Bytes codes) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table))), codes);
}
inline Bytes opposite_signs(Bytes bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }  // of signed bytes: + 128, as unsigned
inline Bytes lifted(Bytes bytes) { return bytes; }

inline __m128i load_up_to_16(const uint8_t *p, int count) {
    if (count == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    if (count == 8) return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm_cvtsi32_si128(four);
}
inline Bytes load_some(const uint8_t *p, int count) {  // 32 or 16, 0 beyond
    return count == 32 ? load_bytes(p) : _mm256_zextsi128_si256(load_up_to_16(p, 16));
}
// See core/planes.h. Of each group: its 4 bytes shifted by 0 to 3, its 8 bytes by 0 and 2.
inline Bytes spread_fours(const uint8_t *p, int groups) {
    const __m256i all = _mm256_castsi128_si256(load_up_to_16(p, 4 * groups));
    return _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
                             _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3));
}
inline Bytes spread_eights(const uint8_t *p, int groups) {
    const __m256i all = _mm256_castsi128_si256(load_up_to_16(p, 8 * groups));
    return _mm256_srlv_epi64(_mm256_permute4x64_epi64(all, 0x50), _mm256_setr_epi64x(0, 2, 0, 2));
}
// Of one group: 16 bytes shifted by 0 and 4, 8 by 0 to 6, 4 by 0 to 7.
inline Bytes nibbles_in_order(const uint8_t *p) {
    const __m256i all = _mm256_castsi128_si256(load_up_to_16(p, 16));
    return _mm256_srlv_epi64(_mm256_permute4x64_epi64(all, 0x44), _mm256_setr_epi64x(0, 0, 4, 4));
}
inline Bytes pairs_in_order(const uint8_t *p) {
    return _mm256_srlv_epi64(_mm256_broadcastq_epi64(load_up_to_16(p, 8)), _mm256_setr_epi64x(0, 2, 4, 6));
}
inline Bytes bits_in_order(const uint8_t *p) {
    return _mm256_srlv_epi32(_mm256_broadcastd_epi32(load_up_to_16(p, 4)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// acc + for each of 8 lanes the sum of 4 products of unsigned and signed bytes. Without VNNI pairs are summed in 16 bits first:
// 2 * 128 * 127 fits, 2 * 255 * 127 does not, and no caller has more than 128.
inline __m256i add_bytes(__m256i acc, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(acc, u, s);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}
// The same of two signed ones: the sign of `w` goes to `s`.
inline __m256i add_signed(__m256i acc, __m256i w, __m256i s) {
    return add_bytes(acc, _mm256_sign_epi8(w, w), _mm256_sign_epi8(s, w));
}
template <bool Signed>
inline Bytes add_products(Bytes acc, Bytes w, Bytes s) { return Signed ? add_signed(acc, w, s) : add_bytes(acc, w, s); }
// The sums of both, of codes of at most 6 bits where they are unsigned: 4 * 63 * 127 fits into 16 bits.
template <bool Signed>
inline Bytes two_products(Bytes front, Bytes s, Bytes back, Bytes t) {
#if !(defined(__AVX512VNNI__) && defined(__AVX512VL__)) && !defined(__AVXVNNI__)
    if (!Signed)
        return _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(front, s), _mm256_maddubs_epi16(back, t)), _mm256_set1_epi16(1));
#endif
    return add_products<Signed>(add_products<Signed>(_mm256_setzero_si256(), front, s), back, t);
}

inline __m256 in_floats(Bytes integers) { return _mm256_cvtepi32_ps(integers); }
inline __m256 plus(__m256 a, float b) { return _mm256_add_ps(a, _mm256_set1_ps(b)); }
inline __m256 add_product(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256 widened(__m256 a) { return a; }
// The scales of groups k and k + 1 in the lanes of their products; parts: those of 8 groups, two for each where Halves = 2.
template <int Halves>
inline __m256 own_scales(const __m256 *parts, int k, int half) {
    const int a = Halves == 1 ? k : 2 * (k % 4) + half, b = a + Halves;
    return _mm256_permutevar8x32_ps(parts[Halves == 1 ? 0 : k / 4], _mm256_setr_epi32(a, a, a, a, b, b, b, b));
}
// The lower and the upper lanes of two.
inline __m256i lower(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x20); }
inline __m256i upper(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x31); }
// The first 16 bytes of each group of two registers of whole groups, and the others.
inline Bytes first_halves(Bytes a, Bytes b) { return lower(a, b); }
inline Bytes second_halves(Bytes a, Bytes b) { return upper(a, b); }

// add(integers of 8 neighbouring outputs, the first of them) of four registers whose bytes unpack_four has put together, of 32
// outputs: 0 .. 3 and 16 .. 19, 4 .. 7 and 20 .. 23, 8 .. 11 and 24 .. 27, the others.
template <class Fn>
inline void in_order_32(const Bytes *s, Fn add) {
    add(lower(s[0], s[1]), 0), add(lower(s[2], s[3]), 8), add(upper(s[0], s[1]), 16), add(upper(s[2], s[3]), 24);
}
// Of four registers of 16 bits, of 64 outputs: 0 .. 7 and 32 .. 39, 8 and 40, 16 and 48, 24 and 56.
template <class Fn>
inline void in_order_16(const Bytes *s, Fn add) {
    const auto wide = [&](__m256i integers, int64_t o) {
        add(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(integers)), o);
        add(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(integers, 1)), o + 8);
    };
    wide(lower(s[0], s[1]), 0), wide(lower(s[2], s[3]), 16), wide(upper(s[0], s[1]), 32), wide(upper(s[2], s[3]), 48);
}
inline Bytes unpack_low_8(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes unpack_high_8(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes unpack_low_16(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes unpack_high_16(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
inline Bytes set_16(int value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
inline Bytes set_32(int value) { return _mm256_set1_epi32(value); }
inline Bytes sum_16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline Bytes pairs_16(Bytes u, Bytes s) { return _mm256_maddubs_epi16(u, s); }
// fn(k, codes) for the registers k of 64 outputs: the codes of two lines of `bits` bits (see core/levels.h), one after the other.
template <int bits, class Fn>
inline void two_lines(const uint8_t *a, const uint8_t *b, Fn fn) {
    const Bytes mask = every((1 << bits) - 1);
    const auto both = [&](int from) {
        return either_of(_mm256_cvtepu8_epi16(load_up_to_16(a + from, 16)), shifted_up<8>(_mm256_cvtepu8_epi16(load_up_to_16(b + from, 16))));
    };
    if constexpr (bits == 4) {
        for (int k = 0; k < 2; ++k) {
            const Bytes codes = both(16 * k);
            fn(k, both_of(codes, mask)), fn(2 + k, both_of(shifted_down<4>(codes), mask));
        }
    } else {
        Bytes codes;
        if constexpr (bits == 2) codes = both(0);
        else codes = _mm256_broadcastsi128_si256(_mm_unpacklo_epi8(load_up_to_16(a, 8), load_up_to_16(b, 8)));
        if constexpr (bits == 1) codes = _mm256_srlv_epi64(codes, _mm256_setr_epi64x(0, 0, 1, 1));
        fn(0, both_of(codes, mask)), fn(1, both_of(shifted_down<2>(codes), mask));
        fn(2, both_of(shifted_down<4>(codes), mask)), fn(3, both_of(shifted_down<6>(codes), mask));
    }
}
// fn(place, integers) of neighbouring outputs from `place` on, of integers of four outputs after the other in a and in b in turn.
template <class Fn>
inline void interleaved(Bytes a, Bytes b, Fn fn) { fn(0, lower(a, b)), fn(8, upper(a, b)); }
// The same of the words of a and b, one after the other, times the words of `weights`.
template <class Fn>
inline void weighed_pairs(Bytes a, Bytes b, Bytes weights, Fn fn) {
    interleaved(_mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), weights), _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), weights), fn);
}
// The i-th four bytes of each lane of 128 bits, four times.
template <int i>
inline Bytes each_four(Bytes a) { return _mm256_shuffle_epi32(a, i * 0x55); }
// In each lane of 128 bits: to[i] gets the i-th four bytes of all four.
inline void transpose_lanes(const Bytes *m, Bytes *to) {
    const Bytes a = _mm256_unpacklo_epi32(m[0], m[1]), b = _mm256_unpackhi_epi32(m[0], m[1]);
    const Bytes c = _mm256_unpacklo_epi32(m[2], m[3]), d = _mm256_unpackhi_epi32(m[2], m[3]);
    to[0] = _mm256_unpacklo_epi64(a, c), to[1] = _mm256_unpackhi_epi64(a, c);
    to[2] = _mm256_unpacklo_epi64(b, d), to[3] = _mm256_unpackhi_epi64(b, d);
}
// In each lane of 128 bits: the i-th four bytes are the sum of m[i]'s.
inline Bytes sums_of_lanes(const Bytes *m) {
    const Bytes a = _mm256_add_epi32(_mm256_unpacklo_epi32(m[0], m[1]), _mm256_unpackhi_epi32(m[0], m[1]));
    const Bytes b = _mm256_add_epi32(_mm256_unpacklo_epi32(m[2], m[3]), _mm256_unpackhi_epi32(m[2], m[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}
// to[0 .. 4) = the sum of all lanes of 128 bits.
inline void store_four(float *to, __m256 a) {
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}
inline __m256 load_floats(const float *p) { return _mm256_loadu_ps(p); }
inline void store_floats(float *p, __m256 a) { _mm256_storeu_ps(p, a); }
inline void store_bytes(uint8_t *p, Bytes a) { _mm256_store_si256(reinterpret_cast<__m256i *>(p), a); }
inline float total(__m256 a) { return sum_lanes(a); }

}  // namespace
