// 8 floats in an array: any compiler, any CPU; the loops of constant length become whatever SIMD the target has.
#pragma once

#include "core/element.h"

namespace {

struct Vec {
    static constexpr const char *isa = "portable";
    static constexpr int width = 8;
    struct Reg { float lane[width]; };

    static Reg zero() { return set(0.0f); }
    static Reg set(float value) {
        Reg r;
        for (int i = 0; i < width; ++i) r.lane[i] = value;
        return r;
    }
    static Reg fma(Reg a, Reg b, Reg c) {
        for (int i = 0; i < width; ++i) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    static Reg add(Reg a, Reg b) {
        for (int i = 0; i < width; ++i) a.lane[i] += b.lane[i];
        return a;
    }
    static float sum(Reg a) {
        const float even = (a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6]);
        return even + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
    }

    static Reg load(const float *p) {
        Reg r;
        for (int i = 0; i < width; ++i) r.lane[i] = p[i];
        return r;
    }

    // 2 * width elements in two registers, in their order.
    struct Pair { Reg a, b; };
    template <class T>
    static constexpr bool split = false;

    template <class T>
    static Pair load2(const T *p) {
        Pair r;
        for (int i = 0; i < width; ++i) r.a.lane[i] = widen(p[i]);
        for (int i = 0; i < width; ++i) r.b.lane[i] = widen(p[width + i]);
        return r;
    }
    // The first `count` < 2 * width elements, the others 0; touches no memory beyond them.
    template <class T>
    static Pair load2_part(const T *p, int count) {
        T all[2 * width] = {};
        for (int i = 0; i < count; ++i) all[i] = p[i];
        return load2(all);
    }
    static void store(float *p, Reg a) {
        for (int i = 0; i < width; ++i) p[i] = a.lane[i];
    }
};

}  // namespace
