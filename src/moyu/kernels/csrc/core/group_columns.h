// Kept columns of a group times what x has for them, for any format of formats/. They share scales: their integers are summed
// first and meet the scales once.
#pragma once

#include "core/rounded.h"

namespace {

// Output by output from `from` on: the end of a column that vectors do not fill, or all of it where there are none.
template <class F>
inline void add_outputs(const Columns &c, const typename F::Scales::Fields &fields, float *y, int64_t from, int64_t q) {
    const int64_t groups = groups_of(q);
    int32_t sum = 0;
    for (int i = 0; i < c.count; ++i) sum += c.v[i];
    for (int64_t o = from; o < q; ++o) {
        int32_t total = 0;
        for (int i = 0; i < c.count; ++i) total += c.v[i] * F::level(c.column[i], o, groups);
        const auto own = F::Scales::at(fields, o, o);
        y[o] += static_cast<float>(total) * (own.scale * c.by);
        if (F::Scales::has_offset) y[o] += static_cast<float>(sum) * (own.offset * c.by);
    }
}

#if MOYU_INTEGERS
// Of a group's columns few are read side by side, each over a whole tile of outputs before the next ones begin: 32 streams of
// half lines cost a fifth to a quarter of the rate at which memory gives them. A tile's integers lie in L1 meanwhile.
constexpr int64_t kTile = 2048;
inline int side_by_side(int left) { return left <= 12 ? left : 8; }

// What is prefetched while some columns are read: the columns after them in this tile, or the first ones' next tile, or,
// after the last, `then`. Tiles begin at byte `from` of the low plane; `high` lies between there and the high plane.
struct Following {
    const uint8_t *line[8];
    int count = 0;
    int64_t high;
    Following(const Columns &c, int end, int64_t tile, int64_t next_tile, bool last, int64_t high) : high(high) {
        if (c.after < 0) return;
        if (end < c.count) {
            for (int i = end; i < c.count && count < 8; ++i) line[count++] = c.column[i] + tile;
        } else if (!last) {
            for (int i = 0; i < c.count && count < 8; ++i) line[count++] = c.column[i] + next_tile;
        } else {
            for (; count < c.after; ++count) line[count] = c.then[count];
        }
    }
    template <int64_t bytes>
    void at(int64_t offset) const {
        for (int i = 0; i < count; ++i) prefetch<bytes>(line[i] + offset);
    }
};

// Sums in 32 bits, of kBytes outputs at a time. Codes stand for code - F::lift.
template <class F>
struct Sums32 {
    static constexpr int lanes = kLanes, step = kBytes, less = F::lift;
    static Bytes begin(int sum) { return set_32(-less * sum); }

    template <bool First>
    static void add(const Columns &c, int first, int count, int64_t from, int64_t n, int64_t groups, Bytes start, Bytes *sums,
                    const Following &ahead) {
        constexpr int low = low_bits(F::bits), high = F::bits - low;
        for (int64_t o = 0; o < n; o += step, sums += 4) {
            Bytes s0 = start, s1 = start, s2 = start, s3 = start;
            if (!First) s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
            if (o * low / 8 % 64 == 0) ahead.at<64>(o * low / 8);
            if (high > 0 && o * high / 8 % 64 == 0) ahead.at<64>(ahead.high + o * high / 8);
            for (int i = first; i < first + count; i += 4) {
                int32_t four;
                std::memcpy(&four, c.v + i, 4);
                const Bytes factor = set_32(four);
                const auto codes = [&](int k) { return F::in_order(c.column[i + k], groups, (from + o) / kGroup); };
                const Bytes one = codes(0), two = codes(1), three = codes(2), last = codes(3);
                const Bytes ab = unpack_low_8(one, two), cd = unpack_low_8(three, last);
                const Bytes ba = unpack_high_8(one, two), dc = unpack_high_8(three, last);
                s0 = add_products<F::stands_signed>(s0, unpack_low_16(ab, cd), factor);
                s1 = add_products<F::stands_signed>(s1, unpack_high_16(ab, cd), factor);
                s2 = add_products<F::stands_signed>(s2, unpack_low_16(ba, dc), factor);
                s3 = add_products<F::stands_signed>(s3, unpack_high_16(ba, dc), factor);
            }
            sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
        }
        ahead.at<128>(n * low / 8);
    }
    template <class Fn>
    static void in_order(const Bytes *s, Fn fn) { in_order_32(s, fn); }
};

// Sums in 16 bits of codes of 4 bits, taken as code - 8: of 2 * kBytes outputs at a time. On the way they may wrap; in the end
// 32 * 127 * 8 fits.
template <class F>
struct Sums16 {
    static constexpr int lanes = 2 * kLanes, step = 2 * kBytes, less = 8;
    static Bytes begin(int sum) { return set_16(-less * sum); }

    template <bool First>
    static void add(const Columns &c, int first, int count, int64_t from, int64_t n, int64_t, Bytes start, Bytes *sums,
                    const Following &ahead) {
        const Bytes low = every(15);
        for (int64_t o = 0; o < n; o += step, sums += 4) {
            Bytes s0 = start, s1 = start, s2 = start, s3 = start;
            if (!First) s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
            if (o % 128 == 0) ahead.at<64>(o / 2);
            for (int i = first; i < first + count; i += 2) {
                int16_t two;
                std::memcpy(&two, c.v + i, 2);
                const Bytes factor = set_16(two);
                const Bytes a = load_some(c.column[i] + (from + o) / 2, kBytes), b = load_some(c.column[i + 1] + (from + o) / 2, kBytes);
                const Bytes ab = unpack_low_8(a, b), ba = unpack_high_8(a, b);
                const auto products = [&](Bytes codes) { return pairs_16(both_of(codes, low), factor); };
                s0 = sum_16(s0, products(ab));
                s1 = sum_16(s1, products(ba));
                s2 = sum_16(s2, products(shifted_down<4>(ab)));
                s3 = sum_16(s3, products(shifted_down<4>(ba)));
            }
            sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
        }
        ahead.at<128>(n / 2);
    }
    template <class Fn>
    static void in_order(const Bytes *s, Fn fn) { in_order_16(s, fn); }
};

// Outputs `begin` to `end` of them, a whole number of steps.
template <class F, class Sums>
inline void add_range(const Columns &c, const typename F::Scales::Fields &fields, float *y, int64_t begin, int64_t end, int64_t q) {
    using S = typename F::Scales;
    constexpr int low = low_bits(F::bits), high = F::bits - low;
    Bytes sums[kTile / Sums::lanes];
    const int64_t groups = groups_of(q);
    int sum = 0;
    for (int i = 0; i < c.count; ++i) sum += c.v[i];
    const float by = c.by, more = static_cast<float>((Sums::less - F::lift) * sum), offset_by = by * static_cast<float>(sum);
    for (int64_t from = begin; from < end; from += kTile) {
        const int64_t n = end - from < kTile ? end - from : kTile;
        const bool last = from + n >= end;
        for (int i = 0, some; i < c.count; i += some) {
            some = side_by_side(c.count - i);
            const bool other = i + some >= c.count && last;  // a piece of another kind follows: its bytes, one after the other
            const int64_t tile = i + some < c.count ? from : from + n;
            const Following ahead(c, i + some, from * low / 8, (from + n) * low / 8, last,
                                  other ? n * low / 8 : groups * 4 * low + tile * (high - low) / 8);
            const int own = i == 0 ? sum : 0;
            if (i == 0) Sums::template add<true>(c, i, some, from, n, groups, Sums::begin(own), sums, ahead);
            else Sums::template add<false>(c, i, some, from, n, groups, Sums::begin(own), sums, ahead);
        }
        for (int64_t o = 0; o < n; o += Sums::step)
            Sums::in_order(sums + o / Sums::lanes, [&](Bytes integers, int64_t place) {
                const int64_t at = from + o + place;
                typename Wide::Reg scale, offset, total = load_floats(y + at), values = in_floats(integers);
                S::template columns<Wide>(fields, at, scale, offset);
                if (Sums::less != F::lift) values = plus(values, more);
                total = add_product(values, Wide::times(scale, Wide::set(by)), total);
                if (S::has_offset) total = add_product(offset, Wide::set(offset_by), total);
                store_floats(y + at, total);
            });
    }
}
#endif

// y (q,) += what Columns says, all of them of one part of a group: `place` of the block.
template <class F>
MOYU_ONCE void add_part(const Columns &c, int64_t place, float *y, int64_t q) {
    const auto fields = F::Scales::of_columns(c.scales, place, q);
    int64_t done = 0;
#if MOYU_INTEGERS
    if constexpr (F::bits == 4 && !F::is_signed) {
        const int64_t end = q / Sums16<F>::step * Sums16<F>::step;
        add_range<F, Sums16<F>>(c, fields, y, 0, end, q);
        done = end;
    }
    const int64_t end = q / Sums32<F>::step * Sums32<F>::step;
    if (end > done) add_range<F, Sums32<F>>(c, fields, y, done, end, q);
    done = end > done ? end : done;
#endif
    add_outputs<F>(c, fields, y, done, q);
}

// y (q,) += what Columns says.
template <class F>
inline void add_columns_of(const Columns &c, float *y, int64_t q) {
    constexpr int halves = F::Scales::halves;
    if constexpr (halves == 1) return add_part<F>(c, c.place, y, q);
    for (int h = 0, from = 0; h < halves; ++h) {
        Columns part = c;
        part.count = h == 0 ? c.first : c.count - c.first;
        if (part.count == 0) continue;
        if (h == 0 && part.count < c.count) part.after = c.after < 0 ? -1 : 0;
        for (int i = 0; i < kGroup; ++i) {
            const bool own = i < part.count;
            part.column[i] = c.column[from + (own ? i : 0)], part.v[i] = own ? c.v[from + i] : 0;
        }
        from += part.count;
        add_part<F>(part, c.place * halves + h, y, q);
    }
}

}  // namespace
