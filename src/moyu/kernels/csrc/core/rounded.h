// Rows of x, rounded to groups of 8-bit integers with a float scale each.
#pragma once

#include "isa/integers.h"

namespace {

inline int64_t groups_of(int64_t values) { return (values + kGroup - 1) / kGroup; }

// As the dot products of formats take them, each row padded to 8 groups.
struct Rounded {
    int8_t *ordered;      // in their order
    int8_t *halves;       // kBeside groups at a time: elements 0 .. 15 of each, then 16 .. 31
    // scale * sum of a group's integers, and of each half of it: codes stand for more than their levels, and groups have offsets.
    float *scale, *sums, *half_sums;
    int64_t groups;       // of a row, padded

    static int64_t padded(int64_t n) { return (groups_of(n) + 7) / 8 * 8; }
    static Rounded take(Arena &arena, int64_t rows, int64_t n) {
        Rounded r;
        r.groups = padded(n);
        r.ordered = arena.take<int8_t>(rows * r.groups * kGroup);
        r.halves = arena.take<int8_t>(rows * r.groups * kGroup);
        r.scale = arena.take<float>(rows * r.groups);
        r.sums = arena.take<float>(rows * r.groups);
        r.half_sums = arena.take<float>(2 * rows * r.groups);
        return r;
    }
    Rounded fitted(int64_t n) const { return {ordered, halves, scale, sums, half_sums, padded(n)}; }  // for rows as long or shorter
    // From row r on.
    Rounded row(int64_t r) const {
        return {ordered + r * groups * kGroup, halves + r * groups * kGroup, scale + r * groups, sums + r * groups,
                half_sums + 2 * r * groups, groups};
    }
    template <class T>
    void fill(const T *x, int64_t n) {  // one row
        for (int64_t b = 0; b < groups; ++b) {
            float values[kGroup];
            int8_t *q = ordered + b * kGroup, *half = halves + b / kBeside * kBeside * kGroup + b % kBeside * 16;
            const int64_t left = n - b * kGroup;
            if (left >= kGroup) {
                for (int i = 0; i < kGroup; ++i) values[i] = widen(x[b * kGroup + i]);
            } else {
                for (int i = 0; i < kGroup; ++i) values[i] = i < left ? widen(x[b * kGroup + i]) : 0.0f;
            }
            int32_t first;
            const int32_t sum = quantise_group(values, q, scale + b, &first);
            sums[b] = static_cast<float>(sum) * scale[b];
            half_sums[2 * b] = static_cast<float>(first) * scale[b], half_sums[2 * b + 1] = static_cast<float>(sum - first) * scale[b];
            for (int i = 0; i < 16; ++i) half[i] = q[i], half[16 * kBeside + i] = q[16 + i];
        }
    }
};

template <class T>
void fill_rows(const Rounded &to, const void *x, int64_t stride, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; ++r) to.row(r).fill(at<T>(x, r * stride), n);
}

}  // namespace
