// A piece is what one mask bit keeps: contiguous weights, read once for all rows of x that keep it. Here: the list of
// kept pieces, who takes which of them, and the order in which they are read. products.h multiplies them.
//
// Pieces are scattered. Measured (two cores of a Zen 5 that stream 50 to 80 GB/s, neurons of 12 kB): one piece after the
// other without prefetch 55 % of the streaming rate; four pieces in lockstep, each line prefetched when the same line of
// the part before it is computed, 90 % and more where the memory is the bound (50 GB/s), and 76 to 85 % where the core is
// (80 GB/s). Two pieces in lockstep give 5 to 10 % less, eight the same; 1.5 kB ahead instead of a whole part 15 % less.
#pragma once

#include <type_traits>

#include "core/arena.h"
#include "core/element.h"
#include "core/kernels.h"

namespace {

using moyu::kMostRows;
using moyu::LinearArgs;
using moyu::NeuronsArgs;
using moyu::Weight;

constexpr int kTogether = 8;             // pieces read in lockstep, at most
constexpr int kMostPieces = 16;          // of a tile (core/group_tiles.h)
constexpr int64_t kAheadBytes = 1536;    // the least distance of the prefetch in each of them
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

template <class T>
constexpr int64_t bytes_of(int64_t count) {
    return count * static_cast<int64_t>(sizeof(T));
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
    int64_t piece[kMostPieces], next[kMostPieces];  // what to compute, and what the step `hop` later will
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

// Piece `i` of a weight, in the order that it has.
inline const uint8_t *piece_of(const Weight &w, int64_t i) { return at<uint8_t>(w.address, i * w.stride); }

// Which pieces of a step each row takes: its own, or all rows all of them (`shared`). Then a line of weights is loaded once
// for several rows, and what a row skips is dropped before it counts.
struct Takers {
    int which[kMostRows][kTogether], own[kMostRows];
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

// Some of the pieces of a step, and what is computed next: its lines are prefetched meanwhile.
template <class T>
struct Pieces {
    const T *now[kTogether], *then[kTogether];
    int count = 0;
    Pieces() = default;
    Pieces(const Taken &taken, const int *which, int kept, const Weight &weight, const Weight &after,
           const int64_t *after_pieces) : count(kept) {
        for (int i = 0; i < kept; ++i) {
            now[i] = reinterpret_cast<const T *>(piece_of(weight, taken.piece[which[i]]));
            then[i] = reinterpret_cast<const T *>(piece_of(after, after_pieces[which[i]]));
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

// Run the work on a team of at most `wanted` of `threads` and add up the bytes that each has noted.
template <class F>
int64_t total_of(int64_t *bytes, int64_t threads, int64_t wanted, F &work) {
    for (int64_t t = 0; t < threads; ++t) bytes[t] = 0;
    run_parallel(wanted, work);
    int64_t total = 0;
    for (int64_t t = 0; t < threads; ++t) total += bytes[t];
    return total;
}

// The outputs of `rows` that a mask may skip are 0 until somebody writes them.
template <class T>
void clear_skipped(const LinearArgs &a) {
    for (int64_t i = 0; i < a.rows * a.weight.outputs && a.mask; ++i) static_cast<T *>(a.out)[i] = T{};
}

// At most kMostRows rows of the arguments, from `row` on.
template <class T>
LinearArgs rows_of(const LinearArgs &all, int64_t row) {
    LinearArgs a = all;
    a.rows = all.rows - row < kMostRows ? all.rows - row : kMostRows;
    a.x = at<T>(all.x, row * all.x_stride);
    if (all.mask) a.mask = all.mask + row * all.mask_stride;
    a.out = static_cast<T *>(all.out) + row * all.weight.outputs;
    return a;
}
template <class T>
NeuronsArgs rows_of(const NeuronsArgs &all, int64_t row) {
    NeuronsArgs a = all;
    a.rows = all.rows - row < kMostRows ? all.rows - row : kMostRows;
    a.x = at<T>(all.x, row * all.x_stride);
    a.mask = all.mask + row * all.mask_stride;
    if (all.given) a.given = at<T>(all.given, row * all.given_stride);
    a.out = static_cast<T *>(all.out) + row * all.down.outputs;
    return a;
}

// part(args) for kMostRows rows after the other; adds up the bytes that it returns.
template <class T, class Args, class F>
int64_t in_parts(const Args &all, F part) {
    int64_t bytes = 0;
    for (int64_t row = 0; row < all.rows; row += kMostRows) bytes += part(rows_of<T>(all, row));
    return bytes;
}

}  // namespace
