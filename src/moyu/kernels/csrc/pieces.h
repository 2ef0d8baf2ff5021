// A piece is what one mask bit keeps: contiguous weights, read once for all rows of x that keep it.
// Here: the list of kept pieces, a few pieces times a row of x (`dot`), a row plus multiples of pieces (`axpy`), the end.
//
// Pieces are scattered. One core of the machine measured (Zen 5) streams 40 GB/s, but one piece after the other only 16,
// or 22 with every line of the next piece prefetched by software: that is bound by the L1 cache's miss buffers. Four pieces
// in lockstep give the L2 cache's own prefetcher four streams to run ahead of, and a prefetch of the first lines of the
// next four starts it early: 36 GB/s. Two or six at a time are slower, so are more lines than two.
#pragma once

#include "kernels.h"

namespace {

using moyu::LinearArgs;
using moyu::NeuronsArgs;

constexpr int64_t kLineBytes = 64;
constexpr int kTogether = 4;             // pieces read in lockstep
#ifndef PD
#define PD 1024
#endif
#ifndef HINT
#define HINT 0
#endif
constexpr int64_t kAheadBytes = PD;      // how far the prefetch is ahead in each of them
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

// Where element i of a row lies among the floats of x and of the sums: Vec::load2 may take even and odd elements apart.
template <class T>
inline int64_t place(int64_t i) {
    if (!Vec::split<T>) return i;
    const int64_t first = i / (2 * Vec::width) * (2 * Vec::width), rest = i - first;
    return first + rest % 2 * Vec::width + rest / 2;
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
inline int64_t list_kept(const uint8_t *mask, int64_t stride, int64_t rows, int64_t pieces, uint8_t *any, int32_t *kept) {
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

// The pieces of one step of a thread that has kept[begin .. end): the thread's part is cut into kTogether runs, a step takes
// one piece of each, so that even where everything is kept the lockstep has that many long streams.
struct Taken {
    int64_t piece[kTogether], next[kTogether];  // what to compute, and what the following step will
    int count = 0;
    Taken(const int32_t *kept, int64_t begin, int64_t end, int64_t step) {
        const int64_t run = steps(begin, end);
        for (int64_t at = begin + step; at < end && count < kTogether; at += run) {
            piece[count] = kept[at];
            next[count++] = kept[step + 1 < run && at + 1 < end ? at + 1 : at];
        }
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
    for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char *>(address) + i, 0, HINT);
#else
    (void)address;
#endif
}

// Calls body(i, prefetch from) for i = 0, step, .. while a whole step fits into n; returns where it stopped.
template <int64_t step, class T, int C, bool Ahead, class Body>
inline int64_t stream(const Weights<T> &w, int64_t n, Body body) {
    constexpr int64_t distance = kAheadBytes / static_cast<int64_t>(sizeof(T));
    const int64_t own = n > distance ? n - distance : 0;  // up to here the prefetch stays inside the piece
    const T *from[C];
    int64_t i = 0;
    auto run = [&](int64_t end) {
        for (; i + step <= end; i += step)
            body(i, [&](int c) {
                if (Ahead) prefetch<step * sizeof(T)>(from[c] + i);
            });
    };
    for (int c = 0; c < C; ++c) from[c] = w.now[c] + distance;
    run(own);
    for (int c = 0; c < C; ++c) from[c] = w.then[c] - own;
    run(n);
    return i;
}

// out[c] = w[c] · x for C pieces in lockstep.
template <int C, bool Ahead, class T>
inline void dot_together(const Weights<T> &w, const float *x, int64_t n, float *out) {
    constexpr int W = Vec::width, U = C <= 2 ? 2 : 1;  // at least 4 independent sums hide the latency of an FMA
    typename Vec::Reg a[C][U], b[C][U];
    for (int c = 0; c < C; ++c)
        for (int u = 0; u < U; ++u) a[c][u] = b[c][u] = Vec::zero();
    int64_t i = stream<U * 2 * W, T, C, Ahead>(w, n, [&](int64_t k, auto prefetch_piece) {
        for (int u = 0; u < U; ++u, k += 2 * W) {
            const auto x0 = Vec::load(x + k), x1 = Vec::load(x + k + W);
            for (int c = 0; c < C; ++c) {
                if (u == 0) prefetch_piece(c);
                const auto pair = Vec::load2(w.now[c] + k);
                a[c][u] = Vec::fma(pair.a, x0, a[c][u]);
                b[c][u] = Vec::fma(pair.b, x1, b[c][u]);
            }
        }
    });
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
    auto add = [&](int64_t i, auto load) {
        auto y0 = Vec::load(y + i), y1 = Vec::load(y + i + W);
        for (int c = 0; c < C; ++c) {
            const auto pair = load(c);
            y0 = Vec::fma(pair.a, s[c], y0);
            y1 = Vec::fma(pair.b, s[c], y1);
        }
        Vec::store(y + i, y0);
        Vec::store(y + i + W, y1);
    };
    int64_t i = stream<2 * W, T, C, Ahead>(w, n, [&](int64_t k, auto prefetch_piece) {
        add(k, [&](int c) {
            prefetch_piece(c);
            return Vec::load2(w.now[c] + k);
        });
    });
    if (i < n) add(i, [&](int c) { return load2_rest(w.now[c] + i, n - i); });
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

// out = sum over threads of sums (threads, rows, padded n) + bias, always in the order of the threads. Returns bias bytes.
template <class T>
int64_t write_sums(const float *sums, int64_t threads, int64_t rows, int64_t n, const void *bias, T *out) {
    const int64_t padded = round_up(n);
    auto part = [&](int64_t row) {
        const float *first = sums + row * padded;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t k = place<T>(i);
            float total = first[k];
            for (int64_t t = 1; t < threads; ++t) total += first[t * rows * padded + k];
            narrow(total + bias_at<T>(bias, i), out[row * n + i]);
        }
    };
    for (int64_t row = 0; row < rows; ++row) part(row);
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
