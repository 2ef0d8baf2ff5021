#include "core/kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)
#include "isa/vec_avx2.h"  // first: the table is written in terms of its Vec
#include "core/table.h"

const moyu::Table *moyu::avxvnni_table() { return &table; }
#else
const moyu::Table *moyu::avxvnni_table() { return nullptr; }
#endif
