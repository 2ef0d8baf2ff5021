"""`moyu info`: what MOYU finds in a model."""

from __future__ import annotations

import json
from typing import Any

from moyu.commands.options import Json, Model


def info(model: Model = "swiglu", as_json: Json = False) -> None:
    """Show what MOYU finds in a model, and the least that each method could read of it."""
    facts = describe(model)
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if name != "floors":
            lines = value if isinstance(value, list) else [value]
            print("\n".join(f"{'' if n else name:16s} {line}" for n, line in enumerate(lines)))
    print("least byte fraction a method can reach:")
    for name, value in facts["floors"].items():
        print(f"  {name:14s} {'nothing to skip' if value is None else f'{value:.2f}'}")


def describe(name: str) -> dict[str, Any]:
    """The facts by their heading; under "floors" the least byte fraction of each method, None where it has nothing to skip."""
    from moyu import methods
    from moyu.calibration.speed import what_runs
    from moyu.measure import accounting
    from moyu.model import dissect, loading
    from moyu.plan import Plan

    loaded = loading.load(name)
    anatomy = dissect.dissect(loaded.model)
    blocks = list(anatomy.all_blocks())
    networks = [b for b in blocks if b.has_ffn]
    first = networks[0]
    floors: dict[str, float | None] = {}
    for each in methods.names():
        method = methods.method(each)
        able = any(method.sites(b) for b in blocks)
        floors[each] = accounting.floor(loaded.model, anatomy, method) if able else None
    return {
        "model": name,
        "type": type(loaded.model).__name__,
        "parameters": accounting.count_weights(loaded.model),
        "layers": len(anatomy.layers),
        "feed-forward": f"{'gated' if first.gated else 'plain'}, {first.act or 'by its own module'}, {first.neurons} neurons, "
        f"proved in {len(networks)} blocks",
        "attention": anatomy.attention(),
        "left dense": anatomy.gaps or "nothing",
        "plan": "none of its own" if loaded.plan is None else _plan(Plan.load(loaded.plan)),
        "kernels": f"none for {kinds}: units are masked" if (kinds := anatomy.foreign) else what_runs("auto"),
        "bytes a token": round(accounting.dense_step_bytes(loaded.model, anatomy)),
        "floors": floors,
    }


def _plan(plan: Any) -> str:
    """A checkpoint's own plan in a few words."""
    return f"{plan.method.name} ({plan.hash}), which `generate`, `eval` and `bench` take where they are given no other"
