#include "core/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512BF16__)
#include "isa/vec_avx512.h"  // first: the table is written in terms of its Vec
#include "core/table.h"

const moyu::Table *moyu::avx512bf16_table() { return &table; }
#else
const moyu::Table *moyu::avx512bf16_table() { return nullptr; }
#endif
