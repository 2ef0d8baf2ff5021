// Q5_0: x_i = scale * (q_i - 16), q_i in 0 .. 31.
#pragma once

#include "formats/format.h"

namespace {

struct Q5_0 : Planar<5, HalfScales<false>, 16> {};

}  // namespace
