// Q4_1: x_i = scale * q_i + offset, q_i in 0 .. 15.
#pragma once

#include "formats/format.h"

namespace {

struct Q4_1 : Planar<4, HalfScales<true>> {};

}  // namespace
