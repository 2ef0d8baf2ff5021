// Q3_K: x_i = factor * scale * (q_i - 4), q_i in 0 .. 7; a scale for each half of a group.
#pragma once

#include "formats/format.h"

namespace {

struct Q3_K : Planar<3, BlockScales<2, Minima::none>, 4> {};

}  // namespace
