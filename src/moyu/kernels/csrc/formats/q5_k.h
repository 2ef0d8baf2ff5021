// Q5_K: as Q4_K with q_i in 0 .. 31.
#pragma once

#include "formats/format.h"

namespace {

struct Q5_K : Planar<5, BlockScales<1, Minima::bytes>> {};

}  // namespace
