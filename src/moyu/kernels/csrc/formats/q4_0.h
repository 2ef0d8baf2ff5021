// Q4_0: x_i = scale * (q_i - 8), q_i in 0 .. 15.
#pragma once

#include "formats/format.h"

namespace {

struct Q4_0 : Planar<4, HalfScales<false>, 8> {};

}  // namespace
