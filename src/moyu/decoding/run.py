"""One decode step through all layers of a model."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from moyu import kernels, runtime
from moyu.kernels import cpu
from moyu.methods.base import NOTHING

from .layers import PlainLayer

if TYPE_CHECKING:
    from moyu.applied import Applied
    from moyu.runtime import Pass

GROW = 256  # tokens by which a cache's buffers grow at least


class DecodeRun:
    """All layers of a model as one native call a step. Copies rebuild what points into memory."""

    def __init__(self, applied: Applied, layers: list[PlainLayer]) -> None:
        """`layers` are all decoder layers, in order."""
        self.applied, self.layers = applied, layers
        self.d = layers[0].block.pieces["q"].weight.shape[1]
        self.widest = max(layer.widest for layer in layers)
        self._decoder: Any = None
        self._pointers: list[tuple[nn.Parameter, int]] = []
        self._expected: list[tuple[dict, str, Any]] = []
        self._hooks: list[dict] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_decoder": None, "_pointers": [], "_expected": [], "_hooks": []}

    def attach(self, replace: Callable[[nn.Module, str, Any], None]) -> None:
        """Put the run in the place of the layers' forwards."""
        for position, layer in enumerate(self.layers):
            call = _LayerCall(self, position, layer.module.forward)
            replace(layer.module, "forward", MethodType(_LayerCall.forward, call))

    def usable(self, state: Pass, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this call is a decode step that the native layers may take."""
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if (
            not state.skipping
            or state.chooser is not None
            or hidden.dim() != 3
            or hidden.shape[1] != 1
            or hidden.dtype != self._pointers_dtype()
            or torch.compiler.is_compiling()
            or (mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != 1))
        ):
            return False
        known = getattr(cache, "layers", ())
        return (
            all(l.index < len(known) and _appendable(known[l.index], hidden) for l in self.layers) and self._untouched()
        )

    def _pointers_dtype(self) -> torch.dtype:
        return self.layers[0].block.pieces["q"].weight.dtype

    def _untouched(self) -> bool:
        """Whether the layers are still what was proved: nobody hooked, replaced or patched a module of them."""
        if self._decoder is None:
            self._build()
        return not any(self._hooks) and all(owner.get(name) is value for owner, name, value in self._expected)

    def _build(self) -> None:
        """Take the pointers of the live parameters, laid out for this plan."""
        for call in (*self.applied.ffns, *self.applied.linears):
            call.ensure_layout()
        decoder = cpu.extension().Decoder()
        self._pointers, self._expected, self._hooks = [], [], []
        for layer in self.layers:
            decoder.add(layer.native())
            self._pointers += [(p, p.data_ptr()) for p in layer.weights]
            for module in layer.module.modules():
                own = vars(module)
                self._hooks += [own["_forward_hooks"], own["_forward_pre_hooks"]]
                self._expected.append((own, "forward", own.get("forward")))
                for kind in ("_modules", "_parameters"):
                    self._expected += [(own[kind], name, value) for name, value in own[kind].items()]
        self._decoder = decoder

    def step(self, state: Pass, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states (B, 1, d) after all layers; appends to the cache."""
        if any(p.data_ptr() != address for p, address in self._pointers):  # something has repacked the weights
            with self.applied.layout_lock:
                self._decoder = None
                self._build()
        cache = kwargs["past_key_values"]
        past = cache.layers[self.layers[0].index].keys.shape[-2]
        memory, alive = array("q"), []
        for layer in self.layers:
            keys, values = _room(cache.layers[layer.index], past)
            memory.extend((keys.data_ptr(), keys.stride(0), keys.stride(1)))
            memory.extend((values.data_ptr(), values.stride(0), values.stride(1)))
            mask = self._mask(layer, state)
            alive.append(mask)
            memory.extend((0, 0) if mask is None else (mask.data_ptr(), mask.stride(0)))
        y = hidden.contiguous().clone()
        angles = kwargs.get("position_embeddings") if self.layers[0].rotary else None
        read = run_step(
            self._decoder,
            y.view(len(y), -1),
            past,
            angles,
            _allowed(kwargs.get("attention_mask"), len(y), past),
            self.widest,
            memory,
        )
        kernels.count("decode", read)
        for layer in self.layers:
            own = cache.layers[layer.index]
            keys, values = own._moyu_room
            own.keys, own.values = keys[:, :, : past + 1], values[:, :, : past + 1]
        return y

    def _mask(self, layer: PlainLayer, state: Pass) -> Tensor | None:
        site = layer.sequence_site
        if site is None:
            return None
        frozen = state.memory.masks.get(site.site.key)
        mask = site.decide(NOTHING, state.rows, state) if frozen is None else frozen
        return mask if mask.stride(1) == 1 else mask.contiguous()


class _LayerCall:
    """One layer of a run: the first does the work of all, the others hand it on."""

    def __init__(self, run: DecodeRun, position: int, inner: Callable) -> None:
        self.run, self.position, self.inner = run, position, inner

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands for the layer's forward."""
        state = runtime.current(self.run.applied)
        if state is None:
            return self.inner(hidden, *args, **kwargs)
        if self.position == 0:
            state.native = not args and self.run.usable(state, hidden, kwargs)
            if state.native:
                return self.run.step(state, hidden, kwargs)
        return hidden if state.native else self.inner(hidden, *args, **kwargs)


def run_step(
    decoder: Any,
    hidden: Tensor,
    past: int,
    angles: tuple[Tensor, Tensor] | None,
    allowed: Tensor | None,
    widest: int,
    memory: array,
) -> int:
    """One step on `hidden` (B, d) in place; angles are cos and sin, (1 or B, 1, width). Returns the bytes read."""
    batch, d = hidden.shape
    cos = sin = None
    if angles is not None:
        cos, sin = (a.reshape(len(a), -1).float().expand(batch, -1).contiguous() for a in angles)  # (B, width)
    return decoder.step(
        cpu.dtype_code(hidden.dtype),
        torch.get_num_threads(),
        batch,
        d,
        past,
        0 if cos is None else cos.shape[1],
        widest,
        hidden.data_ptr(),
        0 if cos is None else cos.data_ptr(),
        0 if sin is None else sin.data_ptr(),
        0 if allowed is None else allowed.data_ptr(),
        memory.buffer_info()[0],
    )


def _appendable(layer: Any, hidden: Tensor) -> bool:
    """Whether a cache's layer is a plain growing one that holds what the kernel can append to."""
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return False
    keys, values = layer.keys, layer.values
    if keys is None or values is None:
        return False
    return keys.dim() == 4 and len(keys) == len(hidden) == len(values) and keys.dtype == values.dtype == hidden.dtype


def _room(layer: Any, past: int) -> tuple[Tensor, Tensor]:
    """Buffers (B, H, more than past, D) that begin with the layer's keys and values."""
    room = getattr(layer, "_moyu_room", None)
    keys, values = layer.keys, layer.values
    if (
        room is None
        or room[0].shape[2] <= past
        or keys.data_ptr() != room[0].data_ptr()
        or values.data_ptr() != room[1].data_ptr()
        or len(room[0]) != len(keys)
    ):
        longer = past + max(GROW, past // 2)
        room = layer._moyu_room = tuple(t.new_empty(*t.shape[:2], longer, t.shape[3]) for t in (keys, values))
        for buffer, content in zip(room, (keys, values), strict=True):
            buffer[:, :, :past] = content
    return room


def _allowed(mask: Tensor | None, batch: int, past: int) -> Tensor | None:
    """Which positions may be attended to, (B, past + 1) uint8, from a mask (1 or B, 1, 1, past + 1) that is boolean or added."""
    if mask is None:
        return None
    open_ = mask if mask.dtype == torch.bool else mask > -1.0
    return open_[:, 0, 0, : past + 1].expand(batch, -1).to(torch.uint8).contiguous()
