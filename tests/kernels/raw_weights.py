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
        scales = torch.randn(q, n // form.block, 1, generator=generator).half() / (16 if form.block == 32 else 512)
        blocks[..., start : start + 2] = scales.view(torch.uint8)
    if name == "mxfp4":
        blocks[..., 0] = torch.randint(118, 128, blocks.shape[:2], generator=generator, dtype=torch.uint8)
    return blocks.flatten(1)


def weight_of(name: str, q: int, n: int, seed: int = 0) -> Stored:
    """A weight (q, n) of random blocks."""
    return FORMATS[name].read(raw(name, q, n, seed), (q, n))


def extreme(name: str, q: int, blocks: int, byte: int) -> Stored:
    """A weight (q, blocks of it) whose every byte is the same, and every float16 scale 1."""
    form = FORMATS[name]
    content = torch.full((q, blocks, form.block_bytes), byte, dtype=torch.uint8)
    for start in SCALES[name]:
        content[..., start : start + 2] = torch.ones(1).half().view(torch.uint8)
    if name == "mxfp4":
        content[..., 0] = 128
    return form.read(content.flatten(1), (q, blocks * form.block))
