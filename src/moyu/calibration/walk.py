"""From text to a plan: layers in order, each fitted on the inputs that it will get.

Two streams of hidden states go through each layer: the dense model's, and one behind layers that are already sparse. Only
the current layer's activations are held in memory.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Collection, Mapping

import torch
from torch import nn

from moyu import methods
from moyu.calibration import head, in_loop
from moyu.calibration.layers import Asked, LayerFit
from moyu.calibration.streams import Chain, Progress, Walk
from moyu.engine.applied import Applied
from moyu.engine.choosers import HeadUse
from moyu.errors import OutOfReach, UserError
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.methods.trained import is_joint
from moyu.methods.values import Site, SiteParams
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.model.quantised import weight_format
from moyu.plan import Plan, digests, fingerprint


def calibrate(
    model: nn.Module,
    method: Method | str,
    windows: Windows,
    *,
    sparsity: float,
    name: str = "",
    revision: str | None = None,
    bias: bool = False,
    centre: bool = False,
    levels: Mapping[str, float] | None = None,
    settings: Mapping[str, Method] | None = None,
    seed: int = 0,
    anatomy: Anatomy | None = None,
    layers: Collection[int] | None = None,
    chains: dict[str, Chain] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Fit `method` to `model` for a target sparsity in [0, 1): the fraction of units skipped at every site.

    method: or its name, with its knobs as they are by default.
    bias: add the closed-form correction W E[v - S(v)] at every site (off by default).
    centre: let masks of columns act on v - c, with the c of `compensation.centred` (off by default).
    levels: the sparsity of each site by its key, instead of one for all (`moyu.calibration.allocation`).
    settings: the method with other knobs, by the key of the site that uses them.
    layers: the layers to fit (default: all); others stay dense, and a `joint` method is not trained through the loss.
    chains: the dense runs of this model that several calibrations share, by the windows' digest; filled here.
    Raises UserError if the model has no site for this method, or none for what was asked.
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity must be in [0, 1), not {sparsity}", "0.5 skips half of the units")
    method = methods.method(method) if isinstance(method, str) else method
    anatomy = anatomy or dissect.dissect(model)
    if any(b.spread for b in anatomy.all_blocks()):
        raise UserError(
            "weights are spread over processes (DTensor), but calibration needs whole weights",
            "calibrate on one process and apply the plan here",
        )
    blocks = [[b for b in anatomy.all_blocks() if b.layer == i] for i in range(len(anatomy.layers))]
    if not any(method.sites(b) for b in anatomy.places()):
        acts = {b.act for layer in blocks for b in layer if b.act}
        gated = any(b.gated for layer in blocks for b in layer)
        raise UserError(
            f"method {method.name!r} has nothing to skip in {type(model).__name__} "
            f"({'gated' if gated else 'plain'} network, {'/'.join(sorted(acts))})",
            "it reads some bits of quantised weights: give a GGUF file of 3 to 8 bits, or --weights q8_0"
            if method.quantised_only
            else "`moyu methods` says what each method needs",
        )
    if centre and not any(
        s.skips == "columns" and not s.further for layer in blocks for b in layer for s in method.sites(b)
    ):
        raise UserError(
            f"method {method.name!r} skips no whole columns here, so nothing can be centred", "leave centring out"
        )
    parts: dict[str, tuple[Site, SiteParams]] = {}
    own = {key: other for key, other in (settings or {}).items() if other != method}
    draft = Plan(method, parts, {"name": name, "revision": revision}, settings=own)
    with torch.no_grad(), Applied(model, draft, engine="mask", anatomy=anatomy, check=False) as applied:
        ahead = [s for layer in blocks for b in layer for s in method.sites(b) if s.source_layer != s.layer]
        applied.lookahead |= {(s.source_layer, s.reads) for s in ahead}
        if progress:
            progress(0, len(blocks))
        walk, asked = Walk(applied, windows, chains), Asked(sparsity, bias, centre, levels or {})
        for index, layer_blocks in enumerate(blocks):
            if layers is not None and index > max(layers, default=-1):
                break
            here = layer_blocks if layers is None or index in layers else []
            parts |= LayerFit(walk, index, here, draft, asked).run()
            if progress:
                progress(index + 1, len(blocks))
        if layers is None:
            parts |= head.fit(applied, draft, windows, lambda site: asked.levels.get(site.key, sparsity))
    if is_joint(method) and sparsity > 0 and layers is None:
        draft = in_loop.train(model, draft, windows, sparsity, steps=method.steps, anatomy=anatomy, progress=progress)
    return dataclasses.replace(
        draft,
        parts=dict(draft.parts),
        settings={key: other for key, other in own.items() if key in draft.parts},
        model={
            "name": name,
            "revision": revision,
            "fingerprint": fingerprint(model),
            "digests": digests(anatomy, (s for s, _ in parts.values())),
        }
        | ({} if weight_format(model) is None else {"weight_format": weight_format(model)}),
        target_sparsity=sparsity if method.solves_target else None,
        calibration={
            "source": dict(windows.source),
            "windows": list(windows.tokens.shape),
            "prompt": windows.prompt,
            "bias": bias,
            "centre": centre,
        }
        | ({"dense_layers": list(anatomy.dense_layers)} if anatomy.dense_layers else {})
        | ({} if draft.kv_policy == "full" else {"kv_bytes": _kv_bytes(model, draft, windows, anatomy)}),
        seed=seed,
        versions={p: importlib.metadata.version(p) for p in ("torch", "transformers")}
        | {"python": platform.python_version()},
    )


def _kv_bytes(model: nn.Module, plan: Plan, windows: Windows, anatomy: Anatomy) -> list[dict[str, int]]:
    """Bytes of the cache that a step reads under the plan's KV policy, with heads kept as often as on the calibration text."""
    use = HeadUse()
    with torch.no_grad(), Applied(model, plan, engine="mask", anatomy=anatomy, check=False) as applied:
        with applied.prompt(windows.prompt), applied.watched(chooser=use):
            model(input_ids=windows.tokens.to(next(model.parameters()).device), use_cache=False)
    return accounting.kv_bytes(model, plan.kv_policy, use.shares)


def solve_bytes(skippable: float, total: float, added: float, byte_fraction: float) -> float:
    """The sparsity at which a decode step reads `byte_fraction` of `total` bytes. Raises OutOfReach below the floor.

    skippable: bytes of all units of all sites. added: bytes of the plan itself.
    """
    over = total + added - byte_fraction * total
    if over >= skippable:
        raise OutOfReach(byte_fraction, (total + added - skippable) / total)
    return max(0.0, over / skippable)
