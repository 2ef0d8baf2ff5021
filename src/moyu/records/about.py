"""What records say about their model and their plan: typed fields for the constructors of `moyu.records`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from torch import nn

from moyu.measure.environment import device_name
from moyu.methods.base import Method
from moyu.model.anatomy import Anatomy
from moyu.model.quantised import weight_format
from moyu.plan import Plan
from moyu.records import KvBytes
from moyu.records.stamping import Stamp, stamped


class AboutModel(Stamp):
    """The fields of `records.ModelRecord` that do not depend on what was measured."""

    model: str
    weights: Literal["trained", "random"]
    weight_format: str | None


class AboutMethod(TypedDict):
    """The fields of `records.MethodRecord` that name the method and its plan."""

    method: str
    family: str | None
    granularity: str | None
    plan: str | None
    target_sparsity: float | None
    kv_policy: str | None
    kv_bytes: list[KvBytes]


def about_model(
    name: str,
    model: nn.Module,
    anatomy: Anatomy,
    *,
    weights: Literal["trained", "random"] = "trained",
    seed: int | None = None,
    plan: Plan | None = None,
    notes: Sequence[str] = (),
) -> AboutModel:
    """Fields of a record about a model. Its notes name what is dense under `plan`, then come the notes that are given."""
    first = next(model.parameters())
    dtype = getattr(model, "dtype", first.dtype)
    return {
        **stamped(
            device=device_name(first.device),
            dtype=str(dtype).removeprefix("torch."),
            seed=seed,
            notes=[*_left_dense(anatomy, plan), *notes],
        ),
        "model": name,
        "weights": weights,
        "weight_format": weight_format(model),
    }


def about_plan(plan: Plan | None, cache: Sequence[Mapping[str, int]] = ()) -> AboutMethod:
    """Fields of a record about a plan, None: dense. `cache`: bytes of the full KV cache, for a plan that keeps it whole."""
    if plan is None:
        return {**_nothing("dense"), "kv_bytes": [KvBytes(**size) for size in cache]}
    sizes = cache if plan.kv_policy == "full" else plan.calibration["kv_bytes"]
    return {
        **about_method(plan.method),
        "plan": plan.hash,
        "target_sparsity": plan.target_sparsity,
        "kv_policy": plan.kv_policy,
        "kv_bytes": [KvBytes(**size) for size in sizes],
    }


def about_method(method: Method) -> AboutMethod:
    """Fields of a record about a method that has no plan here."""
    return {**_nothing(method.name), "family": method.family, "granularity": method.granularity}


def _nothing(name: str) -> AboutMethod:
    return {
        "method": name,
        "family": None,
        "granularity": None,
        "plan": None,
        "target_sparsity": None,
        "kv_policy": "full",
        "kv_bytes": [],
    }


def _left_dense(anatomy: Anatomy, plan: Plan | None) -> list[str]:
    """Notes on the parts of a model that are dense under a plan."""
    asked = () if plan is None else plan.calibration.get("dense_layers", ())
    gaps = [*anatomy.gaps, *(f"layer {n}: left dense as asked" for n in asked if n not in anatomy.dense_layers)]
    notes = [f"left dense: {gap}" for gap in gaps]
    if kinds := anatomy.foreign:
        notes.append(f"weights are {kinds}: units are masked, and no kernel saves their bytes")
    return notes
