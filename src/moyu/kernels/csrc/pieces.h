// A piece is what one mask bit keeps: contiguous weights, read once for all rows of x that keep it. Here: the list of
// kept pieces, a few pieces times a row of x (`dot`), a row plus multiples of pieces (`axpy`), and the epilogue.
//
// Pieces are scattered, and the machine measured (one core of a Zen 5 that streams 40 GB/s) reads one after the other
// at 11 to 16 GB/s, or at 19 to 24 with each line of a later piece prefetched by software, whatever distance and hint.
// Four pieces in lockstep with the software prefetch 1.5 kB ahead in each of them: 27 to 30 GB/s. 0.5 kB ahead give
// 22 to 24, 1 and 2 to 3 kB 25 to 28. The likely reason, not verified with counters: a prefetch holds one of the L1
// cache's miss buffers until it is served, and four streams let the L2 cache's own prefetcher do part of the work.
#pragma once

#include "kernels.h"

namespace {

using moyu::LinearArgs;
using moyu::NeuronsArgs;

constexpr int64_t kLineBytes = 64;
constexpr int kTogether = 4;             // pieces read in lockstep
constexpr int64_t kAheadBytes = 1536;    // how far the prefetch is ahead in each of them
constexpr int64_t kRowBlock = 32;        // rows of x that are taken together; weights are read once a block
constexpr int64_t kSerialBytes = 65536;  // less work than this is done before a second thread has woken up

template <class F>
void run_parallel(int64_t threads, F &f) {
    moyu::parallel(threads, [](int64_t thread, void *context) { (*static_cast<F *>(context))(thread); }, &f);
}

inline int64_t threads_for(int64_t bytes, int64_t pieces, int64_t threads) {
    if (bytes < kSerialBytes) return 1;
    return threads < pieces ? threads : pieces;
}

inline int64_t round_up(int64_t count) { return (count + 31) / 32 * 32; }  // floats: two registers of any Vec

template <class T>
const T *at(const void *data, int64_t offset) {
    return static_cast<const T *>(data) + offset;
}
template <class T>
float bias_at(const void *bias, int64_t i) {
    return bias ? widen(*at<T>(bias, i)) : 0.0f;
}

// The last elements of a piece, fewer than two registers or (after a longer step) more: the others are 0.
template <class T>
inline auto load2_rest(const T *w, int64_t count) {
    return count >= 2 * Vec::width ? Vec::load2(w) : Vec::load2_part(w, static_cast<int>(count));
}

// x in fp32, rows padded with zeros, so that the loops below need no tail on its side.
template <class T>
void load_rows(const void *x, int64_t stride, int64_t rows, int64_t n, float *out) {
    constexpr int W = Vec::width;
    for (int64_t r = 0; r < rows; ++r, out += round_up(n)) {
        const T *row = at<T>(x, r * stride);
        for (int64_t i = 0; i < n; i += 2 * W) {
            const auto pair = load2_rest(row + i, n - i);
            Vec::store(out + i, pair.a);
            Vec::store(out + i + W, pair.b);
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
    int64_t count = 0;
    for (int64_t i = 0; i < pieces; ++i) {
        kept[count] = static_cast<int32_t>(i);
        count += mask == nullptr || mask[i] != 0;
    }
    return count;
}

// The pieces of one step of a thread that has kept[begin .. end): the thread's part is cut into kTogether runs, a step
// takes one piece of each, so that even where everything is kept the lockstep has that many long streams.
struct Taken {
    int64_t piece[kTogether], next[kTogether];  // what to compute, and what the step `hop` later will
    int count = 0;
    Taken(const int32_t *kept, int64_t begin, int64_t end, int64_t step, int64_t hop) {
        const int64_t run = steps(begin, end);
        for (int64_t at = begin + step; at < end && count < kTogether; at += run) {
            piece[count] = kept[at];
            next[count++] = kept[step + hop < run && at + hop < end ? at + hop : at];
        }
    }
    // Steps until a stream has gone kAheadBytes further: more than one for short pieces.
    static int64_t hop(int64_t piece_bytes) {
        return piece_bytes > 0 ? (kAheadBytes + piece_bytes - 1) / piece_bytes : 1;
    }
    static int64_t steps(int64_t begin, int64_t end) { return (end - begin + kTogether - 1) / kTogether; }
    // Which of them a row keeps, as positions among them; null = all.
    int kept_by(const uint8_t *row_mask, int *which) const {
        int kept = 0;
        for (int c = 0; c < count; ++c)
            if (row_mask == nullptr || row_mask[piece[c]]) which[kept++] = c;
        return kept;
    }
};

// The weights of some of the pieces of a step, and what is read after each: the prefetch runs on into it.
template <class T>
struct Weights {
    const T *now[kTogether], *then[kTogether];
    int count;
    Weights(const Taken &taken, const int *which, int kept, const void *weight, int64_t stride, const void *after,
            int64_t after_stride, bool after_is_next) : count(kept) {
        for (int i = 0; i < kept; ++i) {
            const int64_t piece = taken.piece[which[i]];
            now[i] = at<T>(weight, piece * stride);
            then[i] = at<T>(after, (after_is_next ? taken.next[which[i]] : piece) * after_stride);
        }
    }
};

template <int64_t bytes>
inline void prefetch(const void *address) {
#if defined(__GNUC__) || defined(__clang__)
    for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char *>(address) + i, 0, 0);
#else
    (void)address;
#endif
}

// Where the prefetch of piece c reads when the arithmetic is at element 0 of the piece: first further on in the piece,
// for its last kAheadBytes in what comes after it.
template <class T>
inline int64_t inside(int64_t n) {
    const int64_t distance = kAheadBytes / static_cast<int64_t>(sizeof(T));
    return n > distance ? n - distance : 0;
}
template <class T>
inline const T *ahead_of(const Weights<T> &w, int c, int64_t n, bool past) {
    return past ? w.then[c] - inside<T>(n) : w.now[c] + kAheadBytes / static_cast<int64_t>(sizeof(T));
}

// out[c] = w[c] · x for C pieces in lockstep.
template <int C, bool Ahead, class T>
inline void dot_together(const Weights<T> &w, const float *x, int64_t n, float *out) {
    constexpr int W = Vec::width, U = C <= 2 ? 2 : 1;  // at least 4 independent sums hide the latency of an FMA
    typename Vec::Reg a[C][U], b[C][U];
    for (int c = 0; c < C; ++c)
        for (int u = 0; u < U; ++u) a[c][u] = b[c][u] = Vec::zero();
    const T *now[C], *from[C];
    for (int c = 0; c < C; ++c) now[c] = w.now[c];
    int64_t i = 0;
    for (int past = 0; past < 2; ++past) {
        const int64_t end = past ? n : inside<T>(n);
        for (int c = 0; c < C; ++c) from[c] = ahead_of(w, c, n, past);
        for (; i + U * 2 * W <= end; i += U * 2 * W)
            for (int u = 0; u < U; ++u) {
                const int64_t k = i + u * 2 * W;
                const auto x0 = Vec::load(x + k), x1 = Vec::load(x + k + W);
                for (int c = 0; c < C; ++c) {
                    if (Ahead) prefetch<2 * W * sizeof(T)>(from[c] + k);
                    const auto pair = Vec::load2(now[c] + k);
                    a[c][u] = Vec::fma(pair.a, x0, a[c][u]);
                    b[c][u] = Vec::fma(pair.b, x1, b[c][u]);
                }
            }
    }
    for (; i < n; i += 2 * W)
        for (int c = 0; c < C; ++c) {
            const auto pair = load2_rest(w.now[c] + i, n - i);
            a[c][0] = Vec::fma(pair.a, Vec::load(x + i), a[c][0]);
            b[c][0] = Vec::fma(pair.b, Vec::load(x + i + W), b[c][0]);
        }
    for (int c = 0; c < C; ++c) {
        auto total = Vec::add(a[c][0], b[c][0]);
        for (int u = 1; u < U; ++u) total = Vec::add(total, Vec::add(a[c][u], b[c][u]));
        out[c] = Vec::sum(total);
    }
}

// y += sum over C pieces in lockstep of scale[c] * w[c]; y is padded and ordered as x is.
template <int C, bool Ahead, class T>
inline void axpy_together(const Weights<T> &w, const float *scale, float *y, int64_t n) {
    constexpr int W = Vec::width;
    typename Vec::Reg s[C];
    for (int c = 0; c < C; ++c) s[c] = Vec::set(scale[c]);
    const T *now[C], *from[C];
    for (int c = 0; c < C; ++c) now[c] = w.now[c];
    int64_t i = 0;
    for (int past = 0; past < 2; ++past) {
        const int64_t end = past ? n : inside<T>(n);
        for (int c = 0; c < C; ++c) from[c] = ahead_of(w, c, n, past);
        for (; i + 2 * W <= end; i += 2 * W) {
            auto y0 = Vec::load(y + i), y1 = Vec::load(y + i + W);
            for (int c = 0; c < C; ++c) {
                if (Ahead) prefetch<2 * W * sizeof(T)>(from[c] + i);
                const auto pair = Vec::load2(now[c] + i);
                y0 = Vec::fma(pair.a, s[c], y0);
                y1 = Vec::fma(pair.b, s[c], y1);
            }
            Vec::store(y + i, y0);
            Vec::store(y + i + W, y1);
        }
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
inline void dot(const Weights<T> &w, const float *x, int64_t n, float *out) {
    switch (w.count) {
        case 4: return dot_together<4, Ahead>(w, x, n, out);
        case 3: return dot_together<3, Ahead>(w, x, n, out);
        case 2: return dot_together<2, Ahead>(w, x, n, out);
        case 1: return dot_together<1, Ahead>(w, x, n, out);
    }
}

template <bool Ahead, class T>
inline void axpy(const Weights<T> &w, const float *scale, float *y, int64_t n) {
    switch (w.count) {
        case 4: return axpy_together<4, Ahead>(w, scale, y, n);
        case 3: return axpy_together<3, Ahead>(w, scale, y, n);
        case 2: return axpy_together<2, Ahead>(w, scale, y, n);
        case 1: return axpy_together<1, Ahead>(w, scale, y, n);
    }
}

// The two on row r of x or of y.
template <class T>
inline void project(const Weights<T> &w, const float *x, int64_t r, int64_t n, float *out) {
    if (r == 0) dot<true>(w, x, n, out);
    else dot<false>(w, x + r * round_up(n), n, out);
}
template <class T>
inline void accumulate(const Weights<T> &w, const float *scale, float *y, int64_t r, int64_t n) {
    if (r == 0) axpy<true>(w, scale, y, n);
    else axpy<false>(w, scale, y + r * round_up(n), n);
}

// out = sum over threads of sums (threads, rows, padded n) + bias, always in the order of the threads; returns bytes of
// the bias. The sums lie as Vec::load2 took the weights: where it splits, the even elements, then the odd ones.
template <class T>
int64_t write_sums(const float *sums, int64_t threads, int64_t rows, int64_t n, const void *bias, T *out) {
    constexpr int W = Vec::width;
    const int64_t padded = round_up(n);
    for (int64_t row = 0; row < rows; ++row, out += n)
        for (int64_t i = 0; i < n; i += 2 * W) {
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
                const float sum = Vec::split<T> ? total[k % 2 * W + k / 2] : total[k];
                narrow(sum + bias_at<T>(bias, i + k), out[i + k]);
            }
        }
    return bias ? n * static_cast<int64_t>(sizeof(T)) : 0;
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
