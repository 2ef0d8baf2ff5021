// Q2_K: x_i = factor * scale * q_i - least * minimum, q_i in 0 .. 3; a scale and a minimum for each half of a group, in one byte.
#pragma once

#include "formats/format.h"

namespace {

struct Q2_K : Planar<2, BlockScales<2, Minima::nibbles>> {};

}  // namespace
