"""What each activation row of a call is: whose, where, padding or not, dense or sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moyu.methods.values import Rows

# Rows up to which the skipping kernels are used; above it the same masks run as dense products.
MAX_SKIPPING_ROWS = 8


def rows_of(
    shape: tuple[int, int],
    mask: Any,
    past: int,
    boundary: int | Tensor,
    device: torch.device,
    known: Tensor | None = None,
) -> Rows:
    """Rows of a (B, T) call that follows `past` columns.

    mask: an attention mask in any form that transformers hands over, see `columns_of`. boundary: columns before it are
    dense; (B,) where sequences differ. known: (B, past) bool, which earlier columns are no padding, where the mask does not
    say it.
    """
    batch, length = shape
    columns = torch.arange(past, past + length, device=device)
    told = columns_of(mask, past + length, batch)
    if told is None:
        pos = columns.expand(batch, length)
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    else:
        if known is not None and known.shape == (batch, past):  # a sliding window hides columns that are no padding
            told = torch.cat([told[:, :past] | known, told[:, past:]], dim=1)
        pos = (told.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        valid = told[:, past:]
    slots = torch.arange(batch, device=device)[:, None].expand(batch, length)
    border = boundary[:, None] if isinstance(boundary, Tensor) else boundary
    sparse = (columns >= border).expand(batch, length) & valid
    return Rows(slots.reshape(-1), pos.reshape(-1), valid.reshape(-1), sparse.reshape(-1), batch)


def columns_of(mask: Any, columns: int, batch: int) -> Tensor | None:
    """Which of the first `columns` columns are no padding, (B, columns) bool; None where the mask does not say.

    mask: (B, S) as a tokenizer makes it; (B or 1, h, T, S) boolean or added to the scores; a dictionary of those by type of
    layer, of which the one with full attention counts; None.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.shape[-1] < columns:
        return None
    if mask.dim() == 2:
        return mask[:, :columns].bool()
    if mask.dim() != 4:
        return None
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[
        :, 0, :, :columns
    ]  # (B, T, S)
    length = seen.shape[1]
    # The last row is no padding (padding is on the left), and neither is what such a row attends to. Rows of padding may
    # attend to anything, so they are asked only once they are known to be none.
    told = seen[:, -1]
    while True:
        own = told[:, columns - length :]  # (B, T): which rows of the call are no padding
        more = told | (seen & own[:, :, None]).any(1)
        if bool((more == told).all()):
            return told.expand(batch, columns)
        told = more


def rows_at(lengths: Tensor, boundary: int | Tensor, device: torch.device) -> Rows:
    """One row a sequence, at the position behind what each holds, lengths (B,); dense before its boundary."""
    lengths = lengths.to(device)
    sparse = lengths >= (boundary.to(device) if isinstance(boundary, Tensor) else boundary)
    slots = torch.arange(len(lengths), device=device)
    return Rows(slots, lengths, torch.ones_like(sparse), sparse, len(lengths))
