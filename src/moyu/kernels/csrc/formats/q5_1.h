// Q5_1: x_i = scale * q_i + offset, q_i in 0 .. 31.
#pragma once

#include "formats/format.h"

namespace {

struct Q5_1 : Planar<5, HalfScales<true>> {};

}  // namespace
