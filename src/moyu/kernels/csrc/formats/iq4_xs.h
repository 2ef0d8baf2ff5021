// IQ4_XS: x_i = factor * scale * level of q_i, with IQ4_NL's levels; a scale for each group.
#pragma once

#include "formats/iq4_nl.h"

namespace {

struct IQ4_XS : Planar<4, BlockScales<1, Minima::none>, 0, Nonlinear> {};

}  // namespace
