"""From text to a plan: layers in order, each fitted on the inputs that it will get.

Two streams of hidden states go through each layer: the dense model's, and one behind layers that are already sparse. Only
the current layer's activations are held in memory.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moyu import methods
from moyu.calibration import compensation, in_loop
from moyu.engine.applied import Applied
from moyu.engine.choosers import HeadUse
from moyu.engine.memory import SequenceMemory
from moyu.engine.products import Products
from moyu.engine.rows import rows_of
from moyu.engine.sites import SiteState
from moyu.errors import OutOfReach, UserError
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.methods.trained import is_joint
from moyu.methods.values import TAPS, Acts, Rows, Site, SiteParams, Tap
from moyu.model import dissect
from moyu.model.anatomy import Anatomy, Block
from moyu.model.finite import require_finite
from moyu.model.quantised import weight_format
from moyu.plan import Plan, digests, fingerprint
from moyu.weights import Stored

Progress = Callable[[int, int], None]  # (layers done, layers)


class _Taps:
    """An observer that keeps all taps and decisions of one layer, and the taps that later layers read."""

    def __init__(self, layer: int, ahead: dict[tuple[int, Tap], Tensor], wanted: set[tuple[int, Tap]]) -> None:
        self.layer, self.ahead, self.wanted = layer, ahead, wanted
        self.taps: dict[tuple[int | None, Tap], Tensor] = {}
        self.rows: dict[tuple[int | None, Tap], Rows] = {}
        self.skipped: dict[str, Tensor] = {}

    def see(self, layer: int, expert: int | None, tap: Tap, x: Tensor, rows: Rows) -> None:
        if (layer, tap) in self.wanted:
            self.ahead[layer, tap] = x.detach()
        if layer != self.layer:
            return
        self.taps[expert, tap] = x.detach()
        self.rows[expert, tap] = rows

    def mask(self, site: Site, values: Tensor, mask: Tensor, rows: Rows) -> None:
        if site.layer != self.layer:
            return
        missing = torch.where(mask, 0, values.float())[rows.sparse]
        self.skipped[site.key] = missing.mean(0)

    def acts(self, expert: int | None) -> tuple[dict[Tap, Tensor], Rows | None]:
        taps: dict[Tap, Tensor] = {t: x for (e, t), x in self.taps.items() if e is None}
        taps |= {t: x for (e, t), x in self.taps.items() if e == expert}
        rows = next((r for (e, t), r in self.rows.items() if e == expert), None)
        if rows is None and not any(e is not None for e, _ in self.rows):
            rows = next(iter(self.rows.values()), None)
        return taps, rows


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
    progress: Progress | None = None,
) -> Plan:
    """Fit `method` to `model` for a target sparsity in [0, 1): the fraction of units skipped at every site.

    method: or its name, with its knobs as they are by default.
    bias: add the closed-form correction W E[v - S(v)] at every site (off by default).
    centre: let masks of columns act on v - c, with the c of `compensation.centred` (off by default).
    levels: the sparsity of each site by its key, instead of one for all (`moyu.calibration.allocation`).
    settings: the method with other knobs, by the key of the site that uses them.
    layers: the layers to fit (default: all); others stay dense, and a `joint` method is not trained through the loss.
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
    if not any(method.sites(b) for layer in blocks for b in layer):
        acts = {b.act for layer in blocks for b in layer if b.act}
        gated = any(b.gated for layer in blocks for b in layer)
        raise UserError(
            f"method {method.name!r} has nothing to skip in {type(model).__name__} "
            f"({'gated' if gated else 'plain'} network, {'/'.join(sorted(acts))})",
            "it reads some bits of quantised weights: give a GGUF file of 3 to 8 bits, or --weights q8_0"
            if method.quantised_only
            else "`moyu methods` says what each method needs",
        )
    if centre and not any(s.skips == "columns" for layer in blocks for b in layer for s in method.sites(b)):
        raise UserError(
            f"method {method.name!r} skips no columns here, so nothing can be centred", "leave centring out"
        )
    parts: dict[str, tuple[Site, SiteParams]] = {}
    own = {key: other for key, other in (settings or {}).items() if other != method}
    draft = Plan(method, parts, {"name": name, "revision": revision}, settings=own)
    with torch.no_grad(), Applied(model, draft, engine="mask", anatomy=anatomy, check=False) as applied:
        ahead = [s for layer in blocks for b in layer for s in method.sites(b) if s.source_layer != s.layer]
        applied.lookahead |= {(s.source_layer, s.reads) for s in ahead}
        walk = Walk(applied, windows)
        for index, layer_blocks in enumerate(blocks):
            here = layer_blocks if layers is None or index in layers else []
            _fit_layer(walk, index, here, draft, parts, sparsity, bias, centre, levels or {})
            if progress:
                progress(index + 1, len(blocks))
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


def _fit_layer(
    walk: Walk,
    index: int,
    blocks: list[Block],
    draft: Plan,
    parts: dict[str, tuple[Site, SiteParams]],  # of the draft; filled here
    sparsity: float,
    bias: bool,
    centre: bool,
    levels: Mapping[str, float],
) -> None:
    sites = [(block, site) for block in blocks for site in draft.method.sites(block)]
    dense = walk.observe(index, walk.dense)  # also stores the taps that later layers read
    taps_used = sorted({s.reads for _, s in sites}, key=TAPS.index)
    stages = [("attn_in",), ("q_latent", "kv_latent"), ("heads",), ("mlp_in", "gate", "up"), ("mid",)]
    for stage in stages:
        fresh = [(b, s) for b, s in sites if s.reads in stage]
        if not fresh or not set(stage) & set(taps_used):
            continue
        seen = walk.observe(index, walk.sparse)  # earlier stages of this layer are already sparse
        for block, site in fresh:
            ahead = None
            if site.source_layer != site.layer:
                source = (site.source_layer, site.reads)
                ahead = walk.dense_taps[source], walk.sparse_taps[source]
            target = levels.get(site.key, sparsity)
            acts = acts_of(tensors_of(block), site, seen, dense, ahead)
            if acts is None:
                continue
            own = draft.method_of(site)
            centred = centre and site.skips == "columns" and target > 0
            fitted = compensation.centred(own, site, acts, target, bias) if centred else own.fit(site, acts, target)
            parts[site.key] = (site, fitted)
        walk.attach(index, draft)
        if bias and sparsity > 0:
            seen = walk.observe(index, walk.sparse)
            for block, site in fresh:
                if site.key in seen.skipped and parts[site.key][1].bias is None:
                    params = parts[site.key][1]
                    correction = compensation.correction(block, site, params, seen.skipped[site.key])
                    parts[site.key] = (site, dataclasses.replace(params, bias=correction))
            walk.attach(index, draft)
    walk.advance(index)


Tensors = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Stored]]


def tensors_of(block: Block) -> Tensors:
    """Weights and biases of a block's linears, by name; of quantised ones copies, and the weights as they are stored."""
    weights = {n: p.weight.detach() for n, p in block.pieces.items()}
    biases = {n: p.bias.detach() for n, p in block.pieces.items() if p.bias is not None}
    return weights, biases, {n: p.blocks for n, p in block.pieces.items() if p.blocks is not None}


def acts_of(
    tensors: Tensors, site: Site, seen: _Taps, dense: _Taps, ahead: tuple[Tensor, Tensor] | None = None
) -> Acts | None:
    """A site's activations from both streams, with its block's tensors; ahead: its taps, if it reads another layer's.

    None for an expert to which no token of the text is routed. It stays dense.
    """
    sparse_taps, rows = seen.acts(site.expert)
    dense_taps, dense_rows = dense.acts(site.expert)
    if rows is None or not bool((rows.sparse & rows.valid).any()):
        return None
    if dense_rows is None or len(dense_rows.seq) != len(rows.seq):
        dense_taps = sparse_taps  # routing differs between the streams: fit on the sparse one
    if ahead is not None:
        dense_taps[site.reads], sparse_taps[site.reads] = ahead
    return Acts(dense_taps, sparse_taps, rows, *tensors)


class Walk:
    """Runs single layers on two streams of hidden states: the dense model's, and the one behind sparse layers.

    If the layers are not a simple chain, the whole model runs each time.
    """

    def __init__(self, applied: Applied, windows: Windows) -> None:
        self.applied, self.windows = applied, windows
        self.layers = applied.anatomy.layers
        self.kwargs: list[tuple[tuple, dict]] = []
        self.dense_taps: dict[tuple[int, Tap], Tensor] = {}  # of earlier layers, for sites that read them
        self.sparse_taps: dict[tuple[int, Tap], Tensor] = {}
        model = applied.model
        device = next(model.parameters()).device
        self.tokens = windows.tokens.to(device)
        batch, length = self.tokens.shape
        if not 0 <= windows.prompt < length:
            raise UserError(
                f"prompt of {windows.prompt} in windows of {length} tokens", "use a prompt shorter than the window"
            )
        self.rows = rows_of((batch, length), None, 0, windows.prompt, device)
        chain = _Chain(self.layers)
        try:
            with applied.prompt(length):
                output: Any = model(input_ids=self.tokens, use_cache=False)
        finally:
            chain.remove()
        if not bool(torch.isfinite(output.logits).all()):
            require_finite(model, type(model).__name__, "mend the weight before anything is fitted to it")
            raise UserError(
                f"{type(model).__name__} gives numbers on the calibration text that are not finite",
                "load it in another type, for example dtype='float32'",
            )
        self.chain = chain if chain.holds else None
        self.dense = self.sparse = chain.start if chain.holds else self.tokens
        if not chain.holds:
            self.sparse = self.tokens.clone()  # a copy, so that the two streams are different objects

    def _run(
        self,
        index: int,
        hidden: Tensor,
        boundary: int,
        observer: _Taps | None,
        products: Products | None = None,
    ) -> Tensor:
        if self.chain is None:
            with self.applied.watched(observer=observer), self.applied.prompt(boundary):
                self.applied.model(input_ids=self.tokens, use_cache=False)
            return hidden
        rows = self.rows._replace(sparse=self.rows.pos >= boundary)
        state = self.applied.new_pass(rows, SequenceMemory(prompt=boundary))
        state.observer, state.products = observer, products
        state.taps = self.dense_taps if hidden is self.dense and boundary == self.tokens.shape[1] else self.sparse_taps
        args, kwargs = self.chain.calls[index]
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        with self.applied.entered(state):
            return first(self.layers[index](*args, **kwargs))

    def observe(self, index: int, hidden: Tensor) -> _Taps:
        """Taps and decisions of one layer. Its attached sites act behind the prompt."""
        dense = self.chain is None and hidden is self.dense
        wanted = self.applied.lookahead if self.chain is None else set()
        taps = _Taps(index, self.dense_taps if dense else self.sparse_taps, wanted)
        self._run(index, hidden, self.tokens.shape[1] if dense else self.windows.prompt, taps)
        return taps

    def output(self, index: int, products: Products | None = None) -> Tensor:
        """The layer's output (B, T, d) on the sparse stream, with its attached sites.

        products: of earlier runs, for a run that changes a few sites.
        """
        if self.chain is None:
            raise UserError(
                "the layers of this model are not a simple chain, so none can run alone", "allocate uniformly"
            )
        return self._run(index, self.sparse, self.windows.prompt, None, products)

    def attach(self, index: int, plan: Plan) -> None:
        """Attach the plan's sites to the layer's executors."""
        for call in (*self.applied.ffns, *self.applied.linears, *self.applied.attentions):
            if call.block.layer == index:
                own = [p for p in plan.parts.values() if (p[0].layer, p[0].expert) == (index, call.block.expert)]
                call.attach([SiteState(site, params, plan.method_of(site)) for site, params in own])

    def advance(self, index: int) -> None:
        """Run the layer on both streams, with its attached sites on the sparse one."""
        if self.chain is None:
            return
        sparse = self._run(index, self.sparse, self.windows.prompt, None)
        self.dense = self._run(index, self.dense, self.tokens.shape[1], None)
        self.sparse = sparse


def first(output: Any) -> Any:
    """A module's output, or the first of several outputs."""
    return output[0] if isinstance(output, tuple | list) else output


class _Chain:
    """Watches one forward pass: does each layer run once, in order, on the output of the layer before it?"""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.calls: list[tuple[tuple, dict]] = []
        self.start: Tensor = torch.empty(0)
        self.holds = True
        self._layers, self._last = list(layers), torch.empty(0)
        self._beside: set[int] = set()  # further outputs of the last layer: in a model with two streams, the second one
        self._handles = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in layers]
        self._handles += [layer.register_forward_hook(self._after) for layer in layers]

    def remove(self) -> None:
        """Stop watching. A chain that ended early does not hold."""
        for handle in self._handles:
            handle.remove()
        self.holds = self.holds and len(self.calls) == len(self._layers)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        index = len(self.calls)
        x = args[0] if args else kwargs.get("hidden_states")
        in_order = index < len(self._layers) and module is self._layers[index]
        same = isinstance(x, Tensor) and (index == 0 or (x.shape == self._last.shape and torch.equal(x, self._last)))
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
        self._last = last if isinstance(last, Tensor) else torch.empty(0)


def solve_bytes(skippable: float, total: float, added: float, byte_fraction: float) -> float:
    """The sparsity at which a decode step reads `byte_fraction` of `total` bytes. Raises OutOfReach below the floor.

    skippable: bytes of all units of all sites. added: bytes of the plan itself.
    """
    over = total + added - byte_fraction * total
    if over >= skippable:
        raise OutOfReach(byte_fraction, (total + added - skippable) / total)
    return max(0.0, over / skippable)
