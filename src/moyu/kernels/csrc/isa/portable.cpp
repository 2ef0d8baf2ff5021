#include "core/kernels.h"

#include "isa/vec_portable.h"  // first: the table is written in terms of its Vec
#include "core/table.h"

const moyu::Table *moyu::portable_table() { return &table; }
