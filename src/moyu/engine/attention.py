"""Attention under a plan: columns of its linears, and heads, with what skipped ones leave in the cache (KV policies)."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache

from moyu import kernels
from moyu.engine.executor import Executor
from moyu.engine.memory import cache_of
from moyu.engine.session import Pass, Session
from moyu.engine.sites import SiteState
from moyu.errors import UserError
from moyu.methods.heads import KvPolicy, head_norms
from moyu.methods.values import ATTENTION, READS, Rows, Tap
from moyu.model import networks
from moyu.model.anatomy import Block
from moyu.model.layout import Role


class AttentionLinear(Executor):
    """One linear of an attention: columns of its input, rows or columns of skipped heads."""

    def __init__(self, session: Session, block: Block, name: str, states: list[SiteState], lookahead: set) -> None:
        """`name` is the linear's, one of ATTENTION."""
        super().__init__(session, block, states, lookahead)
        self.name: str = name
        self.tap: Tap = READS[name]
        self.shows = name == next(n for n in ATTENTION if n in block.pieces and READS[n] == self.tap)
        self.piece = block.pieces[name]
        self.inner = self.piece.module.forward
        self.attach(states)

    def attach(self, states: list[SiteState]) -> None:
        """Keep the sites and look up this linear's."""
        self.states = states
        self.heads = self.site(skips="heads", linear=self.name)
        self.own = self.site(skips="columns", linear=self.name)

    @property
    def role(self) -> Role | None:
        """How kernels read this linear, where not by rows."""
        if self.own is not None:
            return self.own.role
        return "column" if self.heads and self.name == "o" else None

    def ensure_layout(self) -> None:
        """Lay the weight out again where something has packed it."""
        if self.role is not None:
            self._ensure([self.piece], [self.role])

    def forward(self, x: Tensor) -> Tensor:
        """Stands for the linear's forward, (..., in) -> (..., out)."""
        state = self.session.current()
        works = state is not None and (self.own or self.heads) and state.any_sparse
        flat = x.reshape(-1, x.shape[-1])
        if state is None or not (works or self._watched(state) or state.skipping):
            if state is None or not self.own_prompts(x, [self.piece], state):
                return self.inner(x)
            return self.whole(self.piece, flat).reshape(*x.shape[:-1], -1)
        y = self.run(flat, state.rows, state)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def run(self, x: Tensor, rows: Rows, state: Pass) -> Tensor:
        """The linear on N rows, (N, in) -> (N, out)."""
        if self.shows:
            self.see(self.tap, x, rows, state)
        if self.heads is not None and state.any_sparse:
            return self._with_heads(x, rows, state)
        return self.columns(self.piece, self.name, x, self.own if state.any_sparse else None, rows, state)

    def _with_heads(self, x: Tensor, rows: Rows, state: Pass) -> Tensor:
        """The query's linear without rows of skipped heads, o without their columns; k and v as the KV policy has it.

        Where rows are skipped, the mask must be known before them. Under the policy `full` the choice waits for o where heads are only
        masked, because an oracle has to see what the heads hold; under another one `AttentionCall` has chosen.
        """
        heads, (outputs, inputs) = self.heads, self.piece.shape
        assert heads is not None
        key, units = heads.site.key, heads.site.units
        early, first = heads.method.kv_policy != "full", self.name == heads.site.linears[0]
        if self.name != "o":
            if early and first and not torch.equal(state.pending.pop(f"{key} input"), x):
                raise UserError(
                    f"layer {self.block.layer}: the attention changes its input before q reads it",
                    "use KV policy 'full', which decides at q",
                )
            if first and not early:
                if not state.skipping:
                    state.pending[key] = x
                    return self.dense(self.piece, x, state)
                state.masks[key] = self.choose(heads, x, rows, state, _no_hindsight)  # (N, heads)
            if self.name in ("k", "v"):
                mask = state.masks[key]
                if state.skipping:
                    y = kernels.rows(x, self.piece.operand, _widen(mask, outputs), bias=self.piece.bias)
                else:
                    y = self.dense(self.piece, x, state)
                return _left(self.name, heads.method.kv_policy, y, mask, key, state)
            own = self.block.head_rows
            last = [n for n in heads.site.linears if n not in ("k", "v", "o")][-1]
            if own is None or self.name != last or not state.skipping:
                return self.dense(self.piece, x, state)
            kept = torch.ones(len(x), outputs, dtype=torch.bool, device=x.device)
            kept[:, own.flatten()] = _widen(state.masks[key], own.numel())
            return kernels.rows(x, self.piece.operand, kept, bias=self.piece.bias)

        def hindsight() -> Tensor:  # (N, heads)
            return head_norms(x, self.piece.weight, units)

        if early or state.skipping:
            mask = state.masks.pop(key)
        else:
            mask = self.choose(heads, state.pending.pop(key), rows, state, hindsight)
        wide = _widen(mask, inputs)  # (N, in)
        self.observe(heads, x, wide, rows, state)
        return self.masked(self.piece, "o", x, wide, heads, rows, state)


class AttentionCall(Executor):
    """An attention whose skipped heads leave no key, or no value: it chooses before any of its linears runs.

    hole       k and v are not computed; a later query does not see the position, and the softmax does without it.
    zero       k and v are not computed and are 0; a logit of 0 keeps its share of the softmax.
    recompute  k and v are computed when the head is next used, from the attention's kept input, d numbers a token.
    carry      v is the one before it; k is computed.
    """

    def __init__(
        self, session: Session, block: Block, module: nn.Module, states: list[SiteState], lookahead: set
    ) -> None:
        """`module` is the attention: the parent of the block's q, k, v and o."""
        super().__init__(session, block, [], lookahead)
        self.module, self.inner = module, module.forward
        self.attach(states)

    def attach(self, states: list[SiteState]) -> None:
        """Keep the site of the heads."""
        self.states = [s for s in states if s.site.skips == "heads"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for the attention's forward."""
        state, heads = self.session.current(), self.site(skips="heads")
        if state is None or heads is None:
            return self.inner(*args, **kwargs)
        names = list(inspect.signature(self.inner).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden, cache = kwargs[names[0]], cache_of(kwargs)  # (B, T, d)
        batch, length = hidden.shape[:2]
        key, policy = heads.site.key, heads.method.kv_policy
        if state.any_sparse:
            x = hidden.reshape(-1, hidden.shape[-1])
            mask = self.choose(heads, x, state.rows, state, lambda: self._hindsight(kwargs))  # (N, units)
            state.pending[f"{key} input"] = x
        else:
            mask = torch.ones(batch * length, heads.site.units, dtype=torch.bool, device=hidden.device)
        state.masks[key] = mask
        kept = mask.unflatten(0, (batch, length))  # (B, T, units)
        if policy == "hole":
            seen = state.memory.append(key, state.past, kept, True)  # (B, S, units)
            kwargs["attention_mask"] = self._without_holes(kwargs.get("attention_mask"), seen, hidden, state.past)
        elif policy == "carry":
            state.pending[key] = self._last_value(cache, hidden, state.past)  # (B, q)
        elif policy == "recompute" and isinstance(cache, Cache):
            self._fill(key, kwargs, kept, state)
        out = self.inner(**kwargs)
        if policy == "recompute" and isinstance(cache, Cache):
            self._note(key, kwargs, kept, hidden, state)
        return out

    def _hindsight(self, kwargs: dict[str, Any]) -> Tensor:
        """What each head would add if none were skipped in this call, (N, units)."""
        if cache_of(kwargs) is not None:
            return _no_hindsight()
        o, seen = self.block.pieces["o"], []
        handle = o.module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            with self.session.outside():
                self.inner(**kwargs)
        finally:
            handle.remove()
        return head_norms(seen[0].flatten(0, -2), o.weight, self.states[0].site.units)

    def _without_holes(self, mask: Tensor | None, seen: Tensor, hidden: Tensor, past: int) -> Tensor:
        """The attention mask (B, h, T, S) that also hides what was not computed: seen (B, S, units).

        A token always sees itself: where its head is skipped, nobody reads what comes of it.
        """
        length, columns = hidden.shape[1], seen.shape[1]
        place = torch.arange(columns, device=hidden.device)
        own = place[past:, None] == place  # (T, S)
        seen = seen.transpose(1, 2)[:, :, None] | own  # (B, units, T, S)
        seen = seen.repeat_interleave(self.block.heads // seen.shape[1], dim=1)  # (B, h, T, S)
        if mask is None:
            causal = torch.full((length, columns), -math.inf, dtype=hidden.dtype, device=hidden.device).triu(past + 1)
            mask = causal[None, None]
        if mask.dim() != 4:
            raise UserError(
                "the attention takes no mask a head, and KV policy 'hole' needs one",
                "load with attn_implementation='sdpa'",
            )
        extra = mask.shape[-1] - columns
        seen = functional.pad(seen, (0, extra), value=True) if extra > 0 else seen[..., -mask.shape[-1] :]
        return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, torch.finfo(mask.dtype).min)

    def _last_value(self, cache: Cache | None, hidden: Tensor, past: int) -> Tensor:
        """The value before this call's, (B, q); zeros where there is none."""
        if past == 0 or cache is None:
            return hidden.new_zeros(len(hidden), self.block.pieces["v"].shape[0])
        values: Tensor = self._cached(cache).values  # (B, h, S, D)
        return values[:, :, min(past, values.shape[2]) - 1].flatten(1)

    def _cached(self, cache: Cache | None) -> Any:
        assert cache is not None
        return cache.layers[getattr(self.module, "layer_idx", self.block.layer)]

    def _fill(self, key: str, kwargs: dict[str, Any], kept: Tensor, state: Pass) -> None:
        """Compute the keys and values that this call's heads miss, and put them into the cache."""
        known = state.memory.columns.get(key)
        if known is None:
            return
        wanted = ~known & kept.any(1, keepdim=True)  # (B, S, units)
        columns = wanted.any(-1).any(0).nonzero().squeeze(1)
        if not len(columns):
            return
        fresh, layer = self._again(key, kwargs, columns, state), self._cached(cache_of(kwargs))
        chosen = wanted[:, columns].transpose(1, 2)[..., None]  # (B, units, m, 1)
        for name, tensor in zip(("keys", "values"), fresh, strict=True):
            held = getattr(layer, name)
            held[:, :, columns] = torch.where(chosen, tensor, held[:, :, columns])
        state.memory.columns[key] = known | wanted

    def _again(self, key: str, kwargs: dict[str, Any], columns: Tensor, state: Pass) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, m, D) of some columns, by the attention itself on their kept inputs."""
        held = state.memory.columns
        scratch = DynamicCache()
        again = {name: scratch if isinstance(value, Cache) else value for name, value in kwargs.items()}
        again["attention_mask"] = None
        again[next(iter(inspect.signature(self.inner).parameters))] = held[f"{key} input"][:, columns]
        if kwargs.get("position_embeddings") is not None:
            again["position_embeddings"] = tuple(held[f"{key} angle{i}"][:, columns] for i in range(2))
        with self.session.outside():
            self.inner(**again)
        layer = self._cached(scratch)
        return layer.keys, layer.values

    def _note(self, key: str, kwargs: dict[str, Any], kept: Tensor, hidden: Tensor, state: Pass) -> None:
        """Remember this call's inputs and which of its keys and values are there; prove on a prompt that they come again."""
        memory = state.memory
        memory.append(f"{key} input", state.past, hidden, 0.0)
        for i, angle in enumerate(kwargs.get("position_embeddings") or ()):
            memory.append(f"{key} angle{i}", state.past, angle.expand(len(hidden), -1, -1), 0.0)
        memory.append(key, state.past, kept if state.skipping else torch.ones_like(kept), True)
        if not state.any_sparse:
            last, layer = torch.tensor([state.past + hidden.shape[1] - 1]), self._cached(cache_of(kwargs))
            fresh = self._again(key, kwargs, last, state)
            if not all(
                networks.close(a, getattr(layer, n)[:, :, -1:]) for a, n in zip(fresh, ("keys", "values"), strict=True)
            ):
                raise UserError(
                    f"layer {self.block.layer}: keys and values cannot be made again from the attention's input",
                    "use another KV policy than 'recompute'",
                )


def _left(name: str, policy: KvPolicy, y: Tensor, mask: Tensor, key: str, state: Pass) -> Tensor:
    """Keys or values (N, q) of a call as its skipped heads leave them, mask (N, units)."""
    if policy == "recompute" and not state.skipping:
        return y  # the same values, sooner
    if policy == "carry":
        return y if name == "k" else _carried(y, mask, state.pending.pop(key), state.rows)
    return torch.where(_widen(mask, y.shape[1]), y, 0)


def _carried(y: Tensor, mask: Tensor, before: Tensor, rows: Rows) -> Tensor:
    """Values (N, q) where a skipped head has its last computed one, which may be the one `before` (B, q) this call."""
    batch, units = rows.slots, mask.shape[1]
    each = torch.cat([before[:, None], y.unflatten(0, (batch, -1))], dim=1).unflatten(
        2, (units, -1)
    )  # (B, 1 + T, units, D)
    own = (mask & rows.valid[:, None]).unflatten(0, (batch, -1))  # (B, T, units)
    place = torch.arange(1, each.shape[1], device=y.device)[None, :, None]
    index = torch.where(own, place, 0).cummax(1).values  # (B, T, units)
    return each.gather(1, index[..., None].expand(-1, -1, -1, each.shape[3])).flatten(0, 1).flatten(1)


def _widen(mask: Tensor, width: int) -> Tensor:
    """A mask of heads as one of their channels, (N, heads) -> (N, width)."""
    return mask.repeat_interleave(width // mask.shape[1], dim=1)


def _no_hindsight() -> Tensor:
    raise UserError("the oracle of heads is not known before they are computed", "use engine='mask'")
