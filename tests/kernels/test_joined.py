"""Blocks of GGUF files that MOYU writes: the inverse of reading them, in every byte."""

import pytest
import torch
from raw_weights import raw

from moyu.weights import FORMATS
from moyu.weights.grouped import Grouped

MADE = [name for name, f in FORMATS.items() if isinstance(f, Grouped) and type(f).joined is not Grouped.joined]


def test_the_formats_that_can_be_made():
    assert MADE == ["q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k"]
    with pytest.raises(ValueError, match="llama-quantize"):
        FORMATS["iq4_nl"].joined(torch.zeros(1, 32, dtype=torch.uint8))  # pyright: ignore


@pytest.mark.parametrize("name", MADE)
def test_blocks_that_are_split_join_to_the_same_bytes(name):
    form = FORMATS[name]
    assert isinstance(form, Grouped)
    blocks = raw(name, 7, 3 * form.block, seed=1).unflatten(1, (3, -1))
    codes, *fields = form.split(blocks)
    assert torch.equal(form.joined(codes, *fields), blocks)
