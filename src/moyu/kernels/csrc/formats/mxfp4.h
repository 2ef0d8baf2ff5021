// MXFP4: x_i = 2^(e - 128) * level of q_i; the levels are twice those of a float of 4 bits.
#pragma once

#include "formats/format.h"

namespace {

struct Floats4 {
    static constexpr int8_t levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
};
struct MXFP4 : Planar<4, PowerScales, 0, Floats4> {};

}  // namespace
