"""Attention among the calls of a layer, proved in numbers: its module runs again with one linear's output changed.

A linear is the *query* if four things hold. A change at one token changes that token alone. At the first token, where there
is only one value to weigh, the output of each head keeps its direction. At the second token it does not. A query of 0 gives
equal weights, not an output of 0 (this tells it from the read-out of a recurrent mixer). Linears whose changes reach later
tokens are keys and values; without values the output is 0. Heads are proved the same way: changing the outputs of some
heads changes these heads and, bit for bit, no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moyu.model.anatomy import Attention, Piece
from moyu.model.calls import Call, close
from moyu.model.networks import WIDE


class QueryOutputs(NamedTuple):
    """The outputs of a linear that belong to the query."""

    weigh: Tensor  # (H, r) query of each head
    belong: Tensor  # (H, r') outputs used by one head alone: its query, and its gate if they share a linear
    values: Tensor | None  # (K, r'') values of each group of heads, if the linear holds them too


def _in_order(outputs: int, heads: int, size: int) -> QueryOutputs:
    all_of, groups = torch.arange(outputs).view(-1, size), (outputs // size - heads) // 2
    return QueryOutputs(all_of[:heads], all_of[:heads], all_of[heads + groups :])


def _by_group(outputs: int, heads: int, size: int) -> QueryOutputs:
    groups = (outputs // size - heads) // 2
    each = torch.arange(outputs).view(groups, heads // groups + 2, size)
    query = each[:, :-2].reshape(heads, size)
    return QueryOutputs(query, query, each[:, -1])


def _in_four_parts(outputs: int, heads: int, size: int) -> QueryOutputs:
    parts = torch.arange(outputs).view(4, 3, heads // 4, size)
    query = parts[:, 0].reshape(heads, size)
    return QueryOutputs(query, query, parts[:, 1].reshape(heads, size))


def _gate_by_head(outputs: int, heads: int, size: int) -> QueryOutputs:
    each = torch.arange(outputs).view(heads, -1)
    return QueryOutputs(each[:, :-size], each, None)


def _gates_after(outputs: int, heads: int, size: int) -> QueryOutputs:
    query, gates = torch.arange(outputs).split([outputs - heads * size, heads * size])
    query = query.view(heads, -1)
    return QueryOutputs(query, torch.cat([query, gates.view(heads, -1)], dim=1), None)


def _alone(outputs: int, heads: int, size: int) -> QueryOutputs:
    each = torch.arange(outputs).view(1 if outputs % heads else heads, -1)  # a latent may have no heads
    return QueryOutputs(each, each, None)


# Known arrangements of the outputs of one linear, given H heads of `size` values. The first one that is proved is used.
ARRANGEMENTS: dict[str, Callable[[int, int, int], QueryOutputs]] = {
    "queries": _alone,
    "queries, keys, values": _in_order,
    "queries, key, value of each group": _by_group,
    "four parts of queries, values, keys": _in_four_parts,
    "query and gate of each head": _gate_by_head,
    "queries, gates": _gates_after,
}


def find_attentions(
    calls: list[Call], linears: list[Call], heads: int, shape: torch.Size, around: Mapping[int, nn.Module]
) -> tuple[list[Attention], str | None]:
    """Every attention of a layer; or none and, if linears look like one, the reason.

    linears: those of `calls` that belong to no network. heads: query heads by the configuration (0: unknown). shape: (B, T) of
    the tokens. around: the wrapper that adds to a linear's output, by the linear's id.
    """
    free, found = _firsts(linears), []
    reasons: dict[tuple[int, ...], str] = {}  # by the linears that were tried
    for host in _firsts(calls).values():
        inside = {id(m) for m in host.module.modules()}
        own = [c for i, c in free.items() if i in inside]
        key = tuple(id(c.module) for c in own)
        if len(own) < 2 or key in reasons:
            continue
        readers = [c for c in own if c.x.data_ptr() == own[0].x.data_ptr() and c.x.shape == own[0].x.shape]
        if own[-1] in readers:
            continue
        names = ", ".join(c.name.rpartition(".")[2] for c in own)
        rows = own[0].x.shape[:-1]
        if rows not in (shape, torch.Size((shape.numel(),))):
            reasons[key] = f"{names}: run on rows {rows}, which are not the tokens {shape}"
            continue
        training = host.module.training
        host.module.eval()
        try:
            attention = _Trial(host, own, readers, heads, shape, around).attention()
            why = "none of them weighs earlier tokens as a query does"
        except Exception as error:  # the module cannot run again outside its layer
            attention, why = None, f"their module does not run again alone ({type(error).__name__})"
        finally:
            host.module.train(training)
        if attention is not None and any(p.spread for p in attention.pieces.values()):
            attention = Attention(attention.pieces)  # without heads: each process has some of them
        if attention is None:
            reasons[key] = f"{names}: {why}"
            continue
        found.append(attention)
        for piece in attention.pieces.values():
            del free[id(piece.module)]
    return found, None if found or not reasons else next(iter(reasons.values()))


def _firsts(calls: list[Call]) -> dict[int, Call]:
    """The first call of each module, by its id."""
    first: dict[int, Call] = {}
    for call in calls:
        first.setdefault(id(call.module), call)
    return first


class _Trial:
    """One module that may be an attention. It runs again with changed outputs of its linears; its last linear's input is read."""

    def __init__(
        self,
        host: Call,
        linears: list[Call],
        readers: list[Call],
        heads: int,
        shape: torch.Size,
        around: Mapping[int, nn.Module],
    ) -> None:
        """linears: in the order in which they ran. readers: those that take the module's input."""
        self.host, self.linears, self.readers, self.shape, self.around = host, linears, readers, shape, around
        self.out = linears[-1]
        width = self.out.x.shape[-1]
        self.heads = heads if heads and width % heads == 0 else 1
        self.size = width // self.heads
        self.generator = torch.Generator().manual_seed(0)
        self.before = self.run(None, None)  # (B, T, H size)

    def run(self, call: Call | None, change: Callable[[Tensor], None] | None) -> Tensor:
        """The input of `o`, (B, T, H size), after `change` has edited a linear's output (B, T, n)."""
        seen: list[Tensor] = []

        def edited(module: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
            other = y.reshape(*self.shape, -1).clone()
            change(other)  # pyright: ignore[reportOptionalCall]
            return other.reshape(y.shape)

        def see(module: nn.Module, inputs: tuple) -> None:
            seen.append(inputs[0].clone())

        handles = [self.out.module.register_forward_pre_hook(see)]
        if call is not None:
            handles.append(self.around.get(id(call.module), call.module).register_forward_hook(edited))
        try:
            self.host.again()
        finally:
            for handle in handles:
                handle.remove()
        return seen[0].reshape(*self.shape, -1)

    def noisy(self, call: Call, rows: Tensor) -> Tensor:
        """The input of `o` with noise on some outputs of a linear at the first two tokens."""
        reach, outputs = max(WIDE, 2 * float(call.y.float().std())), rows.flatten()

        def change(y: Tensor) -> None:
            noise = reach * torch.randn(len(y), 2, len(outputs), generator=self.generator)
            y[:, :2, outputs] = y[:, :2, outputs] + noise.to(y)

        return self.run(call, change)

    def without(self, call: Call, rows: Tensor) -> Tensor:
        """The input of `o` with some outputs of a linear set to 0."""

        def change(y: Tensor) -> None:
            y[..., rows.flatten()] = 0

        return self.run(call, change)

    def weighs(self, call: Call, rows: Tensor) -> bool:
        """Whether some outputs of a linear are queries."""
        before, after = self.before, self.noisy(call, rows)
        return (
            self.local(after)
            and close(self.directions(before)[:, 0], self.directions(after)[:, 0])
            and not close(self.directions(before)[:, 1], self.directions(after)[:, 1])
            and close(self.directions(before)[:, 0], self.directions(self.without(call, rows))[:, 0])
        )

    def local(self, after: Tensor) -> bool:
        """Whether a change at the first two tokens reached no later token."""
        return torch.equal(after[:, 2:], self.before[:, 2:])

    def directions(self, x: Tensor) -> Tensor:
        """Each head's part of x (B, T, H size), normalised to length 1: (B, T, H, size)."""
        each = x.double().unflatten(-1, (self.heads, self.size))  # an attention sink can make a head's output tiny
        return nn.functional.normalize(each, dim=-1, eps=1e-100).to(x.dtype)

    def belongs(self, call: Call, rows: Tensor) -> bool:
        """Whether row j of `rows` (parts, r) changes part j of the heads alone: a third is changed, the others must stay equal."""
        parts = len(rows)
        chosen = torch.arange(parts, device=self.before.device) % 3 == 0  # in both halves, at odd and at even places
        after = self.noisy(call, rows[chosen.cpu()])
        same = (after == self.before).unflatten(-1, (parts, -1)).all(-1)[:, 1:]  # (B, T - 1, parts)
        return bool(same[..., ~chosen].all()) and not bool(same[:, 0][:, chosen].any())

    # ----------------------------------------------------------------------------------------------------------- the roles

    def attention(self) -> Attention | None:
        """The attention that this module computes, or None."""
        latents = [c for c in self.linears[:-1] if c not in self.readers]
        first, behind = (
            next(((c, r) for c in calls if (r := self.arranged(c))), None) for calls in (self.readers, latents)
        )
        if first is None and behind is None:
            return None
        query, rows = behind or first  # pyright: ignore[reportGeneralTypeIssues]
        pieces: dict[str, Piece] = {}
        if first is not None:
            pieces["q_a" if behind else "q" if rows.values is None else "qkv"] = first[0].piece()
        if behind is not None:
            pieces["q_b"] = query.piece()
        aside = "g" if first else "q_a"  # the role of a linear that reaches no later token and is not a query
        spread: dict[str, Call] = {}
        others = [c for c in self.linears[:-1] if all(p.module is not c.module for p in pieces.values())]
        after = {id(c.module): self.noisy(c, torch.arange(c.y.shape[-1])) for c in others}
        compressed = any(c in latents and not self.local(after[id(c.module)]) for c in others)
        for call in others:
            moved = after[id(call.module)]
            if torch.equal(moved, self.before):
                continue  # it selects tokens, and the probe has too few for a selection
            every = torch.arange(call.y.shape[-1])
            if not self.local(moved):
                needed = not self.without(call, every).any()
                name = "kv_b" if call in latents else "k" if not needed else "kv_a" if compressed else "v"
                spread.setdefault(name, call)
            elif call in latents or self.weighs(call, every):
                continue
            else:
                name = aside
            pieces.setdefault(name, call.piece())
        pieces["o"] = self.out.piece()
        if self.heads == 1:
            return Attention(pieces)
        whole = len(rows.belong) == self.heads and not query.piece().transposed and self.belongs(query, rows.belong)
        values = spread.get("kv_b") or spread.get("v")
        return Attention(pieces, self.heads, self.groups(query, rows, values), rows.belong if whole else None)

    def arranged(self, call: Call) -> QueryOutputs | None:
        """The first arrangement of a linear's outputs under which its query outputs pass as queries, or None."""
        for arrange in ARRANGEMENTS.values():
            try:
                rows = arrange(call.y.shape[-1], self.heads, self.size)
            except (RuntimeError, ZeroDivisionError):  # the arrangement does not fit the number of outputs
                continue
            if rows.weigh.numel() and self.weighs(call, rows.weigh):
                return rows
        return None

    def groups(self, query: Call, rows: QueryOutputs, values: Call | None) -> int:
        """The number of groups of heads that share values: the largest that is proved, at least 1."""
        if rows.values is not None:
            return len(rows.values) if len(rows.values) > 1 and self.belongs(query, rows.values) else 1
        if values is None:
            return 1
        outputs = torch.arange(values.y.shape[-1])
        fitting = (n for n in range(self.heads, 1, -1) if self.heads % n == 0 and len(outputs) % n == 0)
        return next((n for n in fitting if self.belongs(values, outputs.view(n, -1))), 1)
