"""The native way of a step: the C++ kernels of the CPU."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from moyu.engine.session import Session
from moyu.engine.steps.ends import Ends
from moyu.engine.steps.layers import PlainLayer
from moyu.engine.steps.run import DecodeRun, run_step
from moyu.engine.steps.way import Angles
from moyu.kernels import cpu


class Native:
    """`Way`, natively."""

    CAN = frozenset(
        {
            "columns by magnitude",
            "rows by magnitude",
            "neurons by masks",
            "factors",
            "bias",
            "remainder",
            "further bits",
        }
        | {"words by score"}  # of the one method that has such sites, `shortlist`
    )

    def why_not(self, session: Session) -> str | None:
        """Why the extension cannot run the model."""
        return cpu.unavailable() or cpu.unsupported(next(session.model.parameters()))

    def layer(self, layer: PlainLayer, x: Tensor, angles: Angles | None, network: bool) -> Tensor:
        """`Way.layer`."""
        kv_heads = layer.block.pieces["k"].shape[0] // layer.head_dim
        nothing = torch.zeros(1, layer.block.neurons, dtype=torch.bool)
        decoder = cpu.extension().Decoder()
        decoder.add(layer.native(masked=network))
        keep, y = _Room(x, kv_heads, layer.head_dim, None if network else nothing), x.clone()
        for t in range(x.shape[1]):
            now = [] if angles is None else [tuple(a[0, t : t + 1].float().contiguous() for a in angles)]
            row = y[:, t].contiguous()
            run_step(decoder, torch.full((len(x),), t), x.shape[1], now, None, keep.memory, hidden=row)
            y[:, t] = row
        return y

    def logits(self, ends: Ends, ids: Tensor) -> Tensor:
        """`Way.logits`."""
        decoder = cpu.extension().Decoder()
        decoder.ends = ends.native()
        logits = torch.empty((len(ids), ends.head.out_features), dtype=ends.norm.module.weight.dtype)  # pyright: ignore
        past, tokens = torch.zeros(len(ids), dtype=torch.int64), ids[:, None].contiguous()
        run_step(decoder, past, 1, [], None, array("q"), ids=tokens, logits=logits)
        return logits

    def run(self, session: Session, layers: list[PlainLayer], ends: Ends | None) -> tuple[DecodeRun, None]:
        """`Way.run`."""
        return DecodeRun(session, layers, ends), None


class _Room:
    """Keys and values of a probe's rows x (B, T, d) in one layer, as the extension finds them."""

    def __init__(self, x: Tensor, kv_heads: int, head_dim: int, mask: Tensor | None) -> None:
        self.memory, self.held = array("q"), []
        for _ in range(2):
            self.held.append(x.new_zeros(len(x), kv_heads, x.shape[1], head_dim))
            self.memory.extend((self.held[-1].data_ptr(), *self.held[-1].stride()[:2]))
        self.memory.extend((0, 0, 0) if mask is None else (mask.data_ptr(), 0, 0))
