"""Every format of GGUF files, bit for bit as llama.cpp's own package decodes it, however it is laid out."""

import gguf
import numpy as np
import pytest
import torch
from raw_weights import raw

from moyu.weights import FORMATS, IN_FILES, QUANTISED

TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in IN_FILES}


def decoded(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """What the `gguf` package makes of it."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), TYPES[name]).astype(np.float32))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))) or torch.equal(a, b)


@pytest.mark.parametrize("name", IN_FILES)
@pytest.mark.parametrize(("q", "blocks"), [(1, 1), (5, 2), (70, 3)])
def test_values_are_those_of_the_file_in_every_bit(name, q, blocks):
    form = FORMATS[name]
    assert form.ggml == TYPES[name].value
    assert (form.block, form.block_bytes) == gguf.GGML_QUANT_SIZES[TYPES[name]]
    n = blocks * form.block
    content = raw(name, q, n, seed=q)
    expected = decoded(content, name)
    weight = form.read(content, (q, n))
    assert weight.nbytes == q * weight.row_bytes
    assert same(weight.values(), expected)
    turned = weight.laid_out("columns")
    assert turned.tensors[0].nbytes == n * weight.column_bytes
    assert turned.tensors[1].nbytes == pytest.approx(n / 32 * weight.scale_bytes, abs=n / 32)
    assert same(turned.values(), expected)
    back = turned.laid_out("rows")
    assert all(torch.equal(a, b) for a, b in zip(back.tensors, weight.tensors, strict=True))
    rows, columns = torch.tensor([q - 1, 0, q // 2]), torch.tensor([n - 1, 3, n // 2])
    assert same(weight.pieces(rows), expected[rows])
    assert same(turned.pieces(columns), expected.t()[columns])
    for stored in (weight, turned):
        assert same(stored.at(rows, columns), expected[rows, columns])
        assert torch.equal(stored.values(torch.bfloat16), expected.bfloat16())


def test_what_cannot_be_made_is_said():
    for name in IN_FILES:
        if name in QUANTISED:
            assert torch.allclose(FORMATS[name].store(torch.ones(1, 32)).values(), torch.ones(1, 32), rtol=1e-3)
        else:
            with pytest.raises(ValueError, match="llama-quantize"):
                FORMATS[name].store(torch.ones(1, 32))
