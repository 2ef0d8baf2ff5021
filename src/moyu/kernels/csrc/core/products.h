// Products of pieces of plain weights: a few pieces times a row of x (`dot`), and a row plus multiples of pieces (`axpy`).
#pragma once

#include "core/pieces.h"

namespace {

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

// out[c] = w[c] · x for C pieces in lockstep, a pair of sums for each; one where that would take all registers or
// where a product is one instruction.
template <int C, bool Ahead, class T>
inline void dot_together(const Pieces<T> &w, const Factor<T> *x, int64_t n, float *out) {
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
inline void axpy_together(const Pieces<T> &w, const float *scale, float *y, int64_t n) {
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
inline void dot(const Pieces<T> &w, const Factor<T> *x, int64_t n, float *out) {
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
inline void axpy(const Pieces<T> &w, const float *scale, float *y, int64_t n) {
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
inline void dot_shared(const Pieces<T> &w, int first, const Factor<T> *x, int64_t n, float (*out)[kTogether]) {
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
inline void axpy_shared(const Pieces<T> &w, int first, const float (*scale)[kTogether], float *y, int64_t n) {
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
inline void dot_rows(const Pieces<T> &w, const Factor<T> *x, int64_t n, float (*out)[kTogether]) {
    constexpr int C = stored_products<T> ? 4 : 8 / kDotRows;
    int c = 0;
    for (; c + C <= w.count; c += C) dot_shared<C, R, Ahead>(w, c, x, n, out);
    for (; c < w.count; ++c) dot_shared<1, R, Ahead>(w, c, x, n, out);
}
template <int R, bool Ahead, class T>
inline void axpy_rows(const Pieces<T> &w, const float (*scale)[kTogether], float *y, int64_t n) {
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
        const Pieces<T> w = weights(0);
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
        const Pieces<T> w = weights(0);
        r = in_groups<4>(rows, [&](int64_t from, auto at_once, auto ahead) {
            axpy_rows<at_once(), ahead()>(w, scale + from, y + from * stride, n);
        });
    }
    for (; r < rows; ++r) {
        if (r == 0) axpy<true>(weights(r), scale[r], y, n);
        else axpy<false>(weights(r), scale[r], y + r * stride, n);
    }
}

}  // namespace
