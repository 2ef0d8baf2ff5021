// Q4_K: x_i = factor * scale * q_i - least * minimum, q_i in 0 .. 15; a scale and a minimum for each group.
#pragma once

#include "formats/format.h"

namespace {

struct Q4_K : Planar<4, BlockScales<1, Minima::bytes>> {};

}  // namespace
