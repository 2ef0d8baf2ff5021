// Weights in two planes: the first bits of every code, and the others, which are read for chosen inputs only.
//
// A code of `bits` bits is first << second_bits | second. An input that is not chosen is multiplied with the middle of the codes
// that share its first bits. So with x_i in integers, and the sums over the inputs of one part of a group (32 inputs that share
// scales, or half of them):
//
//   sum x_i level_i = 2^s sum x_i first_i + sum over chosen x_i second_i + (2^s - 1) / 2 sum over others x_i - zero sum x_i
//
// The first plane lies group of inputs by group: tiles of 64 outputs, in each its planes of 4, 2 or 1 bits, in each units of 64
// bytes. A unit has output t in byte 2 (t % 32) + e, e the parity of the input; from bit P f on, f = 2 h + t / 32, of the pair of
// inputs u + U h of a part, where u is the unit and a part has U of them. So a load, a shift and a mask give what one instruction
// multiplies with a pair of x. The second plane has a line for each input: 64 outputs take 8 bytes a bit, output t in byte
// t % (8 s) from bit s (t / (8 s)) on.
#pragma once

#include "core/formats.h"
#include "core/sums.h"
#include "core/words.h"

namespace {

constexpr int kTileOutputs = 64;
constexpr int64_t kTilesAhead = 6;  // of the prefetch; 2 and 12 were slower where two threads ask for all that memory gives

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
        const int64_t part = i / (2 * pairs), pair = i % (2 * pairs) / 2, field = 2 * (pair / units) + o % 64 / 32;
        return tile[(part * units + pair % units) * 64 + 2 * (o % 32) + i % 2] >> (P * field) & ((1 << P) - 1);
    }
    // The first bits of input i of a group and output o.
    static int first_code(const uint8_t *group, int64_t o, int64_t i) {
        const uint8_t *tile = group + o / 64 * tile_bytes;
        if constexpr (first == 3) return first_at<2>(tile, o, i) | first_at<1>(tile + 512, o, i) << 2;
        else return first_at<first>(tile, o, i);
    }
    static int second_code(const uint8_t *line, int64_t o) {
        return line[o / 64 * line_tile + o % line_tile] >> (o % 64 / line_tile * second) & ((1 << second) - 1);
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

// What a row of x has for one group: its integers, and the chosen inputs.
struct LevelGroup {
    int8_t x[kGroup];
    int32_t twice[16];               // each pair of the integers, two times
    const uint8_t *line[2][kGroup];  // of the chosen inputs of each part, their number made even
    int8_t value[2][kGroup];
    int count[2];
    int32_t sum[2], chosen[2];       // of the integers, and of those that are chosen
};

// chosen: a bit for each input.
template <class F>
inline void prepare(LevelGroup &to, const int8_t *x, uint32_t chosen, const uint8_t *lines, int64_t stride) {
    using S = Split<F>;
    std::memcpy(to.x, x, kGroup);
#if MOYU_INTEGERS
    for (int p = 0; p < 16; p += 8) {
        const __m256i pairs = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x + 2 * p)));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to.twice + p), _mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 16)));
    }
#endif
    for (int part = 0; part < S::parts; ++part) {
        constexpr int size = 2 * S::pairs;
        int32_t sum = 0, own = 0;
        for (int i = 0; i < size; ++i) sum += x[size * part + i];
        int count = 0;
        for (uint32_t left = S::parts == 1 ? chosen : chosen >> (16 * part) & 0xffff; left != 0; left &= left - 1) {
            const int i = size * part + __builtin_ctz(left);
            own += x[i];
            to.line[part][count] = lines + i * stride;
            to.value[part][count++] = x[i];
        }
        if (count % 2) to.line[part][count] = to.line[part][count - 1], to.value[part][count] = 0;
        to.count[part] = count, to.sum[part] = sum, to.chosen[part] = own;
    }
}

// What a row of x has for one group all of whose inputs are chosen: its integers by four, and their sum in each part.
struct WholeGroup {
    int32_t x[kGroup / 4], sum[2];
};
template <class F>
inline void prepare(WholeGroup &to, const int8_t *x) {
    std::memcpy(to.x, x, kGroup);
    constexpr int size = 2 * Split<F>::pairs;
    for (int part = 0; part < Split<F>::parts; ++part) {
        to.sum[part] = 0;
        for (int i = 0; i < size; ++i) to.sum[part] += x[size * part + i];
    }
}

// A bit for each of `count` bytes that is not 0; null = all.
inline uint32_t bits_of(const uint8_t *mask, int count) {
    const uint32_t all = count == kGroup ? ~0u : (1u << count) - 1;
    if (mask == nullptr) return all;
#if MOYU_INTEGERS
    if (count == kGroup) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(mask));
        return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
    }
#endif
    uint32_t bits = 0;
    for (int i = 0; i < count; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
    return bits;
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
                total += S::first_code(first, o, i) * g.x[i];
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

constexpr int kSums = 128 / kBytes;                    // registers of 16-bit sums for 64 outputs, in their order
constexpr int kRowsTogether = kBytes == 64 ? 4 : 2;    // rows whose sums the registers hold
constexpr int kWholeTogether = kBytes == 64 ? 4 : 1;   // the same where sums have 32 bits
constexpr int64_t kWholeRows = kBytes == 64 ? 1 : 2;   // from which on joining codes is faster

// fn(pair, k, codes) for the pairs of inputs of one part of a group and the registers k of 64 outputs: what a plane of P bits has there.
template <int P, int pairs, class Fn>
inline void each_field(const uint8_t *units, Fn fn) {
    constexpr int count = pairs * P / 4, loads = 64 / kBytes;
    const Bytes mask = every((1 << P) - 1);
#pragma GCC unroll 16
    for (int u = 0; u < count; ++u) {
        Bytes codes[loads];
        for (int k = 0; k < loads; ++k) codes[k] = load_some(units + 64 * u + kBytes * k, kBytes);
        const auto field = [&](auto f) {
            for (int k = 0; k < loads; ++k) fn(u + f() / 2 * count, f() % 2 * loads + k, field_of<f() * P>(codes[k], mask));
        };
        using std::integral_constant;
        field(integral_constant<int, 0>{}), field(integral_constant<int, 1>{});
        if constexpr (P <= 2) field(integral_constant<int, 2>{}), field(integral_constant<int, 3>{});
        if constexpr (P == 1) {
            field(integral_constant<int, 4>{}), field(integral_constant<int, 5>{});
            field(integral_constant<int, 6>{}), field(integral_constant<int, 7>{});
        }
    }
}
// The same of all first bits: fn(pair, k, codes, shift); the codes are of bits from `shift` on.
template <class F, class Fn>
inline void each_first(const uint8_t *tile, int part, Fn fn) {
    using S = Split<F>;
    constexpr int P = S::first == 3 ? 2 : S::first, size = 256 * P / S::parts;
    each_field<P, S::pairs>(tile + size * part, [&](int pair, int k, Bytes codes) { fn(pair, k, codes, std::integral_constant<int, 0>{}); });
    if constexpr (S::first == 3)
        each_field<1, S::pairs>(tile + 512 + 256 / S::parts * part, [&](int pair, int k, Bytes codes) { fn(pair, k, codes, std::integral_constant<int, 2>{}); });
}

// Scales and offsets of 64 outputs from output o on, one part of a group.
template <class S>
struct TileScales {
    static constexpr int count = kTileOutputs / kLanes;
    typename Wide::Reg scale[count], offset[count];
    TileScales(const typename S::Fields &fields, int64_t o) {
        for (int i = 0; i < count; ++i) S::template columns<Wide>(fields, o + kLanes * i, scale[i], offset[i]);
    }
    // y[at .. at + kLanes) += integers and a rest, times the scales and what a row of x has for the group.
    void add(int at, typename Wide::Reg levels, typename Wide::Reg by, typename Wide::Reg offset_by, float *y) const {
        const int i = at / kLanes;
        auto total = add_product(levels, Wide::times(scale[i], by), load_floats(y + at));
        if (S::has_offset) total = add_product(offset[i], offset_by, total);
        store_floats(y + at, total);
    }
};

// y[0 .. 64) of `rows` rows += a tile of one group, all of whose bits are read: both planes are joined into codes once for all rows,
// and an instruction multiplies four inputs. Their sum is exact, as it is in add_tile: the results are the same in every bit.
template <class F>
MOYU_ONCE void add_whole_tile(const WholeGroup *g, const uint8_t *const *lines, const uint8_t *tile, int64_t line_at,
                              const typename F::Scales::Fields *fields, const float *by, int64_t rows, int64_t o, float *y,
                              int64_t y_stride) {
    using S = Split<F>;
    constexpr int fours = S::pairs / 2, sums = 2 * kSums;
    for (int part = 0; part < S::parts; ++part) {
        Bytes first[S::pairs][kSums], codes[fours][sums];
        each_first<F>(tile, part, [&](int pair, int k, Bytes some, auto shift) {
            const Bytes moved = shifted_up<S::second + shift()>(some);
            first[pair][k] = shift() == 0 ? moved : either_of(first[pair][k], moved);
        });
#pragma GCC unroll 16
        for (int pair = 0; pair < S::pairs; ++pair) {
            const uint8_t *const *two = lines + 2 * (S::pairs * part + pair);
            two_lines<S::second>(two[0] + line_at, two[1] + line_at, [&](int k, Bytes some) {
                first[pair][k] = either_of(first[pair][k], some);
                if constexpr (F::stands_signed) first[pair][k] = opposite_signs(first[pair][k]);
            });
        }
#pragma GCC unroll 8
        for (int four = 0; four < fours; ++four)
            for (int k = 0; k < kSums; ++k) {
                codes[four][2 * k] = unpack_low_16(first[2 * four][k], first[2 * four + 1][k]);
                codes[four][2 * k + 1] = unpack_high_16(first[2 * four][k], first[2 * four + 1][k]);
            }
        const TileScales<typename F::Scales> own(fields[part], o);
        const auto some = [&](int64_t r, auto together) {
            constexpr int R = together();
            Bytes total[R][sums];
            for (int i = 0; i < R; ++i)
                for (auto &t : total[i]) t = set_32(-F::lift * g[r + i].sum[part]);
#pragma GCC unroll 8
            for (int four = 0; four < fours; ++four)
                for (int i = 0; i < R; ++i) {
                    const Bytes x = set_32(g[r + i].x[fours * part + four]);
                    for (int k = 0; k < sums; ++k) total[i][k] = add_products<F::stands_signed>(total[i][k], codes[four][k], x);
                }
            for (int i = 0; i < R; ++i) {
                const auto own_by = Wide::set(by[r + i]), offset_by = Wide::set(by[r + i] * static_cast<float>(g[r + i].sum[part]));
                for (int k = 0; k < kSums; ++k)
                    interleaved(total[i][2 * k], total[i][2 * k + 1], [&](int place, Bytes integers) {
                        own.add(kTileOutputs / kSums * k + place, in_floats(integers), own_by, offset_by, y + (r + i) * y_stride);
                    });
            }
        };
        int64_t r = 0;
        for (; r + kWholeTogether <= rows; r += kWholeTogether) some(r, std::integral_constant<int, kWholeTogether>{});
        for (; r < rows; ++r) some(r, std::integral_constant<int, 1>{});
    }
}

// y[0 .. 64) of R rows += a tile of one group.
template <class F, int R>
MOYU_ONCE void add_tile(const LevelGroup *g, const uint8_t *tile, int64_t line_at, const typename F::Scales::Fields *fields,
                        const float *by, int64_t o, float *y, int64_t y_stride) {
    using S = Split<F>;
    for (int part = 0; part < S::parts; ++part) {
        Bytes first[R][kSums], more[R][kSums];
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < kSums; ++k) first[r][k] = set_16(-S::first_lift * g[r].sum[part]), more[r][k] = set_16(0);
        each_first<F>(tile, part, [&](int pair, int k, Bytes codes, auto shift) {
            for (int r = 0; r < R; ++r) {
                Bytes &sum = shift() == 0 ? first[r][k] : more[r][k];
                sum = sum_16(sum, pairs_16(codes, set_32(g[r].twice[S::pairs * part + pair])));
            }
        });
        for (int r = 0; r < R && S::first == 3; ++r)
            for (int k = 0; k < kSums; ++k) first[r][k] = sum_16(first[r][k], shifted_up<2>(more[r][k]));
        const TileScales<typename F::Scales> own(fields[part], o);
        for (int r = 0; r < R; ++r) {
            Bytes second[kSums];
            for (auto &sum : second) sum = set_16(-S::second_lift * g[r].chosen[part]);
            for (int c = 0; c < g[r].count[part]; c += 2) {
                int16_t two;
                std::memcpy(&two, g[r].value[part] + c, 2);
                const Bytes x = set_16(two);
                two_lines<S::second>(g[r].line[part][c] + line_at, g[r].line[part][c + 1] + line_at,
                                     [&](int k, Bytes codes) { second[k] = sum_16(second[k], pairs_16(codes, x)); });
            }
            const Bytes weights = set_32(1 << 16 | 1 << S::second);
            const float rest = level_rest<F>(g[r], part, S::first_lift, S::second_lift);
            const auto own_by = Wide::set(by[r]), offset_by = Wide::set(by[r] * static_cast<float>(g[r].sum[part]));
            for (int k = 0; k < kSums; ++k)
                weighed_pairs(first[r][k], second[k], weights, [&](int place, Bytes integers) {
                    own.add(kTileOutputs / kSums * k + place, plus(in_floats(integers), rest), own_by, offset_by, y + r * y_stride);
                });
        }
    }
}
#else
constexpr int64_t kWholeRows = kMostRows + 1;  // never
#endif

// y (rows, stride) += the product, outputs of tiles `share` of the weight; rows: at most kMostRows. Returns how many inputs any row
// chooses.
template <class F>
MOYU_ONCE int64_t levels_of(const Weight &w, const Rounded &x, const uint8_t *mask, int64_t mask_stride, int64_t rows,
                            const Share &share, float *y, int64_t y_stride) {
    using S [[maybe_unused]] = Split<F>;
    const auto *first = static_cast<const uint8_t *>(w.first);
    const int64_t groups = groups_of(w.inputs), q = w.outputs;
    const int64_t tiles = share.end - share.begin;
    const auto inputs_of_group = [&](int64_t g) {
        return static_cast<int>(w.inputs - g * kGroup < kGroup ? w.inputs - g * kGroup : kGroup);
    };
    // The tile that is prefetched: kTilesAhead after the present one, of the groups after this one where a thread has few tiles.
    int64_t chosen = 0, ahead_group = tiles ? kTilesAhead / tiles : 0, ahead_tile = tiles ? kTilesAhead % tiles : 0;
    const int64_t ahead_lines = ahead_group + 1;  // groups from one to that whose lines are prefetched with it
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t *own = first + g * w.first_stride, *scales = scales_of(w, g / F::Scales::span);
        const int64_t place = g % F::Scales::span;
        const int inputs = inputs_of_group(g);
        const uint8_t *lines = piece_of(w, g * kGroup);
        uint32_t bits[kMostRows], any = 0, every_row = ~0u;
        float by[kMostRows];
        for (int64_t r = 0; r < rows; ++r) {
            bits[r] = bits_of(mask ? mask + r * mask_stride + g * kGroup : nullptr, inputs);
            by[r] = x.row(r).scale[g];
            any |= bits[r], every_row &= bits[r];
        }
        chosen += __builtin_popcount(any);
        const bool tail = kTileOutputs * share.end > q, whole = kWholeRows <= rows && every_row == bits_of(nullptr, inputs);
        LevelGroup group[kMostRows];
        for (int64_t r = 0; r < rows && (tail || !whole); ++r)
            prepare<F>(group[r], x.row(r).ordered + g * kGroup, bits[r], lines, w.stride);
        int64_t tile = share.begin;
#if MOYU_INTEGERS
        typename F::Scales::Fields fields[S::parts];
        for (int part = 0; part < S::parts; ++part) fields[part] = F::Scales::of_columns(scales, place * S::parts + part, q);
        WholeGroup all[kMostRows];
        const uint8_t *line[kGroup];
        for (int64_t r = 0; r < rows && whole; ++r) prepare<F>(all[r], x.row(r).ordered + g * kGroup);
        for (int i = 0; i < kGroup && whole; ++i) line[i] = lines + (i < inputs ? i : 0) * w.stride;
        const int64_t later = g + ahead_lines;
        const uint32_t later_bits =
            later < groups ? bits_of(mask ? mask + later * kGroup : nullptr, inputs_of_group(later)) : 0;
        for (; tile < share.end && (tile + 1) * kTileOutputs <= q; ++tile) {
            if (ahead_group < groups)
                prefetch<S::tile_bytes>(first + ahead_group * w.first_stride + (share.begin + ahead_tile) * S::tile_bytes);
            if (++ahead_tile == tiles) ahead_tile = 0, ++ahead_group;
            const int64_t line_at = tile * S::line_tile;
            if (line_at % kLineBytes == 0 || tile == share.begin)
                for (uint32_t left = later_bits; left != 0; left &= left - 1)
                    prefetch<kLineBytes>(piece_of(w, later * kGroup + __builtin_ctz(left)) + line_at);
            if (whole) {
                add_whole_tile<F>(all, line, own + tile * S::tile_bytes, line_at, fields, by, rows, tile * kTileOutputs,
                                  y + tile * kTileOutputs, y_stride);
                continue;
            }
            const auto add = [&](auto together, int64_t r) {
                add_tile<F, together()>(group + r, own + tile * S::tile_bytes, line_at, fields, by + r, tile * kTileOutputs,
                                        y + r * y_stride + tile * kTileOutputs, y_stride);
            };
            int64_t r = 0;
            for (; r + kRowsTogether <= rows; r += kRowsTogether) add(std::integral_constant<int, kRowsTogether>{}, r);
            for (; r < rows; ++r) add(std::integral_constant<int, 1>{}, r);
        }
#endif
        const int64_t from = tile * kTileOutputs, to = share.end * kTileOutputs < q ? share.end * kTileOutputs : q;
        for (int64_t r = 0; r < rows && from < to; ++r)
            add_levels_plainly<F>(group[r], own, scales, place, by[r], from, to, q, y + r * y_stride);
    }
    return chosen;
}

// out (rows, outputs): this thread's outputs of a weight in planes; the mask says which inputs are chosen, null = all. sums (rows,
// padded outputs): the thread's own. Returns the bytes read, for all threads the first one.
template <class T>
int64_t levels_share(const LinearArgs &a, const Weight &w, const Rounded &x, const moyu::Team &team, float *sums) {
    const int64_t q = w.outputs, stride = round_up(q);
    const Share share((q + kTileOutputs - 1) / kTileOutputs, team);
    const int64_t begin = share.begin * kTileOutputs, end = share.end * kTileOutputs < q ? share.end * kTileOutputs : q;
    if (begin >= end && team.thread != 0) return 0;
    for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t o = begin; o < end; ++o) sums[r * stride + o] = 0.0f;
    int64_t chosen = 0;
    with_levels(w.format, [&](auto f) {
        chosen = levels_of<decltype(f)>(w, x, a.mask, a.mask_stride, a.rows, share, sums, stride);
    });
    T *out = static_cast<T *>(a.out);
    for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t o = begin; o < end; ++o) narrow(sums[r * stride + o] + bias_at<T>(a.bias, o), out[r * q + o]);
    return team.thread == 0 ? levels_bytes(w, chosen) + (a.bias ? bytes_of<T>(q) : 0) : 0;
}

template <class T>
int64_t grouped_levels(const LinearArgs &a) {
    const Weight &w = a.weight;
    Rounded x;
    float *sums;
    int64_t *bytes;
    const int64_t size = a.rows * round_up(w.outputs);
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
            for (int u = 0; u < units; ++u, from += 64)
                for (int field = 0; field < 8 / P; ++field)
                    for (int t = 0; t < 32; ++t) {
                        uint16_t two, before;
                        uint8_t *to = &codes[32 * (field % 2) + t][2 * (part * S::pairs + units * (field / 2) + u)];
                        std::memcpy(&two, from + 2 * t, 2), std::memcpy(&before, to, 2);
                        two = static_cast<uint16_t>((two >> (P * field) & ((1 << P) - 1) * 0x0101) << shift | before);
                        std::memcpy(to, &two, 2);
                    }
    };
    if constexpr (S::first == 3) {
        plane(std::integral_constant<int, 2>{}, tile, S::second);
        plane(std::integral_constant<int, 1>{}, tile + 512, S::second + 2);
    } else {
        plane(std::integral_constant<int, S::first>{}, tile, S::second);
    }
    for (int i = 0; i < inputs && lines; ++i)
        for (int o = 0; o < kTileOutputs; ++o) codes[o][i] |= static_cast<uint8_t>(S::second_code(lines[i] + line_at, o));
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
        float *row = rows + team.thread * round_up(a.weight.inputs);
        if (a.weight.order == moyu::Order::parted) return values_of_parts<T>(a, team, row);
        if (a.weight.order != moyu::Order::planes) return values_share<T>(a, team, row);
        with_levels(a.weight.format, [&](auto f) { values_of_planes<decltype(f), T>(a, team); });
    };
    run_parallel(threads_for(a.weight.outputs * a.weight.inputs * bytes_of<T>(1), a.weight.outputs, a.threads), work);
}

}  // namespace
