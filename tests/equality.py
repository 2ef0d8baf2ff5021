"""What the tests of the equality share: padded batches, one masked pass, steps, and what rounding may change."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moyu import kernels
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.choosers import Recorder, Replayer
from moyu.measure.windows import Windows
from moyu.model import dissect, loading
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.weights import QUANTISED
from tiny import build, tokens

PROMPT, LENGTH = 8, 14
QUICK = {"lte": {"steps": 2, "block": 12}}  # less training than by default: these tests are not about what was learned
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = ("fp32", "bf16", *QUANTISED)


@functools.lru_cache(maxsize=8)
def anatomy_of(model):
    """Found once for a model whose modules stay as they are: its proof is half of the time that a tiny model takes."""
    return dissect.dissect(model)


def applied_to(model, plan, **kwargs):
    """A plan on a model, whose anatomy is known."""
    return Applied(model, plan, anatomy=anatomy_of(model), **kwargs)


def plan_for(model, method, sparsity=0.5, windows=None, **kwargs):
    windows = windows or Windows(tokens(6, 40), 20)
    return calibrate(model, method, windows, sparsity=sparsity, name="tiny", anatomy=anatomy_of(model), **kwargs)


def has_sites(model, method):
    return any(method.sites(b) for b in anatomy_of(model).places())


def previewed(model) -> int:
    """Bytes of the first bits and scales of a parted head, which a general step reads twice: to choose, and to multiply."""
    blocks = model.get_output_embeddings().blocks
    return blocks.shape[0] * (blocks.row_bytes - blocks.format.part_bytes(blocks.shape[1])[1])


def padded(batch: int) -> tuple[Tensor, Tensor]:
    """Left padding of a different length in every row."""
    ids = tokens(batch, LENGTH)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, :row] = 0
        ids[row, :row] = 0
    return ids, mask


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def one_pass(model, plan, ids, mask, *, recorder=None, chooser=None):
    with applied_to(model, plan, engine="mask") as applied, applied.prompt(PROMPT):
        with applied.watched(chooser=recorder or chooser):
            out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return out.logits


@torch.no_grad()
def stepwise(model, plan, ids, mask, *, backend="reference", recorder=None, chooser=None, chunks=1):
    logits = []
    with applied_to(model, plan, backend=backend) as applied, applied.prompt(PROMPT):
        with applied.watched(chooser=recorder or chooser):
            cache = None
            cuts = [round(i * PROMPT / chunks) for i in range(chunks + 1)] + list(range(PROMPT + 1, LENGTH + 1))
            for start, stop in itertools.pairwise(cuts):
                out = call(model, ids, mask, start, stop, cache)
                cache = out.past_key_values
                logits.append(out.logits)
    return torch.cat(logits, 1)


def call(model, ids, mask, start, stop, cache=None):
    """The model on columns `start` to `stop`, after those that the cache holds."""
    return model(
        ids[:, start:stop],
        attention_mask=mask[:, :stop],
        position_ids=positions(mask)[:, start:stop],
        past_key_values=cache,
        use_cache=True,
    )


def assert_same_masks(a: Recorder, b: Recorder):
    assert a.masks.keys() == b.masks.keys()
    assert a.masks
    for key, masks in a.masks.items():
        assert masks.keys() == b.masks[key].keys()
        assert all(torch.equal(mask, b.masks[key][index]) for index, mask in masks.items()), key


@contextmanager
def general_steps(applied: Applied) -> Iterator[None]:
    """No step is native: each layer has a hook, which only the general way calls."""
    handles = [layer.register_forward_hook(lambda *_: None) for layer in applied.anatomy.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------- weights of every kind


def built(structure: str, weights: str) -> nn.Module:
    """A tiny model whose weights are kept as `weights` says."""
    model = build(structure, DTYPES.get(weights, torch.float32))
    if weights in QUANTISED:
        loading.quantise_model(model, weights)
    return model


def exact(model: nn.Module) -> nn.Module:
    """A copy in float64 with the same weights, which are plain numbers."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLinear | QuantisedEmbedding):
                plain = nn.Linear(1, 1) if isinstance(child, QuantisedLinear) else nn.Embedding(1, 1)
                plain.weight = nn.Parameter(child.weight, requires_grad=False)
                plain.bias = child.bias
                setattr(parent, name, plain)
    return twin.double()


# -------------------------------------------------------------------------------------------------------- what rounding may

# A rounding to nearest errs by at most the unit roundoff u, by u / sqrt(3) in the mean square. Errors of K independent
# roundings add up in squares, so a result is off by sqrt(K) * u / sqrt(3), relative to its size, in the mean square.
UNIT = {"fp32": 2**-24, "bf16": 2**-8, "fp16": 2**-11}
# The modules of a layer round to 16 bits: two norms (twice each), q, rotation, probabilities, heads, o, sum; gate or up,
# activation, product, down, sum. The embedding is exact; the last norm (twice) and the head round.
OUTPUTS_PER_LAYER, OUTPUTS_AROUND = 15, 3
# Integer kernels round 32 values of x at a time to steps of 1/127 of the largest, which is about 3 times their root mean
# square (2 to 2.5 of normal numbers, more of what a gate or a mask has thinned out): 1 / sqrt(12) of a step each.
EIGHT_BITS = 3 / 127 / 12**0.5
PRODUCTS_PER_LAYER = 4  # one after the other: q, o, up, down; and the head


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def off(a: Tensor, b: Tensor) -> float:
    """The difference of a and b relative to b, root mean square."""
    return root_mean_square(a.double() - b.double()) / root_mean_square(b)


def rounding(model: nn.Module, weights: str, *, thinned: bool = False) -> float:
    """How far logits of `model` are off because of rounding alone, relative, root mean square.

    thinned: products of a part of the inputs round x to 8 bits too, whatever the weights are.
    """
    config = model.config
    layers, d, f = (
        config.num_hidden_layers,
        config.hidden_size,
        getattr(config, "intermediate_size", 4 * config.hidden_size),
    )
    sums = layers * (3 * d + f + OUTPUTS_PER_LAYER) + d  # every addition of a sum rounds to fp32
    square = sums * UNIT["fp32"] ** 2 / 3
    if weights in ("bf16", "fp16"):
        square += (layers * OUTPUTS_PER_LAYER + OUTPUTS_AROUND) * UNIT[weights] ** 2 / 3
    if weights in QUANTISED or thinned:
        square += (layers * PRODUCTS_PER_LAYER + 1) * EIGHT_BITS**2
    return square**0.5


def rounds_x(weights: str, name: str) -> bool:
    """Whether kernels round what they multiply to 8 bits."""
    return weights in QUANTISED or name == "estimate"


def assert_near(a: Tensor, b: Tensor, most: float, what: str) -> None:
    error = off(a, b)
    assert error <= most, f"{what} are {error:.2e} apart, and rounding explains {most:.2e}"


# ------------------------------------------------------------------------------------------------------- one step at a time


@dataclass(frozen=True)
class Steps:
    """Logits (steps, B, V) of steps that all three begin with the same cache and take the same levels."""

    native: Tensor
    general: Tensor
    exact: Tensor

    def check(self, model: nn.Module, weights: str, name: str) -> None:
        """Raises AssertionError where the native step errs by more than rounding explains.

        In 16 bits it is held against the modules' own error: it rounds where they do, or later, so it is not further from
        exact arithmetic. Where x is rounded to 8 bits, the two agree to the last bits of fp32 until a value on the edge of two
        integers goes the other way: with some 1000 values a step and differences of 1e-7 that is one step in ten.
        "The last bits": four times what fp32 explains, because sums are larger than their results where biases are.
        """
        explained = rounding(model, weights, thinned=rounds_x(weights, name))
        assert_near(self.general, self.exact, explained, "general steps and exact ones")
        assert_near(self.native, self.exact, explained, "native steps and exact ones")
        if weights in ("bf16", "fp16"):
            assert_near(self.native, self.exact, 1.25 * off(self.general, self.exact), "native steps and exact ones")
        elif rounds_x(weights, name):
            each = [off(n, g) for n, g in zip(self.native.flatten(0, 1), self.general.flatten(0, 1), strict=True)]
            most = 4 * rounding(model, "fp32")
            same = sum(error <= most for error in each)
            assert 2 * same > len(each), (
                f"only {same} of {len(each)} native steps are within {most:.2e} of general ones"
            )


@torch.no_grad()
def steps_from_one_cache(model, plan, ids, mask, recorder, *, native_recorder=None, twin=None) -> Steps:
    """Steps on `ids` after a dense prompt, every one from the cache that the general steps have left, under recorded levels.

    native_recorder: other levels for the native steps; twin: another model for the exact ones.
    """
    logits: dict[str, list[Tensor]] = {"native": [], "general": [], "exact": []}
    # What is skipped of bits, plain numbers do not have: such a twin keeps its weights, and masks, which rounds no x.
    bits = plan.method.quantised_only
    twin = twin or (copy.deepcopy(model).double() if bits else exact(model))
    with (
        applied_to(model, plan) as applied,
        applied_to(twin, plan, backend="reference", engine="mask" if bits else "skip", check=False) as applied_exact,
        applied.prompt(PROMPT),
        applied_exact.prompt(PROMPT),
    ):
        cache = call(model, ids, mask, 0, PROMPT).past_key_values
        for t in range(PROMPT, LENGTH):
            with applied.watched(chooser=Replayer(native_recorder or recorder)), kernels.count_bytes() as read:
                logits["native"].append(call(model, ids, mask, t, t + 1, copy.deepcopy(cache)).logits)
            assert "decode" in read.by_op and set(read.by_op) <= {"decode", "rows"}, "the step was not native"
            with applied_exact.watched(chooser=Replayer(recorder)):
                logits["exact"].append(call(twin, ids, mask, t, t + 1, _doubled(cache)).logits)
            with applied.watched(chooser=Replayer(recorder)), general_steps(applied), kernels.count_bytes() as counted:
                logits["general"].append(call(model, ids, mask, t, t + 1, cache).logits)
            assert "decode" not in counted.by_op, "the step was not general"
            same_levels = native_recorder is None
            twice = previewed(model) if any(site.skips == "words" for site in plan.sites()) else 0
            assert not same_levels or read.total == counted.total - twice, (
                "native and general steps read different bytes"
            )
    return Steps(**{name: torch.stack([one[:, 0] for one in own]) for name, own in logits.items()})


def _doubled(cache):
    """A copy of a cache with its memory, keys and values in float64."""
    twin = copy.deepcopy(cache)
    for layer in twin.layers:
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
    return twin
