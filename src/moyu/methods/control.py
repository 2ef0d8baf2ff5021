"""What decides between the steps of a generation: go on, or run the last tokens through the dense model again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """Go on with the masks as they are."""


@dataclass(frozen=True)
class Refresh:
    """Run the last `tokens` tokens through the dense model again, cache and sequence memory included."""

    tokens: int


@dataclass(frozen=True)
class Step:
    """What a controller sees after a decode step."""

    index: int  # decode steps so far in this sequence
    logits: Tensor  # (B, V) of the newest position
    tokens: Tensor  # (B, t) every token so far
    memory: dict[str, Tensor] = field(default_factory=dict)  # the controller's own, (B, ...); it follows the cache


class Controller(ABC):
    """Decides between steps; at most one per plan. What it must know of earlier steps it keeps in `step.memory`."""

    @abstractmethod
    def after(self, step: Step) -> Keep | Refresh:
        """The decision after a decode step."""
