// A piece is what one mask bit keeps: contiguous weights, read once for all rows of x that keep it. Here: the list of
// kept pieces, a few pieces times a row of x (`dot`), a row plus multiples of pieces (`axpy`), and the epilogue.
//
// Pieces are scattered. Measured (two cores of a Zen 5 that stream 50 to 80 GB/s, neurons of 12 kB): one piece after the
// other without prefetch 55 % of the streaming rate; four pieces in lockstep, each line prefetched when the same line of
// the part before it is computed, 90 % and more where the memory is the bound (50 GB/s), and 76 to 85 % where the core is
// (80 GB/s). Two pieces in lockstep give 5 to 10 % less, eight the same; 1.5 kB ahead instead of a whole part 15 % less.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace {

using moyu::LinearArgs;
using moyu::NeuronsArgs;

constexpr int64_t kLineBytes = 64;
constexpr int kTogether = 8;             // pieces read in lockstep, at most
constexpr int64_t kAheadBytes = 1536;    // the least distance of the prefetch in each of them
constexpr int64_t kRowBlock = 32;        // rows of x that are taken together; weights are read once a block
constexpr bool kWide = Vec::width >= 16;
constexpr int kDotRows = kWide ? 4 : 2;  // rows that the registers hold sums of, beside those of their pieces
// When rows of a batch take all that any of them keeps, which is the dense form with zeros for what a row skips (measured,
// docs/LOG.md): few rows wait for memory, so always; more wait for arithmetic, so where they keep most of it anyway. Wide
// registers' columns have no dot product to spare: sooner. Narrow registers have less to share.
constexpr int64_t kFewRows = kWide ? 4 : 2, kSharedPercent = kWide ? 80 : 60, kSharedColumnsPercent = kWide ? 30 : 60;
constexpr int64_t kSerialBytes = 65536;  // less work than this is done before a second thread has woken up

// x of a product, as `multiply` takes it.
template <class T>
using Factor = std::conditional_t<stored_products<T>, T, float>;

template <class F>
void run_parallel(int64_t threads, F &f) {
    moyu::parallel(threads, [](const moyu::Team &team, void *context) { (*static_cast<F *>(context))(team); }, &f);
}

inline int64_t threads_for(int64_t bytes, int64_t pieces, int64_t threads) {
    if (bytes < kSerialBytes) return 1;
    return threads < pieces ? threads : pieces;
}

inline int64_t round_up(int64_t count) { return (count + 31) / 32 * 32; }  // two registers of any Vec

template <class T>
const T *at(const void *data, int64_t offset) {
    return static_cast<const T *>(data) + offset;
}
template <class T>
float bias_at(const void *bias, int64_t i) {
    return bias ? widen(*at<T>(bias, i)) : 0.0f;
}

// Thread `thread`'s part of `count` things.
struct Share {
    int64_t begin, end;
    Share(int64_t count, const moyu::Team &team)
        : begin(count * team.thread / team.threads), end(count * (team.thread + 1) / team.threads) {}
};

// The last elements of a piece, fewer than two registers or (after a longer step) more: the others are 0.
template <class T>
inline auto load2_rest(const T *w, int64_t count) {
    return count >= 2 * Vec::width ? Vec::load2(w) : Vec::load2_part(w, static_cast<int>(count));
}

// Products of 2 * width elements: where they are not taken as stored (see vec_avx512.h), in fp32.
inline Vec::Pair load_factor(const float *x) { return {Vec::load(x), Vec::load(x + Vec::width)}; }
inline void add_products(Vec::Pair &sum, const Vec::Pair &w, const Vec::Pair &x) {
    sum.a = Vec::fma(w.a, x.a, sum.a);
    sum.b = Vec::fma(w.b, x.b, sum.b);
}
inline void add_products(Vec::Reg &sum, const Vec::Pair &w, const Vec::Pair &x) {
    sum = Vec::fma(w.b, x.b, Vec::fma(w.a, x.a, sum));
}
inline Vec::Reg whole(const Vec::Pair &sum) { return Vec::add(sum.a, sum.b); }
struct One { Vec::Reg all; };
template <class W, class X>
inline void add_products(One &sum, const W &w, const X &x) { add_products(sum.all, w, x); }
inline Vec::Reg whole(const One &sum) { return sum.all; }
template <class T>
inline Vec::Pair load_weights(const T *w) { return Vec::load2(w); }
template <class T>
inline Vec::Pair load_weights_part(const T *w, int count) { return Vec::load2_part(w, count); }

// Rows of x as factors, padded with zeros, so that the loops below need no tail on its side.
template <class T>
void load_rows(const void *x, int64_t stride, int64_t rows, int64_t n, Factor<T> *out) {
    constexpr int W = Vec::width;
    for (int64_t r = 0; r < rows; ++r, out += round_up(n)) {
        const T *row = at<T>(x, r * stride);
        if constexpr (stored_products<T>) {
            for (int64_t i = 0; i < n; ++i) out[i] = row[i];
            for (int64_t i = n; i < round_up(n); ++i) out[i] = T{};
        } else {
            for (int64_t i = 0; i < n; i += 2 * W) {
                const auto pair = load2_rest(row + i, n - i);
                Vec::store(out + i, pair.a);
                Vec::store(out + i + W, pair.b);
            }
        }
    }
}

// The pieces that at least one row keeps, ascending; null mask = all. `any` has room for `pieces` bytes.
inline int64_t list_kept(const uint8_t *mask, int64_t stride, int64_t rows, int64_t pieces, uint8_t *any,
                         int32_t *kept) {
    if (mask != nullptr && rows > 1) {
        for (int64_t i = 0; i < pieces; ++i) any[i] = mask[i];
        for (int64_t r = 1; r < rows; ++r)
            for (int64_t i = 0; i < pieces; ++i) any[i] |= mask[r * stride + i];
        mask = any;
    }
    if (mask != nullptr) return list_set<Vec>(mask, pieces, kept);
    for (int64_t i = 0; i < pieces; ++i) kept[i] = static_cast<int32_t>(i);
    return pieces;
}

// How many pieces to read in lockstep. Wide registers: 4 of a page or more; shorter ones leave room in L1 (which a multiple of
// the page size between the streams does not) for 8, and each step's overhead then serves twice the bytes: 10 % at 2 kB.
// Narrow ones (Zen 3, 32 kB of L1): 4, and of shorter pieces 6, 3 to 10 % faster where they are scattered; 8 are slower in
// both. But where each of several rows takes its own of them, arithmetic is the bound, and 8 fill the registers better: 10 %.
inline int together(int64_t piece_bytes, bool own) {
    if (kWide) return piece_bytes < 4096 ? 8 : 4;
    return own ? 8 : piece_bytes < 4096 ? 6 : 4;
}

// The pieces of one step of a thread that has the list's part `share`: the part is cut into `streams` runs, a step takes
// one piece of each, so that even where everything is kept the lockstep has that many long streams. Null `kept` = all.
struct Taken {
    int64_t piece[kTogether], next[kTogether];  // what to compute, and what the step `hop` later will
    int count = 0;
    Taken() = default;
    Taken(const int32_t *kept, const Share &share, int streams, int64_t step, int64_t hop) {
        const int64_t run = steps(share, streams);
        for (int64_t at = share.begin + step; at < share.end && count < streams; at += run) {
            const int64_t later = step + hop < run && at + hop < share.end ? at + hop : at;
            piece[count] = kept ? kept[at] : at;
            next[count++] = kept ? kept[later] : later;
        }
    }
    // Steps until a stream has gone kAheadBytes further: more than one for short pieces.
    static int64_t hop(int64_t piece_bytes) {
        return piece_bytes > 0 ? (kAheadBytes + piece_bytes - 1) / piece_bytes : 1;
    }
    static int64_t steps(const Share &share, int streams) { return (share.end - share.begin + streams - 1) / streams; }
    // Which of them a row keeps, as positions among them; null = all.
    int kept_by(const uint8_t *row_mask, int *which) const {
        int kept = 0;
        for (int c = 0; c < count; ++c) {  // without a branch that nobody can predict
            which[kept] = c;
            kept += row_mask == nullptr || row_mask[piece[c]] != 0;
        }
        return kept;
    }
};

// One matrix of weights: where it begins and the elements from one piece to the next.
struct Part {
    const void *weight;
    int64_t stride;
};

// Which pieces of a step each row takes: its own, or all rows all of them (`shared`). Then a line of weights is loaded once
// for several rows, and what a row skips is dropped before it counts.
struct Takers {
    int which[kRowBlock][kTogether], own[kRowBlock];
    bool shared;
    Takers(const Taken &taken, const uint8_t *mask, int64_t stride, int64_t rows) {
        int64_t kept = 0;
        for (int64_t r = 0; r < rows; ++r) {
            own[r] = taken.kept_by(mask && rows > 1 ? mask + r * stride : nullptr, which[r]);
            kept += own[r];
        }
        shared = rows > 1 && (rows <= kFewRows || 100 * kept >= kSharedPercent * rows * taken.count);
        for (int64_t r = 0; r < rows && shared && kept < rows * taken.count; ++r) {
            own[r] = taken.count;
            for (int c = 0; c < taken.count; ++c) which[r][c] = c;
        }
    }
    // Whether row r of `mask` keeps a piece that it took.
    bool keeps(const uint8_t *mask, int64_t stride, int64_t r, int64_t piece) const {
        return !shared || mask == nullptr || mask[r * stride + piece];
    }
};

// The weights of some of the pieces of a step, and what is computed next: its lines are prefetched meanwhile.
template <class T>
struct Weights {
    const T *now[kTogether], *then[kTogether];
    int count = 0;
    Weights() = default;
    Weights(const Taken &taken, const int *which, int kept, const Part &part, const Part &after,
            const int64_t *after_pieces) : count(kept) {
        for (int i = 0; i < kept; ++i) {
            now[i] = at<T>(part.weight, taken.piece[which[i]] * part.stride);
            then[i] = at<T>(after.weight, after_pieces[which[i]] * after.stride);
        }
    }
};

// Into the second level of cache: into the first, neurons of 12 kB came at 76 % of a Zen 4's ceiling instead of 92 %
// (docs/LOG.md); on a Xeon it is the same either way.
// Forced inline: GCC finds that a function of prefetches alone has no effect, and drops its calls.
#if defined(__GNUC__) || defined(__clang__)
template <int64_t bytes>
__attribute__((always_inline)) inline void prefetch(const void *address) {
    for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char *>(address) + i, 0, 2);
}
#else
template <int64_t bytes>
inline void prefetch(const void *) {}
#endif

// out[c] = w[c] · x for C pieces in lockstep, a pair of sums for each; one where that would take all registers or
// where a product is one instruction.
template <int C, bool Ahead, class T>
inline void dot_together(const Weights<T> &w, const Factor<T> *x, int64_t n, float *out) {
    constexpr int W = Vec::width, U = C <= 2 ? 2 : 1;  // at least 4 independent sums hide the latency of an FMA
    using Sum = std::conditional_t<stored_products<T> || (!kWide && C > 4), One, Vec::Pair>;
    Sum sum[C][U] = {};
    const T *now[C], *then[C];
    for (int c = 0; c < C; ++c) now[c] = w.now[c];
    for (int c = 0; c < C; ++c) then[c] = w.then[c];
    int64_t i = 0;
    for (; i + U * 2 * W <= n; i += U * 2 * W)
        for (int u = 0; u < U; ++u) {
            const int64_t k = i + u * 2 * W;
            const auto factor = load_factor(x + k);
            for (int c = 0; c < C; ++c) {
                if (Ahead) prefetch<2 * W * sizeof(T)>(then[c] + k);
                add_products(sum[c][u], load_weights(now[c] + k), factor);
            }
        }
    for (; i < n; i += 2 * W) {
        const auto factor = load_factor(x + i);
        for (int c = 0; c < C; ++c) {
            if (n - i >= 2 * W) add_products(sum[c][0], load_weights(now[c] + i), factor);
            else add_products(sum[c][0], load_weights_part(now[c] + i, static_cast<int>(n - i)), factor);
        }
    }
    for (int c = 0; c < C; ++c) {
        auto total = whole(sum[c][0]);
        for (int u = 1; u < U; ++u) total = Vec::add(total, whole(sum[c][u]));
        out[c] = Vec::sum(total);
    }
}

// y += sum over C pieces in lockstep of scale[c] * w[c]; y is padded and ordered as Vec::load2 takes the weights.
template <int C, bool Ahead, class T>
inline void axpy_together(const Weights<T> &w, const float *scale, float *y, int64_t n) {
    constexpr int W = Vec::width;
    typename Vec::Reg s[C];
    for (int c = 0; c < C; ++c) s[c] = Vec::set(scale[c]);
    const T *now[C], *then[C];
    for (int c = 0; c < C; ++c) now[c] = w.now[c];
    for (int c = 0; c < C; ++c) then[c] = w.then[c];
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        auto y0 = Vec::load(y + i), y1 = Vec::load(y + i + W);
        for (int c = 0; c < C; ++c) {
            if (Ahead) prefetch<2 * W * sizeof(T)>(then[c] + i);
            const auto pair = Vec::load2(now[c] + i);
            y0 = Vec::fma(pair.a, s[c], y0);
            y1 = Vec::fma(pair.b, s[c], y1);
        }
        Vec::store(y + i, y0);
        Vec::store(y + i + W, y1);
    }
    if (i < n) {
        auto y0 = Vec::load(y + i), y1 = Vec::load(y + i + W);
        for (int c = 0; c < C; ++c) {
            const auto pair = load2_rest(now[c] + i, n - i);
            y0 = Vec::fma(pair.a, s[c], y0);
            y1 = Vec::fma(pair.b, s[c], y1);
        }
        Vec::store(y + i, y0);
        Vec::store(y + i + W, y1);
    }
}

// The two for as many pieces as there are. Ahead for the first row that takes them: the others find them in the cache.
template <bool Ahead, class T>
inline void dot(const Weights<T> &w, const Factor<T> *x, int64_t n, float *out) {
    switch (w.count) {
        case 8: return dot_together<8, Ahead>(w, x, n, out);
        case 7: return dot_together<7, Ahead>(w, x, n, out);
        case 6: return dot_together<6, Ahead>(w, x, n, out);
        case 5: return dot_together<5, Ahead>(w, x, n, out);
        case 4: return dot_together<4, Ahead>(w, x, n, out);
        case 3: return dot_together<3, Ahead>(w, x, n, out);
        case 2: return dot_together<2, Ahead>(w, x, n, out);
        case 1: return dot_together<1, Ahead>(w, x, n, out);
    }
}

template <bool Ahead, class T>
inline void axpy(const Weights<T> &w, const float *scale, float *y, int64_t n) {
    switch (w.count) {
        case 8: return axpy_together<8, Ahead>(w, scale, y, n);
        case 7: return axpy_together<7, Ahead>(w, scale, y, n);
        case 6: return axpy_together<6, Ahead>(w, scale, y, n);
        case 5: return axpy_together<5, Ahead>(w, scale, y, n);
        case 4: return axpy_together<4, Ahead>(w, scale, y, n);
        case 3: return axpy_together<3, Ahead>(w, scale, y, n);
        case 2: return axpy_together<2, Ahead>(w, scale, y, n);
        case 1: return axpy_together<1, Ahead>(w, scale, y, n);
    }
}

// The two for R rows at once and C pieces from `first` on: a load of weights serves R rows, one of x C pieces. A sum is one
// register for both halves of a line: C * R of them are enough to hide the latency of an FMA.
template <int C, int R, bool Ahead, class T>
inline void dot_shared(const Weights<T> &w, int first, const Factor<T> *x, int64_t n, float (*out)[kTogether]) {
    constexpr int W = Vec::width;
    const int64_t stride = round_up(n);
    typename Vec::Reg sum[C][R];
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) sum[c][r] = Vec::zero();
    const T *now[C], *then[C];
    for (int c = 0; c < C; ++c) now[c] = w.now[first + c];
    for (int c = 0; c < C; ++c) then[c] = w.then[first + c];
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        decltype(load_factor(x)) factor[R];
        for (int r = 0; r < R; ++r) factor[r] = load_factor(x + r * stride + i);
        for (int c = 0; c < C; ++c) {
            if (Ahead) prefetch<2 * W * sizeof(T)>(then[c] + i);
            const auto part = load_weights(now[c] + i);
            for (int r = 0; r < R; ++r) add_products(sum[c][r], part, factor[r]);
        }
    }
    for (int r = 0; r < R && i < n; ++r)
        for (int c = 0; c < C; ++c)
            add_products(sum[c][r], load_weights_part(now[c] + i, static_cast<int>(n - i)), load_factor(x + r * stride + i));
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) out[r][first + c] = Vec::sum(sum[c][r]);
}

template <int C, int R, bool Ahead, class T>
inline void axpy_shared(const Weights<T> &w, int first, const float (*scale)[kTogether], float *y, int64_t n) {
    constexpr int W = Vec::width;
    const int64_t stride = round_up(n);
    const T *now[C], *then[C];
    for (int c = 0; c < C; ++c) now[c] = w.now[first + c];
    for (int c = 0; c < C; ++c) then[c] = w.then[first + c];
    auto add = [&](int64_t i, auto load) {
        Vec::Pair sum[R];
        for (int r = 0; r < R; ++r) sum[r] = {Vec::load(y + r * stride + i), Vec::load(y + r * stride + i + W)};
        for (int c = 0; c < C; ++c) {
            const auto part = load(c);
            for (int r = 0; r < R; ++r) {
                const auto s = Vec::set(scale[r][first + c]);
                sum[r].a = Vec::fma(part.a, s, sum[r].a);
                sum[r].b = Vec::fma(part.b, s, sum[r].b);
            }
        }
        for (int r = 0; r < R; ++r) {
            Vec::store(y + r * stride + i, sum[r].a);
            Vec::store(y + r * stride + i + W, sum[r].b);
        }
    };
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W)
        add(i, [&](int c) {
            if (Ahead) prefetch<2 * W * sizeof(T)>(then[c] + i);
            return Vec::load2(now[c] + i);
        });
    if (i < n) add(i, [&](int c) { return Vec::load2_part(now[c] + i, static_cast<int>(n - i)); });
}

// As many pieces as fit into the registers beside R rows, then one by one.
template <int R, bool Ahead, class T>
inline void dot_rows(const Weights<T> &w, const Factor<T> *x, int64_t n, float (*out)[kTogether]) {
    constexpr int C = stored_products<T> ? 4 : 8 / kDotRows;
    int c = 0;
    for (; c + C <= w.count; c += C) dot_shared<C, R, Ahead>(w, c, x, n, out);
    for (; c < w.count; ++c) dot_shared<1, R, Ahead>(w, c, x, n, out);
}
template <int R, bool Ahead, class T>
inline void axpy_rows(const Weights<T> &w, const float (*scale)[kTogether], float *y, int64_t n) {
    int c = 0;
    for (; c + 4 <= w.count; c += 4) axpy_shared<4, R, Ahead>(w, c, scale, y, n);
    for (; c < w.count; ++c) axpy_shared<1, R, Ahead>(w, c, scale, y, n);
}

// f(r, rows at once, whether they are the first) for as many rows as there are in groups of `most` (4 or 2) and of 2;
// returns how many that is.
template <int most, class F>
inline int64_t in_groups(int64_t rows, F f) {
    using std::integral_constant;
    int64_t r = 0;
    if (most == 4 && rows >= 4) f(r, integral_constant<int, 4>{}, std::true_type{}), r = 4;
    else if (rows >= 2) f(r, integral_constant<int, 2>{}, std::true_type{}), r = 2;
    for (; most == 4 && r + 4 <= rows; r += 4) f(r, integral_constant<int, 4>{}, std::false_type{});
    for (; r + 2 <= rows; r += 2) f(r, integral_constant<int, 2>{}, std::false_type{});
    return r;
}

// The two on all rows of x or of y: `weights(r)` are those that row r takes.
template <class T, class W>
inline void project(const Takers &takers, W weights, const Factor<T> *x, int64_t rows, int64_t n,
                    float (*out)[kTogether]) {
    const int64_t stride = round_up(n);
    int64_t r = 0;
    if (takers.shared) {
        const Weights<T> w = weights(0);
        r = in_groups<kDotRows>(rows, [&](int64_t from, auto at_once, auto ahead) {
            dot_rows<at_once(), ahead()>(w, x + from * stride, n, out + from);
        });
    }
    for (; r < rows; ++r) {
        if (r == 0) dot<true>(weights(r), x, n, out[r]);
        else dot<false>(weights(r), x + r * stride, n, out[r]);
    }
}
template <class T, class W>
inline void accumulate(const Takers &takers, W weights, const float (*scale)[kTogether], float *y, int64_t rows,
                       int64_t n) {
    const int64_t stride = round_up(n);
    int64_t r = 0;
    if (takers.shared) {
        const Weights<T> w = weights(0);
        r = in_groups<4>(rows, [&](int64_t from, auto at_once, auto ahead) {
            axpy_rows<at_once(), ahead()>(w, scale + from, y + from * stride, n);
        });
    }
    for (; r < rows; ++r) {
        if (r == 0) axpy<true>(weights(r), scale[r], y, n);
        else axpy<false>(weights(r), scale[r], y + r * stride, n);
    }
}

inline void clear(float *sums, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows * round_up(n); ++i) sums[i] = 0.0f;
}

// sums += more, both (rows, padded n): `more` in its order, `sums` as Vec::load2 took the weights (see write_sums).
template <class T>
void add_sums(const float *more, int64_t rows, int64_t n, float *sums) {
    constexpr int W = Vec::width;
    for (int64_t i = 0; i < rows * round_up(n); i += 2 * W)
        for (int k = 0; k < 2 * W; ++k) sums[i + (Vec::split<T> ? k % 2 * W + k / 2 : k)] += more[i + k];
}

// out (rows, n) = sum over threads of sums (threads, rows, padded n) + bias, always in the order of the threads, for the
// elements that are this thread's; returns their bytes of bias. The sums lie as Vec::load2 took the weights: where it
// splits, the even elements, then the odd ones; in their order where `split` is false.
template <class T, bool split = Vec::split<T>>
int64_t write_sums(const float *sums, int64_t threads, int64_t rows, int64_t n, const void *bias, T *out,
                   const moyu::Team &team) {
    constexpr int W = Vec::width;
    const int64_t padded = round_up(n);
    const Share blocks((n + 2 * W - 1) / (2 * W), team);
    const int64_t begin = blocks.begin * 2 * W, end = blocks.end * 2 * W < n ? blocks.end * 2 * W : n;
    for (int64_t row = 0; row < rows; ++row, out += n)
        for (int64_t i = begin; i < end; i += 2 * W) {
            const float *from = sums + row * padded + i;
            auto a = Vec::load(from), b = Vec::load(from + W);
            for (int64_t t = 1; t < threads; ++t) {
                a = Vec::add(a, Vec::load(from + t * rows * padded));
                b = Vec::add(b, Vec::load(from + t * rows * padded + W));
            }
            float total[2 * W];
            Vec::store(total, a);
            Vec::store(total + W, b);
            const int count = n - i < 2 * W ? static_cast<int>(n - i) : 2 * W;
            for (int k = 0; k < count; ++k) {
                const float sum = split ? total[k % 2 * W + k / 2] : total[k];
                narrow(sum + bias_at<T>(bias, i + k), out[i + k]);
            }
        }
    return bias && end > begin ? (end - begin) * static_cast<int64_t>(sizeof(T)) : 0;
}

// Run the work on a team of at most `wanted` of `threads` and add up the bytes that each has noted.
template <class F>
int64_t total_of(int64_t *bytes, int64_t threads, int64_t wanted, F &work) {
    for (int64_t t = 0; t < threads; ++t) bytes[t] = 0;
    run_parallel(wanted, work);
    int64_t total = 0;
    for (int64_t t = 0; t < threads; ++t) total += bytes[t];
    return total;
}

// At most kRowBlock rows of a product, from `row` on.
template <class T>
LinearArgs rows_of(const LinearArgs &all, int64_t row) {
    LinearArgs a = all;
    a.rows = all.rows - row < kRowBlock ? all.rows - row : kRowBlock;
    a.x = at<T>(all.x, row * all.x_stride);
    if (all.mask) a.mask = all.mask + row * all.mask_stride;
    a.out = static_cast<T *>(all.out) + row * all.q;
    return a;
}
template <class T>
NeuronsArgs rows_of(const NeuronsArgs &all, int64_t row) {
    NeuronsArgs a = all;
    a.rows = all.rows - row < kRowBlock ? all.rows - row : kRowBlock;
    a.x = at<T>(all.x, row * all.x_stride);
    a.mask = all.mask + row * all.mask_stride;
    if (all.given) a.given = at<T>(all.given, row * all.given_stride);
    a.out = static_cast<T *>(all.out) + row * all.d_out;
    return a;
}

// Successive arrays out of the calling thread's scratch memory, each on its own lines.
struct Arena {
    char *memory;
    explicit Arena(int64_t bytes) : memory(static_cast<char *>(moyu::scratch(bytes + 16 * kLineBytes))) {}
    template <class T>
    T *take(int64_t count) {
        T *array = reinterpret_cast<T *>(memory);
        memory += (count * static_cast<int64_t>(sizeof(T)) + kLineBytes - 1) / kLineBytes * kLineBytes;
        return array;
    }
};

}  // namespace
