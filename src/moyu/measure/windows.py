"""Windows of tokens, with the source of their text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Text for calibration or evaluation, as windows of tokens."""

    tokens: Tensor  # (B, T) int64
    prompt: int  # positions before this one are dense
    source: Mapping[str, Any] = field(default_factory=dict)  # fingerprint of the text
    documents: tuple[int, ...] = ()  # the document of each window, if known: intervals resample documents

    @property
    def digest(self) -> str:
        """16 hex digits over the tokens, where they end to be dense, and their documents."""
        digest = hashlib.sha256(self.tokens.cpu().numpy().tobytes())
        digest.update(repr((tuple(self.tokens.shape), self.prompt, self.documents)).encode())
        return digest.hexdigest()[:16]


def as_batches(tokens: Tensor, vocabulary: int, floats: int = 1 << 27) -> Sequence[Tensor]:
    """Windows (B, T) in batches whose logits take at most some 2^27 floats."""
    return tokens.split(max(1, floats // (tokens.shape[1] * vocabulary)))
