"""Weights of any format of GGUF files: random blocks whose scales are finite and of a size that products bear."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights import FORMATS, Stored

# Where the float16 scales of a block are, in bytes.
SCALES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "q2_k": (80, 82), "q3_k": (108,), "iq4_nl": (0,), "iq4_xs": (0,), "mxfp4": (),
}  # fmt: skip


def raw(name: str, q: int, n: int, seed: int = 0) -> Tensor:
    """Rows (q, bytes) of a file, uint8."""
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (q, n // form.block, form.block_bytes), generator=generator, dtype=torch.uint8)
    for start in SCALES[name]:
        scales = torch.randn(q, n // form.block, 1, generator=generator).half() / 16
        blocks[..., start : start + 2] = scales.view(torch.uint8)
    if name == "mxfp4":
        blocks[..., 0] = torch.randint(118, 128, blocks.shape[:2], generator=generator, dtype=torch.uint8)
    return blocks.flatten(1)


def weight_of(name: str, q: int, n: int, seed: int = 0) -> Stored:
    """A weight (q, n) of random blocks; n is cut where it is no whole number of blocks."""
    form = FORMATS[name]
    n = max(form.block, n // form.block * form.block)
    return form.read(raw(name, q, n, seed), (q, n))
