"""A type for each matrix: more bits where the model's distribution depends on them most.

To second order, an error e at the outputs of a linear costs KL = sum_o F_o e_o^2 / 2, with F_o = E[g_o^2] and g the gradient of log p of
tokens drawn from the model itself (`calibration.fisher` has the same at layers). Each matrix is rounded to each type on some of its
rows, with feedback, and E[e_o^2] on the text is scaled up to all. Types are then given by cost per byte, from the smallest on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moyu.errors import UserError
from moyu.measure.windows import Windows
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import File
from moyu.model.gguf.writing import nbytes
from moyu.packing import feedback
from moyu.packing.grid import Grid
from moyu.packing.packer import HEAD, TYPES, Stage, kind_of, kinds, linears_of, steadied, weight_bytes
from moyu.packing.streams import Streams
from moyu.weights import FORMATS
from moyu.weights.grouped import Grouped

ROWS = 64  # of each matrix, that are tried in every type
WINDOWS = 16  # of the text, for gradients and for trials


def choose(file: File, windows: Windows, bits: float, *, seed: int = 0, stage: Stage | None = None) -> dict[str, str]:
    """Types of all matrices that together take at most `bits` a weight. Raises UserError where not even the smallest do."""
    model: Any = load_model(file, torch.float32)
    tokens = windows.tokens[:WINDOWS]
    named = {id(module): name for name, module in linears_of(file, model).items()}
    costs = _costs(file, model, tokens, named, _sensitivity(model, tokens, named, seed), stage)
    return cheapest(file, costs, bits)


def cheapest(file: File, costs: Mapping[str, Mapping[str, float]], bits: float) -> dict[str, str]:
    """The types with the least total cost at `bits` a weight; matrices without costs go with the head's type."""
    sizes = {
        name: {kind: nbytes(file.tensors[name].shape, kind.upper()) for kind in own} for name, own in costs.items()
    }
    chosen = {name: min(own, key=own.__getitem__) for name, own in sizes.items()}
    rest = [name for name in kinds(file, "q8_0") if name not in costs]

    def whole() -> dict[str, str]:
        others = {name: kinds(file, chosen.get(HEAD, "q8_0"))[name] for name in rest}
        return chosen | others

    total, weights = weight_bytes(file, whole())
    room = bits * weights / 8 - total
    if room < 0:
        raise UserError(
            f"{bits} bits a weight are out of reach: the smallest types take {8 * total / weights:.2f}",
            "ask for more bits: rows whose width 256 does not divide have no type below 4.5",
        )
    while True:
        best, step = 0.0, None
        for name, now in chosen.items():
            for kind, cost in costs[name].items():
                more, gain = sizes[name][kind] - sizes[name][now], costs[name][now] - cost
                if gain > 0 and more <= room and (slope := gain / max(more, 1e-9)) > best:
                    best, step = slope, (name, kind, more)
        if step is None:
            return whole()
        name, kind, more = step
        chosen[name] = kind
        room -= more


def _sensitivity(model: Any, tokens: Tensor, named: Mapping[int, str], seed: int) -> dict[str, Tensor]:
    """F_o = E[g_o^2] of each linear, (q,) by the name of its matrix."""
    generator, found, outputs = torch.Generator().manual_seed(seed), dict[str, Tensor](), dict[str, Tensor]()

    def keep(name: str, output: Tensor) -> None:
        outputs[name] = output

    modules = [m for m in model.modules() if id(m) in named]
    hooks = [m.register_forward_hook(lambda m, a, o: keep(named[id(m)], o)) for m in modules]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda m, a, o: o.detach().requires_grad_()))
    try:
        for window in tokens.split(1):
            outputs.clear()
            with torch.enable_grad():
                logits = model(input_ids=window, use_cache=False).logits[0].float()
                log_probs = logits.log_softmax(-1)
                drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
                names = list(outputs)
                total = log_probs.gather(1, drawn).sum()
                gradients = torch.autograd.grad(total, [outputs[n] for n in names], allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    squares = gradient.float().square().flatten(0, -2).mean(0) / len(tokens)
                    found[name] = found[name] + squares if name in found else squares
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _costs(
    file: File, model: Any, tokens: Tensor, named: Mapping[int, str], fisher: Mapping[str, Tensor], stage: Stage | None
) -> dict[str, dict[str, float]]:
    """The cost of each matrix in each type, nats a token."""
    streams, found = Streams(model, tokens), dict[str, dict[str, float]]()

    def measure(module: nn.Linear, x: Tensor) -> None:
        name = named.get(id(module))
        if name is not None and name in fisher and not module.in_features % 32:
            found[name] = _of_types(module.weight, x, fisher[name])

    before = torch.get_num_threads()
    for index in range(len(streams.layers)):
        if stage is not None:
            stage("choose types", index, len(streams.layers))
        for modules, x in streams.stages(index):
            torch.set_num_threads(1)
            try:
                for module in modules:
                    measure(module, x)
            finally:
                torch.set_num_threads(before)
        streams.advance(index)
    head = model.get_output_embeddings()
    measure(head, streams.head_inputs(head)[0])
    if stage is not None:
        stage("choose types", len(streams.layers), len(streams.layers))
    return found


def _of_types(weight: Tensor, x: Tensor, fisher: Tensor) -> dict[str, float]:
    second = steadied(x.t() @ x / len(x))
    upper = feedback.factor(second)
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long()
    some, share = weight[rows].float().t().contiguous(), fisher[rows]
    found = {}
    for kind in TYPES:
        if kind_of(kind, weight.shape[1]) != kind:
            continue
        form = FORMATS[kind]
        assert isinstance(form, Grouped)
        change = some - feedback.place(some, Grid(form), upper).values()
        errors = (change * (second @ change)).sum(0)  # E[e_o^2]
        # the rows' mean error for their weight, times the sensitivity of all rows
        found[kind] = float(errors.mean() * fisher.sum() + ((errors - errors.mean()) * share).mean() * len(weight)) / 2
    return found
