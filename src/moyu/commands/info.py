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
    from moyu.engine.applied import Applied
    from moyu.measure import accounting
    from moyu.model import dissect, loading
    from moyu.model.gguf import loading as gguf
    from moyu.model.gguf.reader import DTYPES, read
    from moyu.model.quantised import weight_format
    from moyu.plan import Plan

    path = loading.gguf_file(name)
    file = None if path is None else read(path)
    loaded = loading.load(name) if file is None else None
    model = gguf.load_model(file) if loaded is None else loaded.model  # pyright: ignore[reportArgumentType]; takes no tokenizer
    own = None if loaded is None else loaded.plan
    anatomy = dissect.dissect(model)
    blocks = list(anatomy.all_blocks())
    networks = [b for b in blocks if b.has_ffn]
    first = networks[0]
    floors: dict[str, float | None] = {}
    for each in methods.names():
        method = methods.method(each)
        able = any(method.sites(b) for b in anatomy.places())
        floors[each] = accounting.floor(model, anatomy, method) if able else None
    with Applied(model, None, anatomy=anatomy) as session:
        general = None if session.native is not None else session.general_because
    stacked = 0 if file is None else sum(len(e.shape) > 2 and e.kind not in DTYPES for e in file.tensors.values())
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "model": name,
        "type": type(model).__name__,
        "parameters": accounting.count_weights(model),
        "weights": file.formats() if file is not None else weight_format(model) or dtype,
        "computes in": dtype,
        **(
            {"experts": f"{stacked} stacked tensors became {dtype}: no module holds them in blocks yet"}
            if stacked
            else {}
        ),
        "layers": len(anatomy.layers),
        "feed-forward": f"{'gated' if first.gated else 'plain'}, {first.act or 'by its own module'}, {first.neurons} neurons, "
        f"proved in {len(networks)} blocks",
        "attention": anatomy.attention(),
        "left dense": anatomy.gaps or "nothing",
        "plan": "none of its own" if own is None else _plan(Plan.load(own)),
        "kernels": f"none for {kinds}: units are masked" if (kinds := anatomy.foreign) else what_runs("auto"),
        "decode step": "native" if general is None else f"general: {general}",
        "bytes a token": round(accounting.dense_step_bytes(model, anatomy)),
        "floors": floors,
    }


def _plan(plan: Any) -> str:
    """A checkpoint's own plan in a few words."""
    return f"{plan.method.name} ({plan.hash}), which `generate`, `eval` and `bench` take where they are given no other"
