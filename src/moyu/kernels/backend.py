"""What a back end is: it computes rows, columns, levels, words and neurons of stored weights. The list of them is in `choosing`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moyu.weights import Format, Stored

Read = int | Callable[[], int]  # bytes of weights and biases that were read, or what it takes to find out


class Neurons(NamedTuple):
    """The arguments of `kernels.neurons`."""

    x: Tensor
    gate: Stored | None
    up: Stored | None
    down: Stored
    mask: Tensor
    act: str
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    given: Tensor | None = None


class Backend(ABC):
    """One way to compute. The products are what `kernels.rows`, `columns`, `levels`, `words` and `neurons` say, on checked arguments."""

    name: str

    @abstractmethod
    def why_not(self) -> str | None:
        """Why it cannot be used here, with the remedy; None = it can."""

    @abstractmethod
    def supports(self, op: str, format: Format, x: Tensor) -> str | None:
        """Why it cannot compute `op` on weights of this format for x's device, dtype and rows; None = it can."""

    @abstractmethod
    def details(self) -> str:
        """What runs, for records: an instruction set, a device."""

    @abstractmethod
    def rows(self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Read]: ...

    @abstractmethod
    def columns(self, x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Read]: ...

    def levels(self, x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Read]:
        """Called where `supports` does not refuse it."""
        raise NotImplementedError(f"the {self.name} back end has no levels")

    def words(self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Read]:
        """Called where `supports` does not refuse it."""
        raise NotImplementedError(f"the {self.name} back end has no words")

    @abstractmethod
    def neurons(self, call: Neurons) -> tuple[Tensor, Read]: ...


def touched_groups(mask: Tensor, group: int) -> int:
    """How many groups of inputs any row of the mask (N, n) keeps something of."""
    kept = mask.any(0)
    padded = kept.new_zeros(-(-len(kept) // group) * group)
    padded[: len(kept)] = kept
    return int(padded.unflatten(0, (-1, group)).any(1).sum())


def columns_read(weight: Stored, mask: Tensor) -> int:
    """Bytes of the columns that any row keeps, and of the scales of the groups that they are in."""
    return int(mask.any(0).sum()) * weight.column_bytes + touched_groups(mask, weight.format.group) * weight.scale_bytes


def levels_read(weight: Stored, mask: Tensor) -> int:
    """Bytes of the first bits and of the scales, and of the further bits of inputs that any row chooses."""
    groups = -(-weight.shape[1] // weight.format.group)
    first, further = weight.format.plane_bytes(weight.shape[0])
    return groups * (first + weight.scale_bytes) + int(mask.any(0).sum()) * further


def words_read(weight: Stored, mask: Tensor | None) -> int:
    """Bytes of the first bits and of the scales of all rows, and of the further bits of rows that any row of the mask keeps."""
    _, further = weight.format.part_bytes(weight.shape[1])
    kept = weight.shape[0] if mask is None else int(mask.any(0).sum())
    return weight.shape[0] * (weight.row_bytes - further) + kept * further
