"""Text as windows of tokens, with what they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Calibration or evaluation text as token windows."""

    tokens: Tensor  # (B, T) int64
    prompt: int  # positions before this one are dense
    source: Mapping[str, Any] = field(default_factory=dict)  # fingerprint of the text
    documents: tuple[int, ...] = ()  # of each window, where it is known: the unit that intervals resample
