#include "kernels.h"

#include "vec_portable.h"  // first: the shapes are written in terms of its Vec
#include "shapes.h"

const moyu::Table *moyu::portable_table() { return &table; }
