"""What the ways share in which a whole decode step runs in one piece: natively on a CPU, compiled on an accelerator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moyu.engine.session import Session
from moyu.engine.steps.ends import Ends
from moyu.engine.steps.layers import PlainLayer
from moyu.engine.trace import Trace
from moyu.methods.values import Rows
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear

Angles = tuple[Tensor, Tensor]  # cos and sin


class NotCompiled(Exception):
    """Why a step could not be compiled or captured here: the general one stands in from then on."""


class Way(Protocol):
    """How a step runs. `moyu.engine.steps.proof` holds both to what a model's own modules give."""

    CAN: frozenset[str]  # what a site may ask, `moyu.methods.needs`

    def why_not(self, session: Session) -> str | None:
        """Why it cannot run this model here; None: it can."""
        ...

    def layer(self, layer: PlainLayer, x: Tensor, angles: Angles | None, network: bool) -> Tensor:
        """A layer on hidden states (B, T, d), token by token, with nothing skipped, or (not `network`) with all of its neurons."""
        ...

    def logits(self, ends: Ends, ids: Tensor) -> Tensor:
        """Logits (T, V) of ids (T,) without layers."""
        ...

    def run(self, session: Session, layers: list[PlainLayer], ends: Ends | None) -> tuple[Run | None, str | None]:
        """The step of a model whose layers are plain; or None and why there is none."""
        ...


class Run(Protocol):
    """The step of a whole model."""

    @property
    def trace(self) -> Trace:
        """What is noted of a step."""
        ...

    @property
    def most(self) -> int:
        """Rows of a step at most."""
        ...

    @property
    def waits_for_nobody(self) -> bool:
        """Whether a step is over for the host once it has begun on the device."""
        ...

    @property
    def layers(self) -> list[PlainLayer]:
        """All decoder layers, in order."""
        ...

    @property
    def ends(self) -> Ends | None:
        """What is around the layers; None: the step is of the layers alone."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        ...

    def attach(self, replace: Callable[[nn.Module, str, Any], None]) -> None:
        """Put what it needs in the place of modules' forwards."""
        ...

    def detach(self) -> None:
        """Undo what it did to weights."""
        ...

    def can_append(self, cache: Any, batch: int, dtype: torch.dtype) -> bool:
        """Whether it can append to this cache."""
        ...

    def untouched(self) -> bool:
        """Whether the modules are still what was proved."""
        ...

    def logits(
        self,
        cache: Any,
        ids: Tensor,
        masks: Sequence[Tensor | None],
        allowed: Tensor | None,
        positions: Tensor | None,
        rows: Rows | None,
    ) -> Tensor:
        """One step from ids (B, 1) to logits (B, 1, V), which appends to the cache.

        masks: (B, f) a layer, or None where nothing is known before. allowed: columns (B, past + 1) that may be attended to, None =
        all. positions: (B,), None = the columns that the rows hold. rows: what a chooser is told, None where there is none.
        """
        ...


class Watch:
    """Whether modules are what they were when this was made, and whether their weights lie where they lay."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """The modules that a step stands for."""
        expected, self._hooks, weights = [], list[dict](), []
        for module in modules:
            own = vars(module)
            weights += own["_parameters"].values()
            self._hooks += [own["_forward_hooks"], own["_forward_pre_hooks"]]
            expected.append((own, "forward", own.get("forward")))
            quantised = isinstance(module, QuantisedLinear | QuantisedEmbedding)
            if quantised:
                weights += own["_buffers"].values()
            for kind in ("_modules", "_parameters", "_buffers") if quantised else ("_modules", "_parameters"):
                expected += [(own[kind], name, value) for name, value in own[kind].items()]
        self._owners, self._names, self._values = (list(column) for column in zip(*expected, strict=True))
        self._weights = [weight for weight in weights if weight is not None]
        self._addresses = [weight.data_ptr() for weight in self._weights]

    def untouched(self) -> bool:
        """Whether nobody has hooked, replaced or patched one of them."""
        # Seven hundred comparisons, in C: as a Python loop they take half a millisecond.
        return not any(self._hooks) and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))

    def moved(self) -> bool:
        """Whether something has repacked the weights."""
        return list(map(Tensor.data_ptr, self._weights)) != self._addresses
