// One decode step through consecutive decoder layers, in one parallel region: x + attention(norm(x)), then
// x + network(norm(x)); with the `ends` of a model also from token ids and to logits. Every product is a `_share` of linear.h or neurons.h; between them threads meet at barriers.
// Values are rounded to the model's type where the layers' own modules round them.
#pragma once

#include "core/grouped.h"
#include "core/levels.h"
#include "core/linear.h"
#include "core/neurons.h"
#include "core/words.h"

namespace {

using moyu::DecodeArgs;
using moyu::DecodeColumns;
using moyu::DecodeLayer;
using moyu::DecodeLevels;
using moyu::DecodeLinear;
using moyu::DecodeMemory;
using moyu::DecodeNorm;
using moyu::Order;
using moyu::Team;

template <class T>
inline float rounded(float value) {
    T stored;
    narrow(value, stored);
    return widen(stored);
}

// The sum of f(0 .. n), in lanes that a compiler can put into registers.
template <class F>
inline float sum_of(int64_t n, F f) {
    constexpr int lanes = 16;
    float part[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        for (int lane = 0; lane < lanes; ++lane) part[lane] += f(i + lane);
    for (; i < n; ++i) part[0] += f(i);
    float sum = 0.0f;
    for (float p : part) sum += p;
    return sum;
}

// The largest of them.
inline float largest_of(const float *x, int64_t n) {
    constexpr int lanes = 16;
    float part[lanes], most = -INFINITY;
    for (float &lane : part) lane = -INFINITY;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        for (int lane = 0; lane < lanes; ++lane) part[lane] = x[i + lane] > part[lane] ? x[i + lane] : part[lane];
    for (; i < n; ++i) most = x[i] > most ? x[i] : most;
    for (float lane : part) most = lane > most ? lane : most;
    return most;
}

// out = norm(x) of n values; x and out may be the same.
template <class T>
void normalize(const DecodeNorm &norm, const float *x, int64_t n, float *out) {
    const float size = static_cast<float>(n);
    const float mean = norm.centred ? sum_of(n, [&](int64_t i) { return x[i]; }) / size : 0.0f;
    const float squares = sum_of(n, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
    const float scale = 1.0f / sqrtf(squares / size + norm.eps);
    const T *weight = at<T>(norm.weight, 0);
    if (norm.centred) {
        for (int64_t i = 0; i < n; ++i)
            out[i] = rounded<T>((x[i] - mean) * scale * widen(weight[i]) + bias_at<T>(norm.bias, i));
    } else if (norm.plus != 0.0f) {
        for (int64_t i = 0; i < n; ++i) out[i] = rounded<T>(x[i] * scale * (widen(weight[i]) + norm.plus));
    } else {
        for (int64_t i = 0; i < n; ++i) out[i] = rounded<T>(rounded<T>(x[i] * scale) * widen(weight[i]));
    }
}

// Rotary position embedding of one head: the first `width` values, first half against second half.
template <class T>
void rotate(float *head, const float *cos, const float *sin, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}

// The most positions that a row attends to.
inline int64_t longest(const DecodeArgs &a) {
    int64_t most = 0;
    for (int64_t r = 0; r < a.rows; ++r) most = a.past[r] > most ? a.past[r] : most;
    return most + 1;
}

constexpr DecodeColumns kAllDecide = {};

template <class T>
class Decoding {
  public:
    explicit Decoding(const DecodeArgs &args) : a(args) {
        in_scratch([&](Arena &arena) { take_arrays(arena); });
        for (int64_t t = 0; t < a.threads; ++t) bytes[t] = 0;
    }

    void run(const Team &team) {
        Own &my = own[team.thread];
        for (int64_t r = 0; r < a.rows; ++r) {
            float *to = my.hidden + r * a.d;
            if (a.ends && a.ends->embedding.kind != Format::plain) {
                if (a.ends->embedding.parted) widen_parted(stored(a.ends->embedding), a.ids[r], false, to);
                else widen_row(stored(a.ends->embedding), a.ids[r], false, to);
                for (int64_t i = 0; i < a.d; ++i) to[i] = rounded<T>(to[i]);
            } else {
                const DecodeLinear *table = a.ends ? &a.ends->embedding : nullptr;
                const T *from = table ? at<T>(table->weight, a.ids[r] * table->stride) : at<T>(a.hidden, r * a.d);
                for (int64_t i = 0; i < a.d; ++i) to[i] = widen(from[i]);
            }
            if (a.ends && a.ends->scale != 0.0f)
                for (int64_t i = 0; i < a.d; ++i) to[i] = rounded<T>(to[i] * rounded<T>(a.ends->scale));
        }
        for (int64_t l = 0; l < a.count; ++l) {
            const DecodeColumns &columns = a.columns ? a.columns[l] : kAllDecide;
            attend(a.layers[l], a.memory[l], columns, my, team);
            feed_forward(a.layers[l], a.memory[l], columns, my, team);
        }
        if (a.ends) {
            load(a.ends->norm, my);
            T *logits = static_cast<T *>(a.logits);
            if (a.ends->head.parted && lists(a.ends->head)) words(a.ends->head, my, team, logits);
            else start(a.ends->head, kAllDecide.q, my.stored, my, team, logits, nullptr);
            if (a.ends->softcap != 0.0f) {
                team.wait();
                const Share share(a.rows * a.ends->head.q, team);
                for (int64_t i = share.begin; i < share.end; ++i) {
                    const float part = rounded<T>(widen(logits[i]) / a.ends->softcap);
                    narrow(rounded<T>(tanhf(part)) * a.ends->softcap, logits[i]);
                }
            }
        } else if (team.thread == 0) {
            for (int64_t i = 0; i < a.rows * a.d; ++i) narrow(my.hidden[i], static_cast<T *>(a.hidden)[i]);
        }
    }

    int64_t total() const {
        int64_t all = 0;
        for (int64_t t = 0; t < a.threads; ++t) all += bytes[t];
        return all;
    }

  private:
    // What a thread has for itself. Cheap things (norms, masks, lists of a mask) every thread computes for itself, which
    // is faster than meeting.
    struct Own {
        float *hidden, *values, *scores;
        T *stored, *zeroed;
        Factor<T> *x;
        uint8_t *mask, *any;
        int32_t *kept;
        Rounded rounded;
        const T *rounded_from;  // what it holds; null = nothing that may be used again
    };
    const DecodeArgs &a;
    int64_t sums_size;
    T *q, *k, *v, *y;
    float *sums[3];
    int64_t *bytes;
    Own own[moyu::kMostThreads];
    // Of a parted head: what its first bits give, the largest of each thread and row, what each row keeps, and each thread's list of it.
    float *preview, *largest;
    uint8_t *preview_mask;
    int32_t *shortlist;
    int64_t *listed;

    void take_arrays(Arena &arena) {
        sums_size = a.rows * round_up(a.widest);
        q = arena.take<T>(a.rows * a.widest);
        k = arena.take<T>(a.rows * a.widest);
        v = arena.take<T>(a.rows * a.widest);
        y = arena.take<T>(a.rows * a.widest);
        for (auto &area : sums) area = arena.take<float>(a.threads * sums_size);
        bytes = arena.take<int64_t>(a.threads);
        const bool parted = a.ends && a.ends->head.parted;
        const int64_t vocabulary = parted ? a.ends->head.q : 0;
        preview = arena.take<float>(a.rows * vocabulary);
        largest = arena.take<float>(a.threads * a.rows);
        preview_mask = arena.take<uint8_t>(a.rows * vocabulary);
        shortlist = arena.take<int32_t>(vocabulary);
        listed = arena.take<int64_t>(a.threads);
        for (int64_t t = 0; t < a.threads; ++t) {
            own[t].hidden = arena.take<float>(a.rows * a.d);
            own[t].values = arena.take<float>(a.rows * round_up(a.widest));
            own[t].stored = arena.take<T>(2 * a.rows * a.widest);
            own[t].x = arena.take<Factor<T>>(a.rows * round_up(a.widest));
            own[t].mask = arena.take<uint8_t>(a.rows * a.widest);
            own[t].zeroed = arena.take<T>(a.rows * a.widest);
            own[t].any = arena.take<uint8_t>(a.widest);
            own[t].kept = arena.take<int32_t>(a.widest);
            own[t].rounded = Rounded::take(arena, a.rows, a.widest);
            own[t].scores = arena.take<float>(longest(a) + kTogether);
        }
    }

    void load(const DecodeNorm &norm, Own &my) {
        for (int64_t r = 0; r < a.rows; ++r) {
            for (int64_t i = 0; i < a.d; ++i) my.values[i] = my.hidden[r * a.d + i];
            if (norm.weight) normalize<T>(norm, my.values, a.d, my.values);
            for (int64_t i = 0; i < a.d; ++i) narrow(my.values[i], my.stored[r * a.d + i]);
        }
        take(my.stored, a.d, my);
    }

    // x (rows, n) as products by rows take it.
    void take(const T *x, int64_t n, Own &my) {
        load_rows<T>(x, n, a.rows, n, my.x);
        my.rounded_from = nullptr;
    }
    Rounded round(const T *x, int64_t n, Own &my) {
        const Rounded to = my.rounded.fitted(n);
        if (my.rounded_from != x) fill_rows<T>(to, x, n, a.rows, n);
        my.rounded_from = x;
        return to;
    }
    static Weight stored(const DecodeLinear &w) {
        const int64_t unit = w.kind == Format::plain ? bytes_of<T>(1) : 1;  // of the stride
        const Order order = w.parted ? Order::parted : w.first ? Order::planes : w.by_columns ? Order::columns : Order::rows;
        return {w.kind, order, w.q, w.n, w.weight, w.stride * unit, w.scales, w.scales_stride, w.first, w.first_stride};
    }

    // my.mask = what each row keeps, by |x_i| * factor_i > threshold in the model's type (as the method computes it), or as
    // it is given; my.kept = the pieces that any row keeps. Returns how many.
    int64_t decide(const DecodeLinear &of, const DecodeLevels &levels, const T *x, int64_t n, Own &my, const Team &team) {
        choose(of, levels, x, n, my, team);
        return list_kept(my.mask, n, a.rows, n, my.any, my.kept);
    }
    // The mask alone.
    void choose(const DecodeLinear &of, const DecodeLevels &levels, const T *x, int64_t n, Own &my, const Team &team) {
        const float *factor = static_cast<const float *>(of.factor);
        const float threshold = of.threshold;
        for (int64_t r = 0; r < a.rows; ++r) {
            const T *row = x + r * n;
            uint8_t *mask = my.mask + r * n;
            if (levels.given) {
                for (int64_t i = 0; i < n; ++i) mask[i] = levels.given[r * levels.given_row + i] != 0;
                continue;
            }
            for (int64_t i = 0; i < n && !factor; ++i) mask[i] = fabsf(widen(row[i])) > threshold;
            for (int64_t i = 0; i < n && factor; ++i) mask[i] = rounded<T>(fabsf(widen(row[i])) * factor[i]) > threshold;
        }
        tell(levels, my.mask, n, n, team);
    }

    // Lets who asks have the mask (rows, n) that was taken; null = all.
    void tell(const DecodeLevels &levels, const uint8_t *mask, int64_t stride, int64_t n, const Team &team) const {
        if (levels.taken == nullptr || team.thread != 0) return;
        for (int64_t r = 0; r < a.rows; ++r)
            for (int64_t i = 0; i < n; ++i) levels.taken[r * n + i] = mask == nullptr || mask[r * stride + i] != 0;
    }

    // This thread's part of out (rows, q) = x · Wᵀ: whole outputs, or sums that `finish` brings together.
    void start(const DecodeLinear &w, const DecodeLevels &levels, const T *x, Own &my, const Team &team, T *out,
               float *area) {
        LinearArgs args = {a.rows, a.threads, x, w.n, stored(w), nullptr, 0, w.bias, out};
        const bool in_blocks = w.kind != Format::plain;
        if (w.first && !w.parted) {
            choose(w, levels, x, w.n, my, team);
            args.mask = my.mask, args.mask_stride = w.n;
            bytes[team.thread] += levels_share<T>(args, args.weight, round(x, w.n, my), team, area + team.thread * sums_size_of(w));
            return;
        }
        if (!w.by_columns) {
            bytes[team.thread] += in_blocks ? grouped_rows_share<T>(args, args.weight, round(x, w.n, my), nullptr, w.q, team, w.parted && w.threshold == INFINITY)
                                            : rows_share<T>(args, my.x, nullptr, w.q, team);
            return;
        }
        float *own = area + team.thread * sums_size_of(w);
        clear(own, a.rows, w.q);
        const int64_t count = decide(w, levels, x, w.n, my, team);
        args.mask = my.mask;
        args.mask_stride = w.n;
        if (in_blocks) {
            bytes[team.thread] += grouped_columns_share<T>(args, args.weight, my.kept, count, team, own);
        } else {
            LinearArgs kept = args;  // `args` keeps x and the mask as they are, for what follows
            take_together<T>(kept, count, my.zeroed);
            bytes[team.thread] += columns_share<T>(kept, my.kept, count, team, own);
        }
        if (w.rest.address == nullptr) return;
        for (int64_t i = 0; i < a.rows * w.n; ++i) my.mask[i] = !my.mask[i];  // which args.mask points to
        const int64_t others = list_kept(my.mask, w.n, a.rows, w.n, my.any, my.kept);
        float *more = in_blocks ? own : my.values;
        if (!in_blocks) clear(more, a.rows, w.q);
        bytes[team.thread] += grouped_columns_share<T>(args, w.rest, my.kept, others, team, more);
        if (!in_blocks) add_sums<T>(more, a.rows, w.q, own);
    }
    int64_t sums_size_of(const DecodeLinear &w) const { return a.rows * round_up(w.q); }
    void finish(const DecodeLinear &w, const Team &team, T *out, float *area) {
        if (w.by_columns) bytes[team.thread] += write(w, area, team, w.q, out);
    }
    int64_t write(const DecodeLinear &w, const float *area, const Team &team, int64_t n, T *out) const {
        return w.kind == Format::plain ? write_sums<T>(area, team.threads, a.rows, n, w.bias, out, team)
                                     : write_sums<T, false>(area, team.threads, a.rows, n, w.bias, out, team);
    }

    // Whether a parted head has a list of words, or all of their bits are read, or none but the first.
    bool lists(const DecodeLinear &head) const { return fabsf(head.threshold) != INFINITY || a.words.given || a.words.taken; }
    // logits (rows, q) of a parted head: all bits of the words whose first ones come close to the largest, or that are given.
    void words(const DecodeLinear &head, Own &my, const Team &team, T *logits) {
        const Weight w = stored(head);
        const Rounded x = round(my.stored, head.n, my);
        const Share share(head.q, team);
        const PartBytes size = part_bytes(w);
        first_parts<T>(w, head.bias, x, a.rows, share, preview, head.q);
        for (int64_t r = 0; r < a.rows; ++r)
            largest[team.thread * a.rows + r] = largest_of(preview + r * head.q + share.begin, share.end - share.begin);
        team.wait();
        const DecodeLevels &levels = a.words;
        for (int64_t r = 0; r < a.rows; ++r) {
            float most = -INFINITY;
            for (int64_t t = 0; t < team.threads; ++t) most = largest[t * a.rows + r] > most ? largest[t * a.rows + r] : most;
            most = rounded<T>(most);
            for (int64_t o = share.begin; o < share.end; ++o) {
                const int64_t at = r * head.q + o;
                const bool keeps = levels.given ? levels.given[r * levels.given_row + o] != 0
                                                : rounded<T>(rounded<T>(preview[at]) - most) > head.threshold;
                preview_mask[at] = keeps;
                if (levels.taken) levels.taken[at] = keeps;
            }
        }
        int64_t count = 0;
        for (int64_t o = share.begin; o < share.end; ++o) {
            shortlist[share.begin + count] = static_cast<int32_t>(o);
            bool any = false;
            for (int64_t r = 0; r < a.rows; ++r) any = any || preview_mask[r * head.q + o];
            count += any;
        }
        listed[team.thread] = count;
        team.wait();
        // The lists of all threads in equal parts: words that are likely are often neighbours.
        int64_t all = 0, before = 0;
        for (int64_t t = 0; t < team.threads; ++t) all += listed[t];
        const Share part(all, team);
        for (int64_t t = 0; t < team.threads; before += listed[t++]) {
            const int64_t begin = part.begin > before ? part.begin : before;
            const int64_t end = part.end < before + listed[t] ? part.end : before + listed[t];
            if (begin >= end) continue;
            const Share theirs(head.q, Team{t, team.threads, nullptr});
            further_parts(w, x, a.rows, preview_mask, head.q, shortlist + theirs.begin + begin - before, end - begin, preview, head.q);
        }
        bytes[team.thread] += (share.end - share.begin) * (size.first + (head.bias ? bytes_of<T>(1) : 0)) +
                              (part.end > part.begin ? part.end - part.begin : 0) * size.further;
        team.wait();
        for (int64_t r = 0; r < a.rows; ++r)
            for (int64_t o = share.begin; o < share.end; ++o) narrow(preview[r * head.q + o], logits[r * head.q + o]);
    }

    // hidden += norm(part), or part where there is no norm.
    void add(const T *part, const DecodeNorm &norm, Own &my) {
        for (int64_t r = 0; r < a.rows; ++r) {
            for (int64_t i = 0; i < a.d; ++i) my.values[i] = widen(part[r * a.d + i]);
            if (norm.weight) normalize<T>(norm, my.values, a.d, my.values);
            for (int64_t i = 0; i < a.d; ++i) my.hidden[r * a.d + i] = rounded<T>(my.hidden[r * a.d + i] + my.values[i]);
        }
    }

    void attend(const DecodeLayer &layer, const DecodeMemory &memory, const DecodeColumns &columns, Own &my,
                const Team &team) {
        load(layer.before_attention, my);
        start(layer.q, columns.q, my.stored, my, team, q, sums[0]);
        start(layer.k, columns.k, my.stored, my, team, k, sums[1]);
        start(layer.v, columns.v, my.stored, my, team, v, sums[2]);
        team.wait();
        if (layer.q.by_columns || layer.k.by_columns || layer.v.by_columns) {
            finish(layer.q, team, q, sums[0]);
            finish(layer.k, team, k, sums[1]);
            finish(layer.v, team, v, sums[2]);
            team.wait();
        }
        const Share units(a.rows * layer.kv_heads, team);
        for (int64_t unit = units.begin; unit < units.end; ++unit)
            append(layer, memory, unit / layer.kv_heads, unit % layer.kv_heads, my);
        if (a.sequences) team.wait();  // a row may attend to what another thread appends
        for (int64_t unit = units.begin; unit < units.end; ++unit)
            attend_group(layer, memory, unit / layer.kv_heads, unit % layer.kv_heads, my);
        team.wait();
        take(y, layer.o.n, my);
        start(layer.o, columns.o, y, my, team, v, sums[0]);  // v: the network's first products write q and k without waiting
        team.wait();
        if (layer.o.by_columns) {
            finish(layer.o, team, v, sums[0]);
            team.wait();
        }
        add(v, layer.after_attention, my);
    }

    void load_head(const T *from, const DecodeNorm &norm, const DecodeLayer &layer, int64_t row, float *head) {
        for (int64_t i = 0; i < layer.head_dim; ++i) head[i] = widen(from[i]);
        if (norm.weight) normalize<T>(norm, head, layer.head_dim, head);
        if (a.rotary == 0) return;
        const moyu::DecodeAngles &angles = a.angles[layer.angles];
        rotate<T>(head, angles.cos + row * a.angles_row, angles.sin + row * a.angles_row, a.rotary);
    }

    // Where the keys (or values) of a row's sequence begin, of one of their heads.
    T *held(void *all, int64_t stride, int64_t head_stride, int64_t row, int64_t kv_head) const {
        return static_cast<T *>(all) + (a.sequences ? a.sequences[row] : row) * stride + kv_head * head_stride;
    }
    // A row's key and value of one head go to the cache.
    void append(const DecodeLayer &layer, const DecodeMemory &memory, int64_t row, int64_t kv_head, Own &my) {
        const int64_t dim = layer.head_dim, offset = (row * layer.kv_heads + kv_head) * dim, place = a.past[row] * dim;
        T *key = held(memory.keys, memory.keys_row, memory.keys_head, row, kv_head) + place;
        T *value = held(memory.values, memory.values_row, memory.values_head, row, kv_head) + place;
        load_head(k + offset, layer.k_norm, layer, row, my.values);
        for (int64_t i = 0; i < dim; ++i) narrow(my.values[i], key[i]);
        for (int64_t i = 0; i < dim; ++i) value[i] = v[offset + i];
    }

    // The query heads that share a key and value head: y = softmax(q · K) V.
    void attend_group(const DecodeLayer &layer, const DecodeMemory &memory, int64_t row, int64_t kv_head, Own &my) {
        const int64_t dim = layer.head_dim, group = layer.heads / layer.kv_heads;
        const T *keys = held(memory.keys, memory.keys_row, memory.keys_head, row, kv_head);
        const T *values = held(memory.values, memory.values_row, memory.values_head, row, kv_head);
        const int64_t length = a.past[row] + 1;
        const int64_t first = layer.window != 0 && layer.window < length ? length - layer.window : 0;
        const uint8_t *allowed = a.mask ? a.mask + row * a.mask_row : nullptr;
        Pieces<T> pieces;
        auto point = [&](const T *from, int64_t t) {
            pieces.count = static_cast<int>(length - t < kTogether ? length - t : kTogether);
            for (int i = 0; i < pieces.count; ++i) {
                pieces.now[i] = from + (t + i) * dim;
                pieces.then[i] = from + (t + i + kTogether < length ? t + i + kTogether : t + i) * dim;
            }
        };
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
            load_head(q + (row * layer.heads + h) * dim, layer.q_norm, layer, row, my.values);
            for (int64_t i = 0; i < dim; ++i) narrow(my.values[i], my.stored[i]);
            load_rows<T>(my.stored, dim, 1, dim, my.x);
            float most = -INFINITY, sum = 0.0f;
            for (int64_t t = first; t < length; t += kTogether) {
                point(keys, t);
                dot<true>(pieces, my.x, dim, my.scores + t);
            }
            for (int64_t t = first; t < length; ++t) my.scores[t] *= layer.scale;
            if (layer.softcap != 0.0f)
                for (int64_t t = first; t < length; ++t) my.scores[t] = layer.softcap * tanhf(my.scores[t] / layer.softcap);
            for (int64_t t = first; t < length; ++t) {
                my.scores[t] = allowed && !allowed[t] ? -INFINITY : my.scores[t];
                most = my.scores[t] > most ? my.scores[t] : most;
            }
            for (int64_t t = first; t < length; ++t) my.scores[t] = exponential(my.scores[t] - most);
            for (int64_t t = first; t < length; ++t) sum += my.scores[t] = allowed && !allowed[t] ? 0.0f : my.scores[t];
            for (int64_t t = first; t < length; ++t) my.scores[t] /= sum;
            for (int64_t i = 0; i < round_up(dim); ++i) my.values[i] = 0.0f;
            for (int64_t t = first; t < length; t += kTogether) {
                point(values, t);
                axpy<true>(pieces, my.scores + t, my.values, dim);
            }
            write_sums<T>(my.values, 1, 1, dim, nullptr, y + (row * layer.heads + h) * dim, Team{0, 1, nullptr});
        }
    }

    void feed_forward(const DecodeLayer &layer, const DecodeMemory &memory, const DecodeColumns &columns, Own &my,
                      const Team &team) {
        load(layer.before_network, my);
        if (layer.network == moyu::Network::separate) separate(layer, columns, my, team);
        else together(layer, memory.neurons, columns, my, team);
        add(y, layer.after_network, my);
    }

    // gate, up and down as three products, each with its own columns skipped or none.
    void separate(const DecodeLayer &layer, const DecodeColumns &columns, Own &my, const Team &team) {
        const bool gated = layer.gate.weight != nullptr;
        if (gated) start(layer.gate, columns.gate, my.stored, my, team, q, sums[0]);
        start(layer.up, columns.up, my.stored, my, team, k, sums[1]);
        team.wait();
        if (layer.up.by_columns || (gated && layer.gate.by_columns)) {
            if (gated) finish(layer.gate, team, q, sums[0]);
            finish(layer.up, team, k, sums[1]);
            team.wait();
        }
        const Share share(a.rows * layer.up.q, team);
        open(layer, gated ? q : k, share.begin, share.end, my, v);
        if (gated)
            for (int64_t i = share.begin; i < share.end; ++i) narrow(widen(v[i]) * widen(k[i]), v[i]);
        team.wait();
        take(v, layer.down.n, my);
        start(layer.down, columns.down, v, my, team, y, sums[2]);
        team.wait();
        if (layer.down.by_columns) {
            finish(layer.down, team, y, sums[2]);
            team.wait();
        }
    }

    // to[begin .. end) = act(from), rounded.
    void open(const DecodeLayer &layer, const T *from, int64_t begin, int64_t end, Own &my, T *to) {
        for (int64_t i = begin; i < end; ++i) my.values[i - begin] = widen(from[i]);
        activate(layer.act, my.values, end - begin);
        for (int64_t i = begin; i < end; ++i) narrow(my.values[i - begin], to[i]);
    }

    // Neuron by neuron: those of a mask that is known before, or those that gate (or up), computed first, keeps.
    void together(const DecodeLayer &layer, const DecodeLevels &neurons, const DecodeColumns &columns, Own &my,
                  const Team &team) {
        const int64_t f = layer.down.n;
        NeuronsArgs args = {a.rows, a.threads, layer.act, my.stored, a.d, stored(layer.gate), stored(layer.up),
                            stored(layer.down), neurons.given, neurons.given_row, layer.gate.bias, layer.up.bias,
                            layer.down.bias, nullptr, 0, y};
        int64_t count = f;
        const int32_t *kept = nullptr;
        if (layer.network == moyu::Network::neurons) {
            tell(neurons, neurons.given, neurons.given_row, f, team);
            if (neurons.given) {
                count = list_kept(neurons.given, neurons.given_row, a.rows, f, my.any, my.kept);
                kept = my.kept;
            }
        } else {
            const bool gate_first = layer.network == moyu::Network::gate_first;
            const DecodeLinear &first = gate_first ? layer.gate : layer.up;
            start(first, gate_first ? columns.gate : columns.up, my.stored, my, team, k, sums[1]);
            team.wait();
            T *given = my.stored + a.rows * a.d;
            if (gate_first) open(layer, k, 0, a.rows * f, my, given);
            args.given = gate_first ? given : k;
            args.given_stride = f;
            (gate_first ? args.gate : args.up) = {};
            (gate_first ? args.gate_bias : args.up_bias) = nullptr;
            count = decide(layer.down, neurons, gate_first ? given : k, f, my, team);
            kept = my.kept;
            args.mask = my.mask;
            args.mask_stride = f;
        }
        const int64_t size = a.rows * round_up(a.d);
        float *own_sums = sums[0] + team.thread * size;
        if (layer.down.kind == Format::plain)
            bytes[team.thread] += neurons_share<T>(args, my.x, kept, count, team, own_sums);
        else
            bytes[team.thread] +=
                grouped_neurons_share<T>(args, round(my.stored, a.d, my), kept, count, team, own_sums);
        team.wait();
        bytes[team.thread] += write(layer.down, sums[0], team, a.d, y);
        team.wait();
    }
};

template <class T>
int64_t decode(const DecodeArgs &args) {
    DecodeArgs a = args;
    a.threads = a.threads < moyu::kMostThreads ? a.threads : moyu::kMostThreads;
    Decoding<T> step(a);
    auto work = [&](const Team &team) { step.run(team); };
    run_parallel(a.threads, work);
    return step.total();
}

}  // namespace
