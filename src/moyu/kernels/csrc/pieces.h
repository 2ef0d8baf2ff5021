// A piece is what one mask bit keeps: contiguous weights, read once for all rows of x that keep it.
// Here: the list of kept pieces, a piece times rows (`dots`), rows plus a multiple of a piece (`axpys`), the epilogue.
//
// Pieces are scattered, so the hardware prefetcher is of no use. Software prefetch of a later piece, line by line inside
// the arithmetic on the present one, and with the non-temporal hint (weights are not read again before they are evicted)
// was the difference between 30 and over 40 GB/s of the 42 to 48 that plain streaming reaches on the machine measured.
#pragma once

#include "kernels.h"

#ifndef PFH
#define PFH 0
#endif
#ifdef EXPW
#include <stdlib.h>
static int64_t envw(const char*n,int64_t d){const char*v=getenv(n);return v?atoll(v):d;}
#define XW(k) envw("W",k)
#else
#define XW(k) k
#endif
namespace {

using moyu::LinearArgs;
using moyu::NeuronsArgs;

constexpr int64_t kLineBytes = 64;
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

// How many pieces ahead to prefetch so that about `window` bytes are on their way.
inline int64_t pieces_ahead(int64_t window, int64_t piece_bytes) {
    const int64_t pieces = (window + piece_bytes - 1) / (piece_bytes ? piece_bytes : 1);
    return pieces < 1 ? 1 : pieces > 64 ? 64 : pieces;
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

// x in fp32, rows padded with zeros, so that the loops below need no tail on its side.
template <class T>
void load_rows(const void *x, int64_t stride, int64_t rows, int64_t n, float *out) {
    constexpr int W = Vec::width;
    for (int64_t r = 0; r < rows; ++r, out += round_up(n)) {
        const T *row = at<T>(x, r * stride);
        for (int64_t i = 0; i < n; i += 2 * W) {
            const auto pair = n - i >= 2 * W ? Vec::load2(row + i) : Vec::load2_part(row + i, static_cast<int>(n - i));
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

inline int rows_keeping(const uint8_t *mask, int64_t stride, int64_t rows, int64_t piece, int *out) {
    int count = 0;
    for (int64_t r = 0; r < rows; ++r)
        if (mask == nullptr || rows == 1 || mask[r * stride + piece]) out[count++] = static_cast<int>(r);
    return count;
}

template <int64_t bytes>
inline void prefetch(const void *address) {
    for (int64_t i = 0; i < bytes; i += kLineBytes) {
#if defined(__GNUC__) || defined(__clang__)
        if (PFH==0) __builtin_prefetch(static_cast<const char *>(address) + i, 0, 0); else __builtin_prefetch(static_cast<const char *>(address) + i, 0, PFH);
#else
        (void)address;
#endif
    }
}

// out[r] = w · x[r] for R rows; reads w once. Ahead: prefetch as many elements at `next` on the way.
template <int R, bool Ahead, class T>
inline void dot(const T *w, const float *const *x, int64_t n, const T *next, float *out) {
    constexpr int W = Vec::width, U = 2;  // 2 pairs = 4 independent sums hide the latency of an FMA
    typename Vec::Reg a[R][U], b[R][U];
    for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u) a[r][u] = b[r][u] = Vec::zero();
    int64_t i = 0;
    for (; i + U * 2 * W <= n; i += U * 2 * W) {
        if (Ahead) prefetch<U * 2 * W * sizeof(T)>(next + i);
        for (int u = 0; u < U; ++u) {
            const int64_t k = i + u * 2 * W;
            const auto pair = Vec::load2(w + k);
            for (int r = 0; r < R; ++r) {
                a[r][u] = Vec::fma(pair.a, Vec::load(x[r] + k), a[r][u]);
                b[r][u] = Vec::fma(pair.b, Vec::load(x[r] + k + W), b[r][u]);
            }
        }
    }
    for (; i < n; i += 2 * W) {
        const auto pair = n - i >= 2 * W ? Vec::load2(w + i) : Vec::load2_part(w + i, static_cast<int>(n - i));
        for (int r = 0; r < R; ++r) {
            a[r][0] = Vec::fma(pair.a, Vec::load(x[r] + i), a[r][0]);
            b[r][0] = Vec::fma(pair.b, Vec::load(x[r] + i + W), b[r][0]);
        }
    }
    for (int r = 0; r < R; ++r) out[r] = Vec::sum(Vec::add(Vec::add(a[r][0], a[r][1]), Vec::add(b[r][0], b[r][1])));
}

// y[r] += scale[r] * w for R rows; y is padded and ordered as x is.
template <int R, bool Ahead, class T>
inline void axpy(const T *w, const float *scale, float *const *y, int64_t n, const T *next) {
    constexpr int W = Vec::width, U = 2;
    typename Vec::Reg s[R];
    for (int r = 0; r < R; ++r) s[r] = Vec::set(scale[r]);
    auto add = [&](auto pair, int64_t k) {
        for (int r = 0; r < R; ++r) {
            Vec::store(y[r] + k, Vec::fma(pair.a, s[r], Vec::load(y[r] + k)));
            Vec::store(y[r] + k + W, Vec::fma(pair.b, s[r], Vec::load(y[r] + k + W)));
        }
    };
    int64_t i = 0;
    for (; i + U * 2 * W <= n; i += U * 2 * W) {
        if (Ahead) prefetch<U * 2 * W * sizeof(T)>(next + i);
        for (int u = 0; u < U; ++u) add(Vec::load2(w + i + u * 2 * W), i + u * 2 * W);
    }
    for (; i < n; i += 2 * W) add(n - i >= 2 * W ? Vec::load2(w + i) : Vec::load2_part(w + i, static_cast<int>(n - i)), i);
}

template <int R>
struct Group { static constexpr int rows = R; };

// Cuts a list of rows into groups of max_rows, 2 and 1.
template <class F>
inline void by_groups(int count, F run) {
    int i = 0;
    for (; count - i >= Vec::max_rows; i += Vec::max_rows) run(i, Group<Vec::max_rows>{});
    for (; count - i >= 2; i += 2) run(i, Group<2>{});
    for (; count - i >= 1; i += 1) run(i, Group<1>{});
}

// The two above for any list of rows: the first group also prefetches, the others find w in L1.
template <class T>
inline void dots(const T *w, const float *x, const int *rows, int count, int64_t n, const T *next, float *out) {
    const int64_t padded = round_up(n);
    const float *p[kRowBlock];
    for (int i = 0; i < count; ++i) p[i] = x + rows[i] * padded;
    by_groups(count, [&](int i, auto group) {
        constexpr int R = decltype(group)::rows;
        if (i == 0) dot<R, true>(w, p, n, next, out);
        else dot<R, false>(w, p + i, n, next, out + i);
    });
}

template <class T>
inline void axpys(const T *w, const float *scale, float *y, const int *rows, int count, int64_t n, const T *next) {
    const int64_t padded = round_up(n);
    float *p[kRowBlock];
    for (int i = 0; i < count; ++i) p[i] = y + rows[i] * padded;
    by_groups(count, [&](int i, auto group) {
        constexpr int R = decltype(group)::rows;
        if (i == 0) axpy<R, true>(w, scale, p, n, next);
        else axpy<R, false>(w, scale + i, p + i, n, next);
    });
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
