// Weights in two planes: the first bits of every code, and the others, which are read for chosen inputs only.
//
// A code of `bits` bits is first << second_bits | second. An input that is not chosen is multiplied with the middle of the codes
// that share its first bits. So with x_i in integers, and the sums over the inputs of one part of a group (32 inputs that share
// scales, or half of them):
//
//   sum x_i level_i = 2^s sum x_i first_i + sum over chosen x_i second_i + (2^s - 1) / 2 sum over others x_i - zero sum x_i
//
// The first plane lies group of inputs by group: tiles of 32 outputs, in each its planes of 4, 2 or 1 bits, in each units of 32
// bytes. A unit has the outputs t in byte 2 (t % 16) + e, e the parity of the input; from bit P f on, f = 2 h + t / 16, the pair of
// inputs u + U h of a part, where u is the unit and a part has U of them. So a load, a shift and a mask give what one instruction
// multiplies with a pair of x. The second plane has a line for each input: 64 outputs take 8 bytes a bit, output t in byte
// t % 16 (of 32 outputs after 32 for 4 bits, t % 8 for one).
#pragma once

#include "core/formats.h"
#include "core/sums.h"

namespace {

constexpr int kTileOutputs = 64;
constexpr int kLevelRows = 8;   // of x that share what is loaded
constexpr int64_t kTilesAhead = 2;

template <class F>
struct Split {
    static constexpr int second = F::further, first = F::bits - second;
    static constexpr int parts = F::Scales::halves, pairs = 16 / parts;       // of a group, of a part
    static constexpr int first_lift = first == 4 ? 8 : 0, second_lift = second == 4 ? 8 : 0;  // keep sums in 16 bits
    static constexpr int64_t tile_bytes = 256 * first, line_tile = 8 * second;  // of 64 outputs: of a group, of an input
    static int64_t tiles(int64_t q) { return (q + kTileOutputs - 1) / kTileOutputs; }
    static int64_t first_bytes(int64_t q) { return tiles(q) * tile_bytes; }   // of a group
    static int64_t second_bytes(int64_t q) { return tiles(q) * line_tile; }   // of an input

    template <int P>
    static int first_at(const uint8_t *tile, int64_t o, int64_t i) {
        constexpr int units = pairs * P / 4;
        const int64_t part = i / (2 * pairs), pair = i % (2 * pairs) / 2, lane = o % 32;
        const int64_t field = 2 * (pair / units) + lane / 16;
        return tile[(part * units + pair % units) * 32 + 2 * (lane % 16) + i % 2] >> (P * field) & ((1 << P) - 1);
    }
    // The first bits of input i of a group and output o.
    static int first_code(const uint8_t *group, int64_t o, int64_t i) {
        const uint8_t *tile = group + o / 32 * (tile_bytes / 2);
        if constexpr (first == 3) return first_at<2>(tile, o, i) | first_at<1>(tile + 256, o, i) << 2;
        else return first_at<first>(tile, o, i);
    }
    static int second_code(const uint8_t *line, int64_t o) {
        constexpr int wide = second == 1 ? 8 : 16, some = wide * 8 / second;  // bytes that so many outputs take
        return line[o / some * wide + o % wide] >> (o % some / wide * second) & ((1 << second) - 1);
    }
};

// f(F{}) for the struct F of a format that has levels.
template <class Fn>
inline void with_levels(Format format, Fn f) {
    with_format(format, [&](auto of) {
        if constexpr (decltype(of)::splits) f(of);
        else moyu::fail("a weight whose format has no levels came to their loops");
    });
}

// Bytes of a weight in planes of which so many inputs are chosen.
MOYU_ONCE int64_t levels_bytes(const Weight &w, int64_t chosen) {
    const int64_t groups = groups_of(w.inputs);
    int64_t bytes = groups * scale_bytes(w);
    with_levels(w.format, [&](auto f) {
        using S = Split<decltype(f)>;
        bytes += groups * S::first_bytes(w.outputs) + chosen * S::second_bytes(w.outputs);
    });
    return bytes;
}

// What a row of x has for one group: its integers, each pair of them as often as a register has place, and the chosen inputs.
struct LevelGroup {
    alignas(64) uint8_t factors[16 * 32];
    const uint8_t *line[2][kGroup];  // of the chosen inputs of each part, their number made even
    int8_t value[2][kGroup];
    int count[2];
    int32_t sum[2], chosen[2];       // of the integers, and of those that are chosen
};

template <class F>
inline void prepare(LevelGroup &to, const int8_t *x, const uint8_t *mask, int inputs, const uint8_t *lines, int64_t stride) {
    using S = Split<F>;
    for (int p = 0; p < 16; ++p)
        for (int k = 0; k < 32; ++k) to.factors[32 * p + k] = static_cast<uint8_t>(x[2 * p + k % 2]);
    for (int part = 0; part < S::parts; ++part) {
        int count = 0;
        int32_t sum = 0, chosen = 0;
        for (int i = 2 * S::pairs * part; i < 2 * S::pairs * (part + 1); ++i) {
            sum += x[i];
            if (i >= inputs || !(mask == nullptr || mask[i])) continue;
            chosen += x[i];
            to.line[part][count] = lines + i * stride;
            to.value[part][count++] = x[i];
        }
        to.count[part] = count;
        if (count % 2) to.line[part][count] = to.line[part][count - 1], to.value[part][count] = 0;
        to.sum[part] = sum, to.chosen[part] = chosen;
    }
}

// What is added to 2^s (sum of first) + (sum of second), both less their lifts.
template <class F>
inline float level_rest(const LevelGroup &g, int part, int first_lift, int second_lift) {
    using S = Split<F>;
    return static_cast<float>(((first_lift << S::second) - F::zero) * g.sum[part] + second_lift * g.chosen[part]) +
           F::middle * static_cast<float>(g.sum[part] - g.chosen[part]);
}

// y[o] += outputs `from` to `to` of one group, in plain loops.
template <class F>
void add_levels_plainly(const LevelGroup &g, const uint8_t *first, const uint8_t *scales, int64_t place, float by, int64_t from,
                        int64_t to, int64_t q, float *y) {
    using S = Split<F>;
    for (int part = 0; part < S::parts; ++part) {
        const auto fields = F::Scales::of_columns(scales, place * S::parts + part, q);
        const float rest = level_rest<F>(g, part, 0, 0);
        for (int64_t o = from; o < to; ++o) {
            int32_t total = 0, more = 0;
            for (int i = 2 * S::pairs * part; i < 2 * S::pairs * (part + 1); ++i)
                total += S::first_code(first, o, i) * static_cast<int8_t>(g.factors[32 * (i / 2) + i % 2]);
            for (int c = 0; c < g.count[part]; ++c) more += S::second_code(g.line[part][c], o) * g.value[part][c];
            const auto own = F::Scales::at(fields, o, o);
            y[o] += (static_cast<float>((total << S::second) + more) + rest) * (own.scale * by);
            if (F::Scales::has_offset) y[o] += own.offset * (by * static_cast<float>(g.sum[part]));
        }
    }
}

#if MOYU_INTEGERS
template <int n>
inline Bytes field_of(Bytes codes, Bytes mask) {
    if constexpr (n == 0) return both_of(codes, mask);
    else return both_of(shifted_down<n>(codes), mask);
}

// low and high += the units of a plane of P bits of one part of a group, of outputs 0 .. 15 and 16 .. 31 of a tile.
template <int P, int pairs>
inline void add_units(const uint8_t *units, const uint8_t *factors, Bytes &low, Bytes &high) {
    constexpr int count = pairs * P / 4;
    const Bytes mask = every((1 << P) - 1);
#pragma GCC unroll 16
    for (int u = 0; u < count; u += kBytes / 32) {
        const Bytes codes = load_some(units + 32 * u, kBytes);
        const auto pair = [&](auto h) {
            const Bytes x = load_some(factors + 32 * (h() * count + u), kBytes);
            low = sum_16(low, pairs_16(field_of<2 * h() * P>(codes, mask), x));
            high = sum_16(high, pairs_16(field_of<(2 * h() + 1) * P>(codes, mask), x));
        };
        pair(std::integral_constant<int, 0>{});
        if constexpr (P <= 2) pair(std::integral_constant<int, 1>{});
        if constexpr (P == 1) pair(std::integral_constant<int, 2>{}), pair(std::integral_constant<int, 3>{});
    }
}

inline __m128i load_16(const uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }
inline __m128i load_8(const uint8_t *p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)); }
inline __m256i interleaved(__m128i a, __m128i b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(a, b)), _mm_unpackhi_epi8(a, b), 1);
}

// sums[0 .. 4) += the second codes of two inputs times their integers, of 64 outputs, 16 a register.
template <int bits>
inline void add_two_lines(const uint8_t *a, const uint8_t *b, __m256i factor, __m256i *sums) {
    const auto add = [&](int k, __m256i codes) {
        sums[k] = _mm256_add_epi16(sums[k], _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8((1 << bits) - 1)), factor));
    };
    if constexpr (bits == 4) {
        for (int k = 0; k < 2; ++k) {
            const __m256i codes = interleaved(load_16(a + 16 * k), load_16(b + 16 * k));
            add(2 * k, codes), add(2 * k + 1, _mm256_srli_epi16(codes, 4));
        }
    } else if constexpr (bits == 2) {
        const __m256i codes = interleaved(load_16(a), load_16(b));
        add(0, codes), add(1, _mm256_srli_epi16(codes, 2)), add(2, _mm256_srli_epi16(codes, 4)), add(3, _mm256_srli_epi16(codes, 6));
    } else {
        __m256i codes = _mm256_broadcastsi128_si256(_mm_unpacklo_epi8(load_8(a), load_8(b)));
        codes = _mm256_srlv_epi64(codes, _mm256_setr_epi64x(0, 0, 1, 1));
        add(0, codes), add(1, _mm256_srli_epi16(codes, 2)), add(2, _mm256_srli_epi16(codes, 4)), add(3, _mm256_srli_epi16(codes, 6));
    }
}

// y[0 .. 64) += a tile of one group.
template <class F>
inline void add_tile(const LevelGroup &g, const uint8_t *tile, int64_t line_at, const typename F::Scales::Fields *fields, float by,
                     int64_t o, float *y) {
    using S = Split<F>;
    using Eights = typename Eight::Reg;
    for (int part = 0; part < S::parts; ++part) {
        __m256i first[4], second[4];
        const uint8_t *factors = g.factors + 32 * S::pairs * part;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const uint8_t *units = tile + half * (S::tile_bytes / 2);
            Bytes low = once_16(-S::first_lift * g.sum[part]), high = low;
            if constexpr (S::first == 3) {
                Bytes more = set_16(0), most = more;
                add_units<2, S::pairs>(units + 128 / S::parts * 2 * part, factors, low, high);
                add_units<1, S::pairs>(units + 256 + 128 / S::parts * part, factors, more, most);
                low = sum_16(low, shifted_up<2>(more)), high = sum_16(high, shifted_up<2>(most));
            } else {
                add_units<S::first, S::pairs>(units + 128 / S::parts * S::first * part, factors, low, high);
            }
            first[2 * half] = folded(low), first[2 * half + 1] = folded(high);
        }
        const __m256i start = _mm256_set1_epi16(static_cast<int16_t>(-S::second_lift * g.chosen[part]));
        for (auto &sum : second) sum = start;
        for (int c = 0; c < g.count[part]; c += 2) {
            int16_t two;
            std::memcpy(&two, g.value[part] + c, 2);
            add_two_lines<S::second>(g.line[part][c] + line_at, g.line[part][c + 1] + line_at, _mm256_set1_epi16(two), second);
        }
        const __m256i weights = _mm256_set1_epi32(1 << 16 | 1 << S::second);
        const Eights rest = Eight::set(level_rest<F>(g, part, S::first_lift, S::second_lift)), own_by = Eight::set(by);
        const Eights offset_by = Eight::set(by * static_cast<float>(g.sum[part]));
        for (int k = 0; k < 4; ++k) {
            const __m256i front = _mm256_madd_epi16(_mm256_unpacklo_epi16(first[k], second[k]), weights);
            const __m256i back = _mm256_madd_epi16(_mm256_unpackhi_epi16(first[k], second[k]), weights);
            const __m256i eight[2] = {_mm256_permute2x128_si256(front, back, 0x20), _mm256_permute2x128_si256(front, back, 0x31)};
            for (int h = 0; h < 2; ++h) {
                const int64_t at = 16 * k + 8 * h;
                Eights scale, offset, total = _mm256_loadu_ps(y + at);
                F::Scales::template columns<Eight>(fields[part], o + at, scale, offset);
                const Eights values = _mm256_add_ps(_mm256_cvtepi32_ps(eight[h]), rest);
                total = _mm256_fmadd_ps(values, _mm256_mul_ps(scale, own_by), total);
                if (F::Scales::has_offset) total = _mm256_fmadd_ps(offset, offset_by, total);
                _mm256_storeu_ps(y + at, total);
            }
        }
    }
}
#endif

// y (rows, stride) += the product, outputs of tiles `share` of the weight; rows: at most kLevelRows.
template <class F>
MOYU_ONCE void levels_of(const Weight &w, const Rounded &x, const uint8_t *mask, int64_t mask_stride, int64_t rows, const Share &share,
               float *y, int64_t y_stride) {
    using S = Split<F>;
    const auto *first = static_cast<const uint8_t *>(w.first);
    const int64_t groups = groups_of(w.inputs), q = w.outputs;
    LevelGroup group[kLevelRows];
    for (int64_t g = 0; g < groups; ++g) {
        const int inputs = static_cast<int>(w.inputs - g * kGroup < kGroup ? w.inputs - g * kGroup : kGroup);
        const uint8_t *own = first + g * w.first_stride, *scales = scales_of(w, g / F::Scales::span);
        const int64_t place = g % F::Scales::span;
        for (int64_t r = 0; r < rows; ++r)
            prepare<F>(group[r], x.row(r).ordered + g * kGroup, mask ? mask + r * mask_stride + g * kGroup : nullptr, inputs,
                       piece_of(w, g * kGroup), w.stride);
        int64_t tile = share.begin;
#if MOYU_INTEGERS
        typename F::Scales::Fields fields[S::parts];
        for (int part = 0; part < S::parts; ++part) fields[part] = F::Scales::of_columns(scales, place * S::parts + part, q);
        const uint8_t *next[kGroup];  // lines of the next group that the first row chooses
        int nexts = 0;
        for (int64_t i = (g + 1) * kGroup; i < w.inputs && i < (g + 2) * kGroup; ++i)
            if (mask == nullptr || mask[i]) next[nexts++] = piece_of(w, i);
        for (; tile < share.end && (tile + 1) * kTileOutputs <= q; ++tile) {
            const int64_t ahead = tile + kTilesAhead;
            const uint8_t *then = ahead < share.end ? own + ahead * S::tile_bytes
                                                    : own + w.first_stride + (share.begin + ahead - share.end) * S::tile_bytes;
            if (ahead < share.end || g + 1 < groups)
                for (int64_t b = 0; b < S::tile_bytes; b += kLineBytes) prefetch<kLineBytes>(then + b);
            const int64_t line_at = tile * S::line_tile;
            if (line_at % kLineBytes == 0 || tile == share.begin)
                for (int i = 0; i < nexts; ++i) prefetch<kLineBytes>(next[i] + line_at);
            for (int64_t r = 0; r < rows; ++r)
                add_tile<F>(group[r], own + tile * S::tile_bytes, line_at, fields, x.row(r).scale[g], tile * kTileOutputs,
                            y + r * y_stride + tile * kTileOutputs);
        }
#endif
        const int64_t from = tile * kTileOutputs, to = share.end * kTileOutputs < q ? share.end * kTileOutputs : q;
        for (int64_t r = 0; r < rows && from < to; ++r)
            add_levels_plainly<F>(group[r], own, scales, place, x.row(r).scale[g], from, to, q, y + r * y_stride);
    }
}

// out (rows, outputs): this thread's outputs of a weight in planes; the mask says which inputs are chosen, null = all. sums: the
// thread's own, of kLevelRows or all rows and the padded outputs. Returns the bytes read; those of all threads together are what any row chooses.
template <class T>
int64_t levels_share(const LinearArgs &a, const Weight &w, const Rounded &x, const moyu::Team &team, float *sums) {
    const int64_t q = w.outputs, stride = round_up(q);
    const Share share((q + kTileOutputs - 1) / kTileOutputs, team);
    const int64_t begin = share.begin * kTileOutputs, end = share.end * kTileOutputs < q ? share.end * kTileOutputs : q;
    T *out = static_cast<T *>(a.out);
    for (int64_t from = 0; from < a.rows; from += kLevelRows) {
        const int64_t rows = a.rows - from < kLevelRows ? a.rows - from : kLevelRows;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t o = begin; o < end; ++o) sums[r * stride + o] = 0.0f;
        const uint8_t *mask = a.mask ? a.mask + from * a.mask_stride : nullptr;
        with_levels(w.format, [&](auto f) {
            levels_of<decltype(f)>(w, x.row(from), mask, a.mask_stride, rows, share, sums, stride);
        });
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t o = begin; o < end; ++o) narrow(sums[r * stride + o] + bias_at<T>(a.bias, o), out[(from + r) * q + o]);
    }
    if (team.thread != 0) return 0;
    int64_t chosen = 0;
    for (int64_t i = 0; i < w.inputs; ++i) {
        bool any = a.mask == nullptr;
        for (int64_t r = 0; r < a.rows && !any; ++r) any = a.mask[r * a.mask_stride + i] != 0;
        chosen += any;
    }
    return levels_bytes(w, chosen) + (a.bias ? bytes_of<T>(q) : 0);
}

template <class T>
int64_t grouped_levels(const LinearArgs &a) {
    const Weight &w = a.weight;
    Rounded x;
    float *sums;
    int64_t *bytes;
    const int64_t size = kLevelRows * round_up(w.outputs);
    in_scratch([&](Arena &arena) {
        x = Rounded::take(arena, a.rows, w.inputs);
        sums = arena.take<float>(a.threads * size);
        bytes = arena.take<int64_t>(a.threads);
    });
    fill_rows<T>(x, a.x, a.x_stride, a.rows, w.inputs);
    auto work = [&](const moyu::Team &team) {
        bytes[team.thread] = levels_share<T>(a, w, x, team, sums + team.thread * size);
    };
    return total_of(bytes, a.threads, threads_for(levels_bytes(w, 0), w.outputs, a.threads), work);
}

// codes[output][input] of a tile and a group, the first bits shifted to their place; `lines` of all inputs add the others, null = none.
template <class F>
void codes_of_tile(const uint8_t *tile, const uint8_t *const *lines, int64_t line_at, int inputs, uint8_t (*codes)[kGroup]) {
    using S = Split<F>;
    for (int o = 0; o < kTileOutputs; ++o)
        for (int i = 0; i < kGroup; ++i) codes[o][i] = 0;
    const auto plane = [&](auto bits, const uint8_t *from, int shift) {
        constexpr int P = bits(), units = S::pairs * P / 4;
        for (int part = 0; part < S::parts; ++part)
            for (int u = 0; u < units; ++u, from += 32)
                for (int h = 0; h < 4 / P; ++h)
                    for (int half = 0; half < 2; ++half)
                        for (int t = 0; t < 16; ++t) {
                            uint16_t two, before;
                            uint8_t *to = &codes[16 * half + t][2 * (part * S::pairs + units * h + u)];
                            std::memcpy(&two, from + 2 * t, 2), std::memcpy(&before, to, 2);
                            two = static_cast<uint16_t>((two >> (P * (2 * h + half)) & ((1 << P) - 1) * 0x0101) << shift | before);
                            std::memcpy(to, &two, 2);
                        }
    };
    for (int half = 0; half < 2; ++half, tile += S::tile_bytes / 2, codes += 32) {
        if constexpr (S::first == 3) {
            plane(std::integral_constant<int, 2>{}, tile, S::second);
            plane(std::integral_constant<int, 1>{}, tile + 256, S::second + 2);
        } else {
            plane(std::integral_constant<int, S::first>{}, tile, S::second);
        }
        for (int i = 0; i < inputs && lines; ++i)
            for (int o = 0; o < 32; ++o) codes[o][i] |= static_cast<uint8_t>(S::second_code(lines[i] + line_at, 32 * half + o));
    }
}

// The values of a thread's outputs of a weight in planes; `first`: of its first bits alone.
template <class F, class T>
void values_of_planes(const ValuesArgs &a, const moyu::Team &team) {
    using S = Split<F>;
    const Weight &w = a.weight;
    const Share share(S::tiles(w.outputs), team);
    alignas(64) uint8_t codes[kTileOutputs][kGroup];
    for (int64_t tile = share.begin; tile < share.end; ++tile)
        for (int64_t g = 0; g < groups_of(w.inputs); ++g) {
            const int inputs = static_cast<int>(w.inputs - g * kGroup < kGroup ? w.inputs - g * kGroup : kGroup);
            const uint8_t *lines[kGroup];
            for (int i = 0; i < inputs; ++i) lines[i] = piece_of(w, g * kGroup + i);
            const uint8_t *own = static_cast<const uint8_t *>(w.first) + g * w.first_stride + tile * S::tile_bytes;
            codes_of_tile<F>(own, a.first ? nullptr : lines, tile * S::line_tile, inputs, codes);
            const uint8_t *scales = scales_of(w, g / F::Scales::span);
            for (int part = 0; part < S::parts; ++part) {
                const auto fields = F::Scales::of_columns(scales, g % F::Scales::span * S::parts + part, w.outputs);
                for (int64_t k = 0; k < kTileOutputs && tile * kTileOutputs + k < w.outputs; ++k) {
                    const int64_t o = tile * kTileOutputs + k;
                    const auto scale = F::Scales::at(fields, o, o);
                    const float less = (a.first ? F::middle : 0.0f) - static_cast<float>(F::zero);
                    T *to = static_cast<T *>(a.out) + o * w.inputs + g * kGroup;
                    for (int i = 2 * S::pairs * part; i < 2 * S::pairs * (part + 1) && i < inputs; ++i)
                        narrow(scale.scale * (static_cast<float>(codes[k][i]) + less) + scale.offset, to[i]);
                }
            }
        }
}

// out (outputs, inputs) = the weight, dequantised.
template <class T>
void grouped_values(const ValuesArgs &a) {
    float *rows;
    in_scratch([&](Arena &arena) { rows = arena.take<float>(a.threads * round_up(a.weight.inputs)); });
    auto work = [&](const moyu::Team &team) {
        if (a.weight.order != moyu::Order::planes) return values_share<T>(a, team, rows + team.thread * round_up(a.weight.inputs));
        with_levels(a.weight.format, [&](auto f) { values_of_planes<decltype(f), T>(a, team); });
    };
    run_parallel(threads_for(a.weight.outputs * a.weight.inputs * bytes_of<T>(1), a.weight.outputs, a.threads), work);
}

}  // namespace
