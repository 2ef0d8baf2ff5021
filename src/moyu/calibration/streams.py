"""The two streams of hidden states that calibration sends through the layers, one layer after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moyu.calibration.taps import LaterTaps, Taps
from moyu.engine.applied import Applied
from moyu.engine.memory import SequenceMemory
from moyu.engine.products import Products
from moyu.engine.rows import rows_of
from moyu.engine.session import Observer
from moyu.engine.sites import SiteState
from moyu.errors import UserError
from moyu.measure.windows import Windows
from moyu.methods.values import Tap
from moyu.model.dissect import keeps_logits
from moyu.model.finite import require_finite
from moyu.plan import Plan

Progress = Callable[[int, int], None]  # (layers done, layers)


class Walk:
    """Runs single layers on two streams of hidden states: the dense model's, and the one behind sparse layers.

    If the layers are not a simple chain, the whole model runs each time.
    """

    def __init__(self, applied: Applied, windows: Windows, chains: dict[str, Chain] | None = None) -> None:
        """chains: dense runs of the same model that are kept, by their windows' digest; this one is added."""
        self.applied, self.windows = applied, windows
        self.layers = applied.anatomy.layers
        self.dense_taps: dict[tuple[int, Tap], Tensor] = {}  # of earlier layers, for sites that read them
        self.sparse_taps: dict[tuple[int, Tap], Tensor] = {}
        self._attached: list[SiteState] = []
        device = next(applied.model.parameters()).device
        self.tokens = windows.tokens.to(device)
        batch, length = self.tokens.shape
        if not 0 <= windows.prompt < length:
            raise UserError(
                f"prompt of {windows.prompt} in windows of {length} tokens", "use a prompt shorter than the window"
            )
        self.rows = rows_of((batch, length), None, 0, windows.prompt, device)
        chains = {} if chains is None else chains
        if windows.digest not in chains:
            chains[windows.digest] = dense_run(applied, self.tokens)
        chain = chains[windows.digest]
        self.chain = chain if chain.holds else None
        self.dense = self.sparse = chain.start if chain.holds else self.tokens

    def _run(
        self,
        index: int,
        hidden: Tensor,
        boundary: int,
        observer: Observer | None,
        products: Products | None = None,
    ) -> Tensor:
        if self.chain is None:
            with self.applied.watched(observer=observer), self.applied.prompt(boundary):
                self.applied.model(input_ids=self.tokens, use_cache=False)
            return hidden
        rows = self.rows._replace(sparse=self.rows.pos >= boundary)
        state = self.applied.new_pass(rows, SequenceMemory(prompt=boundary))
        state.observer, state.products = observer, products
        state.taps = self.dense_taps if boundary == self.tokens.shape[1] else self.sparse_taps
        args, kwargs = self.chain.calls[index]
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        with self.applied.entered(state):
            return first(self.layers[index](*args, **kwargs))

    def watch(self, index: int, observer: Observer) -> Tensor:
        """One run of a layer on the sparse stream, whose attached sites act behind the prompt: its output."""
        return self._run(index, self.sparse, self.windows.prompt, observer)

    def observe(self, index: int) -> Taps:
        """Taps and decisions of one layer on the sparse stream. Its attached sites act behind the prompt."""
        taps = Taps(index, self.sparse_taps, self._ahead)
        self.watch(index, taps)
        return taps

    def observe_dense(self, index: int) -> Taps:
        """Taps of one layer on the dense stream, without its attached sites."""
        attached, taps = self._attached, Taps(index, self.dense_taps, self._ahead)
        self.attach(index, [])
        self._run(index, self.dense, self.tokens.shape[1], taps)
        self.attach(index, attached)
        return taps

    def later(self, run: Callable[[], Taps]) -> LaterTaps:
        """Taps of a run of a layer, which takes place only if they are asked for."""
        return LaterTaps(self.rows, run)

    @property
    def _ahead(self) -> set[tuple[int, Tap]]:
        """Taps that an observer must keep for later layers; the layers of a chain do it themselves."""
        return self.applied.lookahead if self.chain is None else set()

    def output(self, index: int, products: Products | None = None) -> Tensor:
        """The layer's output (B, T, d) on the sparse stream, with its attached sites.

        products: of earlier runs, for a run that changes a few sites.
        """
        if self.chain is None:
            raise UserError(
                "the layers of this model are not a simple chain, so none can run alone", "allocate uniformly"
            )
        return self._run(index, self.sparse, self.windows.prompt, None, products)

    def attach(self, index: int, states: Iterable[SiteState]) -> None:
        """Attach sites to the layer's executors, in place of those that they have."""
        self._attached = list(states)
        for call in (*self.applied.ffns, *self.applied.linears, *self.applied.attentions):
            if call.block.layer == index:
                call.attach([s for s in self._attached if s.site.expert == call.block.expert])

    def advance(self, index: int, sparse: Tensor | None = None) -> None:
        """Go on behind the layer on both streams. sparse: its output with its attached sites, where that is known."""
        if self.chain is None:
            return
        self.sparse = self._run(index, self.sparse, self.windows.prompt, None) if sparse is None else sparse
        if self.applied.lookahead:  # to keep what later layers read
            self._run(index, self.dense, self.tokens.shape[1], None)
        self.dense = self.chain.inputs(index + 1)


def states_of(plan: Plan, layer: int) -> list[SiteState]:
    """The plan's sites of a layer."""
    parts = [part for part in plan.parts.values() if part[0].layer == layer]
    return [SiteState(site, params, plan.method_of(site)) for site, params in parts]


def dense_run(applied: Applied, tokens: Tensor) -> Chain:
    """One dense pass over tokens (B, T). Raises UserError where it gives numbers that are not finite."""
    model: Any = applied.model
    # Logits of all calibration tokens may take gigabytes, and nobody reads them.
    few = {"logits_to_keep": 1} if keeps_logits(model) else {}
    chain = Chain(applied.anatomy.layers)
    try:
        with applied.prompt(tokens.shape[1]):
            output = model(input_ids=tokens, use_cache=False, **few)
    finally:
        chain.remove()
    if not all(bool(torch.isfinite(t).all()) for t in (output.logits, chain.last)):
        require_finite(model, type(model).__name__, "mend the weight before anything is fitted to it")
        raise UserError(
            f"{type(model).__name__} gives numbers on the calibration text that are not finite",
            "load it in another type, for example dtype='float32'",
        )
    return chain


def first(output: Any) -> Any:
    """A module's output, or the first of several outputs."""
    return output[0] if isinstance(output, tuple | list) else output


class Chain:
    """Watches one forward pass: does each layer run once, in order, on the output of the layer before it?"""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.calls: list[tuple[tuple, dict]] = []
        self.start: Tensor = torch.empty(0)
        self.holds = True
        self._layers, self.last = list(layers), torch.empty(0)  # last: the output of the last layer that ran
        self._beside: set[int] = set()  # further outputs of the last layer: in a model with two streams, the second one
        self._handles = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in layers]
        self._handles += [layer.register_forward_hook(self._after) for layer in layers]

    def inputs(self, index: int) -> Tensor:
        """The hidden states (B, T, d) that a layer was given; behind the last layer its output."""
        if index == len(self.calls):
            return self.last
        args, kwargs = self.calls[index]
        return args[0] if args else kwargs["hidden_states"]

    def remove(self) -> None:
        """Stop watching. A chain that ended early does not hold."""
        for handle in self._handles:
            handle.remove()
        self.holds = self.holds and len(self.calls) == len(self._layers)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        index = len(self.calls)
        x = args[0] if args else kwargs.get("hidden_states")
        in_order = index < len(self._layers) and module is self._layers[index]
        same = isinstance(x, Tensor) and (index == 0 or (x.shape == self.last.shape and torch.equal(x, self.last)))
        self.holds = self.holds and in_order and same
        if index == 0 and isinstance(x, Tensor):
            self.start = x
        others = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, Tensor) and t is not x]
        self.holds = self.holds and not any(t.data_ptr() in self._beside for t in others)
        self.calls.append((args, kwargs))

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        last = first(output)
        beside = output[1:] if isinstance(output, tuple | list) else ()
        self._beside = {t.data_ptr() for t in beside if isinstance(t, Tensor)}
        self.last = last if isinstance(last, Tensor) else torch.empty(0)
