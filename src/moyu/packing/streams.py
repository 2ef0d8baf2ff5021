"""What a text puts into each linear: in the model as it was, and in the same model with everything before the linear packed.

Layers run one after another on both streams of hidden states. Inputs of a layer's linears are seen stage by stage, each behind the
packed linears before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from moyu.calibration.streams import Chain, first
from moyu.errors import UserError
from moyu.model.dissect import find_layers, keeps_logits


class _Stop(Exception):
    """Ends a run where everything was seen."""


class Streams:
    """The two streams through the layers of a model."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        """tokens (B, T). Raises UserError where the layers are no chain that can run one by one."""
        self.model, self.tokens = model, tokens
        self.layers = find_layers(model)
        chain, few = Chain(self.layers), {"logits_to_keep": 1} if keeps_logits(model) else {}
        try:
            model(input_ids=tokens, use_cache=False, **few)
        finally:
            chain.remove()
        if not chain.holds:
            raise UserError(
                f"the layers of {type(model).__name__} are no simple chain, so none can be packed behind the others",
                "quantise this model with llama.cpp's `llama-quantize`",
            )
        self._chain, self._packed = chain, chain.start

    def stages(self, index: int) -> list[tuple[list[nn.Linear], Tensor]]:
        """The linears of a layer in the order in which they run, those of one input together, with that input (N, n) as it was."""
        found: list[tuple[list[nn.Linear], Tensor]] = []

        def see(module: nn.Linear, x: Tensor) -> None:
            if found and found[-1][1].data_ptr() == x.data_ptr() and found[-1][1].shape == x.shape:
                found[-1][0].append(module)
            else:
                found.append(([module], x))

        linears = [m for m in self.layers[index].modules() if isinstance(m, nn.Linear)]
        hooks = [m.register_forward_pre_hook(lambda m, a: see(m, a[0].detach())) for m in linears]  # pyright: ignore
        try:
            self._run(index, self._chain.inputs(index))
        finally:
            for hook in hooks:
                hook.remove()
        return [(modules, x.flatten(0, -2)) for modules, x in found]

    def packed_input(self, index: int, module: nn.Linear) -> Tensor:
        """The input (N, n) of a linear of a layer on the packed stream."""
        return _input(module, lambda: self._run(index, self._packed))

    def advance(self, index: int) -> None:
        """Go on behind a layer."""
        self._packed = self._run(index, self._packed)

    def head_inputs(self, head: nn.Module) -> tuple[Tensor, Tensor]:
        """The inputs (N, n) of the head: as they were, and behind the packed layers. After the last layer."""
        return tuple(_input(head, lambda h=h: self._behind(h)) for h in (self._chain.last, self._packed))  # pyright: ignore

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._chain.calls[index]
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        return first(self.layers[index](*args, **kwargs))

    def _behind(self, hidden: Tensor) -> None:
        """What the model does behind its layers, whose last one gives `hidden`."""
        handle = self.layers[-1].register_forward_hook(
            lambda m, a, output: (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        )
        try:
            self.model(input_ids=self.tokens, use_cache=False)
        finally:
            handle.remove()


def _input(module: nn.Module, run: Any) -> Tensor:
    seen: list[Tensor] = []

    def stop(_: nn.Module, given: Sequence[Any]) -> None:
        seen.append(given[0].detach().flatten(0, -2))
        raise _Stop

    hook = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Stop:
        pass
    finally:
        hook.remove()
    return seen[0]


def in_rows(total: int, inputs: int, most: int = 1 << 23) -> Iterator[slice]:
    """Rows of a weight in parts of so many values."""
    step = max(64, most // inputs)
    return (slice(start, min(total, start + step)) for start in range(0, total, step))
