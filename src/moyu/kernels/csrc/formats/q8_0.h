// Q8_0: x_i = scale * q_i, q_i in -127 .. 127, a byte each.
#pragma once

#include "formats/format.h"

namespace {

struct Q8_0 : Planar<8, HalfScales<false>> {};

}  // namespace
