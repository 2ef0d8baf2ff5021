"""The checks of one model type: sparsity 0 changes nothing, skipping equals masking, and skipping reads fewer bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moyu import kernels, methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.choosers import Recorder, Replayer
from moyu.errors import UserError
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan
from moyu.research.coverage.shrinking import VOCABULARY, build

# One method per kernel shape: input channels, rows after the gate, whole neurons.
SHAPES = {"columns": "teal", "rows": "cats", "neurons": "random"}
SPARSITY = 0.5
ROWS = 6  # few enough for the skipping kernels
TOLERANCE = 1e-4  # of float32 logits, relative to the largest
# Names of feed-forward parameters in all models: a second opinion that does not depend on dissecting.
FFN_NAMES = re.compile(
    r"mlp|ffn|feed_?forward|expert|moe|intermediate|(^|\.)(fc|lin|layer_)[12]$|(^|\.)ff\.|(^|\.)output\.dense$"
)
NOT_FFN = re.compile(
    r"attn|attention|norm|(^|[._])gate(\.|$)|router|conv|_hc\.|hyper_connection|time_mix|receptance|classifier|predictor"
    r"|mixer\.(in|out)_proj"
)


class Failed(Exception):
    """A check failed."""


def examine(model_type: str) -> dict[str, Any]:
    """Build a tiny model of a type, dissect it and check every kernel shape. Returns the record's fields."""
    try:
        model = build(model_type)
        ids = tokens(1, ROWS)
        with torch.no_grad():
            dense = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return {"architecture": model_type, "status": "does not build", "taken": False, "reason": reason}
    found: dict[str, Any] = {"architecture": model_type, "class_name": type(model).__name__, "taken": False}
    try:
        anatomy = dissect.dissect(model)
    except UserError as error:
        left = leftovers(model, None)
        if not left:
            return found | {"status": "no network", "reason": "none of its parameters is a feed-forward network's"}
        reasons = error.problem.partition("can prove (")[2].removesuffix(")").split("; ")
        reason = _joined(reasons)
        return found | {"status": "dense", "reason": reason or first_line(error), "left": left}
    found["networks"], found["attention"] = summary(anatomy), anatomy.attention()
    found["left"] = leftovers(model, anatomy)
    found["gaps"] = anatomy.gaps
    try:
        found["checks"] = check(model, anatomy, ids, dense)
    except (Failed, UserError) as error:
        return found | {"status": "fails", "reason": first_line(error)}
    if found["left"]:
        return found | {
            "status": "partly",
            "reason": f"left dense: {', '.join(found['left'])} ({_joined(anatomy.gaps)})",
        }
    return found | {"status": "taken", "taken": True, "reason": f"proved: {found['networks']}"}


def _joined(gaps: list[str]) -> str:
    """The reasons for dense networks, each once, without layer numbers."""
    reasons = (re.sub(r"^(.* )?layer \d+: ", "", gap) for gap in gaps)
    return "; ".join(dict.fromkeys(r for r in reasons if not r.startswith("attention or mixer")))


@torch.no_grad()
def check(model: Any, anatomy: Anatomy, ids: Tensor, dense: Tensor) -> list[str]:
    """Check every kernel shape that has a site in the model. Raises Failed at the first failure."""
    done = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for shape, name in SHAPES.items():
        method = methods.method(name)
        if any(method.sites(b) for b in anatomy.all_blocks()):
            _check_shape(model, anatomy, method, shape, ids, dense)
            done.append(shape)
    done.append(_check_generation(model, anatomy))
    after = model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[k], after[k]) for k in before):
        raise Failed("restore: the weights are not what they were")
    if not torch.equal(model(input_ids=ids, use_cache=False).logits, dense):
        raise Failed("restore: the logits are not what they were")
    return done


def _check_shape(model: Any, anatomy: Anatomy, method: Method, shape: str, ids: Tensor, dense: Tensor) -> None:
    windows = Windows(tokens(4, 24), 4)
    full = calibrate(model, method, windows, sparsity=0.0, anatomy=anatomy)
    half = calibrate(model, method, windows, sparsity=SPARSITY, anatomy=anatomy)
    error = difference(dense, run(model, full, anatomy, ids, "skip"))
    if error > TOLERANCE:
        raise Failed(f"{shape}: at sparsity 0 the logits differ by {error:.1e}")
    recorder = Recorder()
    masked = run(model, half, anatomy, ids, "mask", recorder)
    if not recorder.masks:
        raise Failed(f"{shape}: no site decided anything")
    kept = torch.cat([m.float().flatten() for masks in recorder.masks.values() for m in masks.values()]).mean()
    if not kept < 0.9:
        raise Failed(f"{shape}: {kept:.0%} of the units were kept at 50 %")
    error = difference(masked, run(model, half, anatomy, ids, "skip"))
    if error > TOLERANCE:  # decisions near a threshold may differ by rounding; with the same masks nothing may
        error = difference(masked, run(model, half, anatomy, ids, "skip", Replayer(recorder)))
    if error > TOLERANCE:
        raise Failed(f"{shape}: at 50 % skipping and masking differ by {error:.1e}")
    one = ids[:, :1]
    most, fewer = (counted(model, plan, anatomy, one) for plan in (full, half))
    if not 0 < fewer < most:
        raise Failed(f"{shape}: at 50 % the kernels read {fewer} bytes, at 0 % {most}")


def _check_generation(model: Any, anatomy: Anatomy) -> str:
    """Generate: the same tokens as dense at sparsity 0, and some tokens at 50 %. Reports if the dense model cannot generate."""
    prompt = tokens(1, 4)
    wanted = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    try:
        expected = model.generate(prompt, **wanted)
    except Exception as error:
        return f"no generate: the dense model cannot ({first_line(error)})"
    method, windows = methods.method(SHAPES["neurons"]), Windows(tokens(4, 24), 4)
    for sparsity in (0.0, SPARSITY):
        plan = calibrate(model, method, windows, sparsity=sparsity, anatomy=anatomy)
        with Applied(model, plan, anatomy=anatomy, check=False):
            out = model.generate(prompt, **wanted)
        if sparsity == 0.0 and not torch.equal(out, expected):
            raise Failed("generate: other tokens at sparsity 0")
        if out.shape[1] <= prompt.shape[1]:
            raise Failed("generate: no new token")
    return "generate"


def run(
    model: Any, plan: Plan, anatomy: Anatomy, ids: Tensor, engine: Literal["skip", "mask"], chooser: Any = None
) -> Tensor:
    """Logits of one call in which every position is sparse."""
    with Applied(model, plan, engine=engine, anatomy=anatomy, check=False) as applied, applied.prompt(0):
        with applied.watched(chooser=chooser):
            return model(input_ids=ids, use_cache=False).logits


def counted(model: Any, plan: Plan, anatomy: Anatomy, ids: Tensor) -> int:
    """Bytes that the kernels read in one sparse call."""
    with kernels.count_bytes() as counter:
        run(model, plan, anatomy, ids, "skip")
    return counter.total


def leftovers(model: nn.Module, anatomy: Anatomy | None) -> list[str]:
    """Parameters inside the layers that belong to a feed-forward network by their names, but were not found by dissecting."""
    layers = dissect.find_layers(model) if anatomy is None else anatomy.layers
    blocks = [] if anatomy is None else list(anatomy.all_blocks())
    taken = {id(getattr(p.module, p.parameter)) for b in blocks for p in b.pieces.values()}
    left = []
    for path, parameter in layers.named_parameters():
        parent, _, leaf = path.partition(".")[2].rpartition(".")
        place = parent if leaf in ("weight", "bias") else f"{parent}.{leaf}"
        is_network = FFN_NAMES.search(place) and not NOT_FFN.search(place) and parameter.dim() > 1
        if is_network and id(parameter) not in taken and "bias" not in leaf:
            left.append(place)
    return list(dict.fromkeys(left))


def summary(anatomy: Anatomy) -> str:
    """The kinds of proved networks, with their counts."""
    kinds: dict[str, int] = {}
    for block in anatomy.all_blocks():
        if block.has_ffn:
            kind = f"{'routed ' if (block.expert or 0) > 0 or block.expert == 0 else ''}"
            kind += f"{'gated' if block.gated else 'plain'} {block.act or 'by its own module'}"
            kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())


def tokens(*shape: int) -> Tensor:
    """Random ids without special tokens."""
    return torch.randint(3, VOCABULARY - 1, shape, generator=torch.Generator().manual_seed(1))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    lines: Iterator[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]
