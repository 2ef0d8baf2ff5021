// All of one instruction set's kernels, written in terms of the Vec that was included before, in one table.
#pragma once

#include "blocks.h"
#include "decode.h"
#include "linear.h"
#include "neurons.h"
#include "read.h"

namespace {

const moyu::Table table = {
    Vec::isa,
    {neurons<float>, neurons<BF16>, neurons<F16>},
    {by_blocks<float, rows_block<float>>, by_blocks<BF16, rows_block<BF16>>, by_blocks<F16, rows_block<F16>>},
    {by_blocks<float, columns_block<float>>, by_blocks<BF16, columns_block<BF16>>, by_blocks<F16, columns_block<F16>>},
    {block_neurons<float>, block_neurons<BF16>, block_neurons<F16>},
    {block_linear<float, block_rows_part<float>>, block_linear<BF16, block_rows_part<BF16>>,
     block_linear<F16, block_rows_part<F16>>},
    {block_linear<float, block_columns_part<float>>, block_linear<BF16, block_columns_part<BF16>>,
     block_linear<F16, block_columns_part<F16>>},
    {decode<float>, decode<BF16>, decode<F16>},
    read,
};

}  // namespace
