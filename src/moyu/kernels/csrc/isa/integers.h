// The integer products of this unit's instruction set; MOYU_INTEGERS is the width of their registers in bits.
#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define MOYU_INTEGERS 512
#include "isa/integers_avx512.h"
#elif defined(__AVX2__)
#define MOYU_INTEGERS 256
#include "isa/integers_avx2.h"
#else
#define MOYU_INTEGERS 0
#include "isa/integers_portable.h"
#endif
