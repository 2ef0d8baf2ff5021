// Q6_K: x_i = factor * scale * (q_i - 32), q_i in 0 .. 63; a scale for each half of a group.
#pragma once

#include "formats/format.h"

namespace {

struct Q6_K : Planar<6, BlockScales<2, Minima::none>, 32> {};

}  // namespace
