#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)
#include "vec_avx2.h"  // first: the shapes are written in terms of its Vec
#include "shapes.h"

const moyu::Table *moyu::avxvnni_table() { return &table; }
#else
const moyu::Table *moyu::avxvnni_table() { return nullptr; }
#endif
