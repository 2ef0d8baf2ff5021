// IQ4_NL: x_i = scale * level of q_i, 16 levels that are closer together near zero.
#pragma once

#include "formats/format.h"

namespace {

struct Nonlinear {
    static constexpr int8_t levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
};
struct IQ4_NL : Planar<4, HalfScales<false>, 0, Nonlinear> {};

}  // namespace
