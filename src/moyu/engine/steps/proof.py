"""Which layers are plain: their parts by data flow and shape, their sum by numbers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moyu.engine.memory import cache_field
from moyu.engine.session import Session
from moyu.engine.sites import SiteState, states_of
from moyu.engine.steps.captured import Compiled
from moyu.engine.steps.ends import Angles, Ends
from moyu.engine.steps.layers import Norm, PlainLayer
from moyu.engine.steps.native import Native
from moyu.engine.steps.way import Run, Way
from moyu.kernels import BackendName
from moyu.methods.needs import needs
from moyu.model import dissect, networks
from moyu.model.anatomy import Block
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear

_INPUTS = ("hidden_states", "input", "x")
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_UNSEEN = ("clip_qkv", "logit_cap", "attention_sink")  # act on values that a probe may not reach
_UNSEEN_ENDS = ("attention_chunk_size", "output_router_logits")
_WINDOWS = ("full_attention", "sliding_attention")  # types of layers that differ in nothing but a window
_NARROW = 2  # positions of a window that a probe is longer than
_BY_LENGTH = ("dynamic", "longrope")  # rotary angles that depend on more than the position
NATIVE = ("cpu",)  # types of devices whose steps are native
# The norms of a plain layer: role, the linear that reads it, the linear that it reads.
_ROLES = (
    *(("before_attention", "q", None), ("before_network", "up", None), ("q_norm", None, "q"), ("k_norm", None, "k")),
    *(("after_attention", None, "o"), ("after_network", None, "down")),
)


@dataclass(eq=False)
class _Call:
    """What one module was given and gave while the probe ran."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def x(self) -> Tensor | None:
        value = self.args[0] if self.args else next((self.kwargs[n] for n in _INPUTS if n in self.kwargs), None)
        return value if isinstance(value, Tensor) else None


_Narrow = Callable[[], dict[nn.Module, _Call]]  # see `_narrowed`


def backend_of(model: nn.Module) -> BackendName:
    """The back end whose kernels a model's steps in one piece run on."""
    return "cpu" if next(model.parameters()).device.type in NATIVE else "gpu"


@torch.no_grad()
def plain_run(session: Session) -> tuple[Run | None, str | None]:
    """The step of a whole model in one piece, or None and the reason why its decode steps take the general path.

    On a CPU it is the native step, elsewhere the compiled one.
    """
    model = session.model
    way: Way = Native() if backend_of(model) == "cpu" else Compiled()
    reason = way.why_not(session)
    if reason is not None:
        return None, reason
    modules = session.anatomy.layers
    try:
        calls, narrow = _probe(model), functools.cache(lambda: _narrowed(model))
        layers = [
            _plain(model, module, block, calls, narrow, way)
            for module, block in zip(modules, session.anatomy.blocks, strict=True)
        ]
    except _NotPlain as error:
        return None, str(error)
    shared = [
        (layer.window, id(calls[m].kwargs.get("attention_mask")), id(calls[m].kwargs.get("position_embeddings")))
        for layer, m in zip(layers, modules, strict=True)
    ]
    ways = len(set(shared))
    if ways > len({window for window, *_ in shared}) or any(layer.rotary != layers[0].rotary for layer in layers):
        return None, "its layers attend in different ways"
    if not all(_same(calls[a].output, calls[b].x) for a, b in itertools.pairwise(modules)):
        return None, "something comes between its layers"
    ends = _plain_ends(session, layers, calls, way)
    if ends is None and ways > 1:
        return None, "its layers attend in different windows, and its embedding, final norm or head is not plain"
    for layer in layers:
        layer.states = states_of(session, layer.block)
    top = [] if session.anatomy.head is None else states_of(session, session.anatomy.head)
    reason = _unexpressed([state for layer in layers for state in layer.states] + top, way)
    if reason is not None:
        return None, reason
    if ends is not None and top:
        ends.words = top[0]
    return way.run(session, layers, ends)


class _NotPlain(Exception):
    """Why a layer is not plain."""


def _probe(model: nn.Module) -> dict[nn.Module, _Call]:
    """The last call of every module, on a few random tokens."""
    calls: dict[nn.Module, _Call] = {}
    ids = torch.randint(
        3, dissect.text_config(model).vocab_size, (1, dissect.PROBE_TOKENS), generator=torch.Generator().manual_seed(1)
    ).to(next(model.parameters()).device)

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls[module] = _Call(args, kwargs, output)

    handles = [m.register_forward_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _plain(
    model: nn.Module, module: nn.Module, block: Block, calls: dict[nn.Module, _Call], narrow: _Narrow, way: Way
) -> PlainLayer:
    """The layer's parts by data flow and shape, proved by a step; raises _NotPlain."""
    where = f"layer {block.layer}"
    pieces, config = block.pieces, dissect.text_config(model)
    if (
        set(pieces) - {"gate"} != {"q", "k", "v", "o", "up", "down"}
        or block.expert is not None
        or block.middle is not None
    ):
        raise _NotPlain(f"{where} is not attention by q, k, v, o and then one feed-forward network")
    if not all(piece.whole and not piece.transposed for piece in pieces.values()):
        raise _NotPlain(f"{where} has linears that share a weight, or that store it transposed")
    if len({p.blocks is None for n, p in pieces.items() if n in ("gate", "up", "down")}) > 1:
        raise _NotPlain(f"{where} has a network whose weights are quantised in part")
    if any(getattr(config, name, None) for name in _UNSEEN):
        raise _NotPlain(f"{where} may clip or cap what its attention computes")
    if (getattr(config, "rope_parameters", None) or {}).get("llama_4_scaling_beta"):
        raise _NotPlain(f"{where} scales its queries by their position, far behind the probe")
    call = calls[module]
    if not isinstance(call.output, Tensor) or call.args[1:]:
        raise _NotPlain(f"{where} returns more than its hidden states")
    linears = {id(piece.module) for piece in pieces.values()}
    candidates = [n for m in module.modules() if m in calls and id(m) not in linears and (n := _norm(m, calls[m]))]
    norms = {}
    for role, gives, takes in _ROLES:
        for norm in candidates:
            seen = calls[norm.module]
            reader, writer = calls[pieces[gives or "q"].module].x, calls[pieces[takes or "q"].module].output
            if (gives and _same(seen.output, reader)) or (takes and _same(seen.x, writer)):
                norms[role] = norm
    known = {
        id(p)
        for m in (*(n.module for n in norms.values()), *(piece.module for piece in pieces.values()))
        for p in m.parameters()
    }
    if any(id(p) not in known for p in module.parameters()):
        raise _NotPlain(f"{where} has parameters beside its linears and norms")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if pieces["q"].shape[0] % head_dim or pieces["k"].shape[0] % head_dim:
        raise _NotPlain(f"{where} has heads of different widths")
    attention = next((m for m in module.children() if any(c is pieces["q"].module for c in m.modules())), module)
    for name in ("q_norm", "k_norm"):
        if name in norms and len(norms[name].module.weight) != head_dim:  # pyright: ignore[reportArgumentType]
            raise _NotPlain(f"{where} has a norm over all heads at once")
    scale = getattr(attention, "scaling", None) or head_dim**-0.5
    softcap = getattr(attention, "attn_logit_softcapping", None) or 0.0
    if getattr(config, "attn_logit_softcapping", None) and not softcap:
        raise _NotPlain(f"{where} may cap what its attention computes")
    angles = call.kwargs.get("position_embeddings")
    rotary = angles[0].shape[-1] if isinstance(angles, tuple) and all(isinstance(a, Tensor) for a in angles) else 0
    index = getattr(attention, "layer_idx", block.layer)
    index = block.layer if index is None else index
    window = _window(model, module, attention, index, where, narrow)
    layer = PlainLayer(module, block, norms, index, head_dim, float(scale), float(softcap), window, rotary)
    _prove(layer, call, calls, where, way)
    return layer


def _window(model: nn.Module, module: nn.Module, attention: nn.Module, index: int, where: str, narrow: _Narrow) -> int:
    """How many positions a layer attends to, 0 = all; a probe is shorter than that."""
    config = dissect.text_config(model)
    kinds, size = getattr(config, "layer_types", None), getattr(config, "sliding_window", None) or 0
    if kinds and kinds[index] not in _WINDOWS:
        raise _NotPlain(f"{where} is of the type {kinds[index]!r}")
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0  # pyright: ignore[reportReturnType]
    if kinds:
        return size if kinds[index] == "sliding_attention" else 0
    if not size:
        return 0
    mask = narrow()[module].kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise _NotPlain(f"{where} may attend in a window")
    last = mask[0, 0, -1] if mask.dtype == torch.bool else mask[0, 0, -1] > -1.0
    return 0 if bool(last.all()) else size


def _narrowed(model: nn.Module) -> dict[nn.Module, _Call]:
    """A probe with a window of few positions, where the config has one and no module says who attends in it: masks do then."""
    config = dissect.text_config(model)
    size, config.sliding_window = config.sliding_window, _NARROW
    try:
        return _probe(model)
    finally:
        config.sliding_window = size


def _prove(layer: PlainLayer, call: _Call, calls: dict[nn.Module, _Call], where: str, way: Way) -> None:
    """The step's own layer, token by token, must give what the layer gave: its attention alone, and as a whole."""
    x = call.x
    assert x is not None
    tokens, pieces = x.shape[1], layer.block.pieces
    unit = _rounding(x.dtype, any(piece.blocks is not None for piece in pieces.values()))
    signs = torch.randint(0, 2, x[0].shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    shifted = x[0] * (1 + (unit or 0.0) * signs.to(x.device)).to(x.dtype)  # every value moved by a rounding
    both = torch.stack([x[0], shifted])  # (2, T, d)
    after = layer.norms.get("after_attention")
    attended = calls[pieces["o"].module if after is None else after.module].output.reshape(tokens, -1)
    bias = pieces["down"].bias
    if bias is not None and "after_network" in layer.norms:
        raise _NotPlain(f"{where} has a bias behind its network and a norm after it")
    angles = call.kwargs.get("position_embeddings") if layer.rotary else None
    for network, expected in ((False, attended if bias is None else attended + bias), (True, call.output[0] - x[0])):
        got, moved = (way.layer(layer, both, angles, network) - both).float()
        error, size, change = (float(t.float().norm()) for t in (got - expected, expected, moved - got))
        # Moved values are a whole spacing away, 2.6 times what a rounding errs in the mean square. A layer rounds some 15 times
        # one after the other, in either way: sqrt(30) / 2.6 = 2 of that change. (Embedded models: 0.2 to 0.9 of it.)
        explained = 1e-4 * size if unit is None else 2 * change
        rounding = torch.finfo(x.dtype).eps * float(x.float().norm())  # of x + expected
        if not 0 < size < math.inf or not error <= explained + rounding:
            part = "network" if network else "attention"
            raise _NotPlain(f"{where}'s {part} is not what a plain layer computes")


def _rounding(dtype: torch.dtype, in_blocks: bool) -> float | None:
    """How far one rounding moves a value, relative: to 8 bits, as products of blocks do, or to 16; None in plain float32."""
    if in_blocks:
        return 2**-7
    return None if dtype.itemsize >= 4 else torch.finfo(dtype).eps


def _plain_ends(session: Session, layers: list[PlainLayer], calls: dict[nn.Module, _Call], way: Way) -> Ends | None:
    """Embedding, final norm and head, where a step from token ids to logits gives what the model gave."""
    model = session.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    config, whole = dissect.text_config(model), calls[model].output
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    first, last = calls[layers[0].module], calls[layers[-1].module]
    x = first.x
    assert x is not None
    if (
        not isinstance(embedding, nn.Embedding | QuantisedEmbedding)
        or not isinstance(head, nn.Linear | QuantisedLinear)
        or not {embedding, head} <= calls.keys()
        or not networks.is_linear(head)
        or not _same(calls[embedding].output, x)
        or any(getattr(config, name, None) for name in _UNSEEN_ENDS)
        or not {"logits", cache_field(type(whole))} <= set(getattr(type(whole), "__dataclass_fields__", ()))
        or whole.logits.dtype != x.dtype
        or not torch.equal(whole.logits, _capped(calls[head].output, softcap))
        or not all(_readable(module, x.dtype) for module in (embedding, head))
    ):
        return None
    norms = [
        n for m, c in calls.items() if _same(c.x, last.output) and _same(c.output, calls[head].x) and (n := _norm(m, c))
    ]
    angles: list[Angles] = []
    for layer in layers if layers[0].rotary else ():
        given = calls[layer.module].kwargs["position_embeddings"]
        fitting = [k for k, known in enumerate(angles) if _gives(known, given, x.dtype)]
        if not fitting:
            found = _angles(given, calls, x.dtype)
            if found is None:
                return None
            fitting = [len(angles)]
            angles.append(found)
        layer.angles = fitting[0]
    if len(norms) != 1:
        return None
    ends = Ends(embedding, norms[0], head, angles, type(whole), softcap)
    ids = calls[embedding].x
    return ends if ids is not None and _proved(ends, ids, way) else None


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def _gives(angles: Angles, given: tuple[Tensor, Tensor], dtype: torch.dtype) -> bool:
    """Whether these are the angles that a layer was given, (1, T, width) each."""
    tables = angles.at(torch.arange(given[0].shape[1], device=given[0].device), dtype)
    return all(torch.equal(t, a[0].float()) for t, a in zip(tables, given, strict=True))


def _angles(given: tuple[Tensor, Tensor], calls: dict[nn.Module, _Call], dtype: torch.dtype) -> Angles | None:
    """The rotary embedding that gave these; None: there is none, there are several, or it looks at more than the position."""
    found = []
    for module, call in calls.items():
        if not isinstance(call.output, tuple) or not any("inv_freq" in name for name, _ in module.named_buffers()):
            continue
        if any(kind in str(getattr(module, "rope_type", "")) for kind in _BY_LENGTH):
            continue
        kinds = getattr(module, "layer_types", None) or [None]
        found += [a for kind in kinds if _gives(a := Angles(module, kind), given, dtype)]
    return found[0] if len({id(angles.module) for angles in found}) == 1 else None  # types of layers may share theirs


def _proved(ends: Ends, ids: Tensor, way: Way) -> bool:
    """Whether steps without layers give the logits that the modules give for `ids` (1, T)."""
    expected = _capped(ends.head(ends.norm.module(ends.embedding(ids)))[0], ends.softcap)
    error = float((way.logits(ends, ids[0]) - expected).float().norm() / expected.float().norm())
    # Two ways with three roundings each, of norm and head: sqrt(6 / 3) units, and a rounding moves a value by two of them.
    unit = _rounding(expected.dtype, isinstance(ends.head, QuantisedLinear))
    return error <= (1e-5 if unit is None else unit)


def _readable(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernels read the rows of a table or a head whose rows the model computes with in `dtype`."""
    if isinstance(module, QuantisedEmbedding | QuantisedLinear):
        return module.like.dtype == dtype and module.order in ("rows", "parted")
    weight = module.weight
    return weight.dtype == dtype and weight.stride(1) == 1  # pyright: ignore


def _unexpressed(states: list[SiteState], way: Way) -> str | None:
    """Why the step cannot decide one of the sites; None = it can."""
    for state in states:
        missing = needs(state.method, state.site, state.params) - way.CAN
        if missing:
            return f"{state.method.name} needs {', '.join(sorted(missing))} at {state.site.key}"
    return None


def _norm(module: nn.Module, call: _Call) -> Norm | None:
    """The module as a norm, if its output is what one would give."""
    weight, bias, x = getattr(module, "weight", None), getattr(module, "bias", None), call.x
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or x is None or x.shape[-1] != len(weight):
        return None
    eps = next((float(getattr(module, n)) for n in _EPSILONS if isinstance(getattr(module, n, None), float)), 0.0)
    if not isinstance(call.output, Tensor) or call.output.shape != x.shape:
        return None
    wide = x.float()
    root = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if bias is None:
        for plus in (0.0, 1.0):
            if networks.close(call.output, root * (weight.float() + plus)):
                return Norm(module, eps, False, plus)
    centred = nn.functional.layer_norm(wide, weight.shape, weight.float(), None if bias is None else bias.float(), eps)
    return Norm(module, eps, True) if networks.close(call.output, centred) else None


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
