"""A model under study: its neurons' values on some tokens, and those of the untrained model.

The model may be on any device; results are on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moyu.engine.applied import Applied
from moyu.engine.memory import cache_of, given_cache
from moyu.errors import UserError
from moyu.methods.values import Rows, Site, Tap
from moyu.model import dissect, loading
from moyu.model.anatomy import Anatomy, Block
from moyu.model.loading import Loaded
from moyu.research.theory import cett_search, top_sets

BATCH = 16
SINK = 4  # first positions with BOS, which hold attention sinks and massive activations
SHARE = 0.25  # of neurons in the main active set; `SHARES` are further ones
SHARES = (0.10, 0.25, 0.50)


def leading(scores: Tensor, share: float = SHARE) -> Tensor:
    """The `share` of neurons with the largest scores, without those whose score is 0: (..., f) -> bool.

    With ReLU fewer neurons may be active; ties at 0 would otherwise fill the set arbitrarily.
    """
    return top_sets(scores, max(1, round(share * scores.shape[-1]))) & (scores > 0)


class _AllTaps:
    """An observer that keeps some taps of every layer."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.wanted = set(taps)
        self.kept: dict[tuple[int, Tap], Tensor] = {}

    def see(self, layer: int, expert: int | None, tap: Tap, x: Tensor, rows: Rows) -> None:
        if expert is None and tap in self.wanted:
            self.kept[layer, tap] = x.detach().float().cpu()

    def mask(self, site: Site, values: Tensor, mask: Tensor, rows: Rows) -> None: ...


@dataclass(eq=False)
class Subject:
    """A loaded model, its blocks, and measurements of its neurons."""

    loaded: Loaded
    anatomy: Anatomy

    @classmethod
    def open(cls, name: str, device: str = "cpu") -> Subject:
        """Load a model by name. Raises UserError as `moyu.load` does."""
        return cls.of(loading.load(name, dtype="float32", device=device))

    @classmethod
    def of(cls, loaded: Loaded) -> Subject:
        """The subject of a loaded model. Raises UserError if no layer has a feed-forward network of its own."""
        subject = cls(loaded, dissect.dissect(loaded.model))
        if not subject.blocks:
            raise UserError(f"{loaded.name!r} has only routed experts", "studies need dense feed-forward networks")
        return subject

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.loaded.model

    @cached_property
    def blocks(self) -> list[Block]:
        """Layers whose feed-forward network was proved, in order."""
        return [b for b in self.anatomy.blocks if b.has_ffn]

    @cached_property
    def column_norms(self) -> list[Tensor]:
        """||w_j|| of every layer, (f,)."""
        return [b.pieces["down"].weight.detach().float().norm(dim=0).cpu() for b in self.blocks]

    @property
    def neurons(self) -> int:
        """f of the first layer."""
        return self.blocks[0].neurons

    @property
    def bos(self) -> int:
        """The token at the start of a text."""
        bos = self.loaded.tokenizer.bos_token_id
        return int(bos if bos is not None else self.loaded.tokenizer.eos_token_id or 0)  # pyright: ignore

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        return self.loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore

    def untrained(self, seed: int = 0) -> Subject:
        """The same architecture at random initialisation: the architecture's null."""
        config = copy.deepcopy(self.model.config)
        torch.manual_seed(seed)
        twin = type(self.model)(config).float().eval().to(self.model.device)
        return Subject.of(Loaded(f"{self.loaded.name} untrained", twin, self.loaded.tokenizer))

    @torch.no_grad()
    def values(
        self, tokens: Tensor, *, tap: Tap = "mid", positions: Tensor | None = None, batch: int = BATCH
    ) -> Tensor:
        """A tap of every layer in one parallel pass: tokens (B, T) -> (L, B, T, n); `mid` are the neuron values a."""
        parts = []
        with Applied(self.model, None, engine="mask", anatomy=self.anatomy) as applied, applied.prompt(tokens.shape[1]):
            for index, part in enumerate(tokens.split(batch)):
                observer = _AllTaps([tap])
                device = self.model.device
                extra = {} if positions is None else {"position_ids": positions.split(batch)[index].to(device)}
                with applied.watched(observer=observer):
                    self.model(input_ids=part.to(device), use_cache=False, **extra)
                layers = [observer.kept[b.layer, tap].unflatten(0, part.shape) for b in self.blocks]
                parts.append(torch.stack(layers))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def stepwise(self, tokens: Tensor) -> Tensor:
        """Neuron values when the tokens are fed one by one with a cache: (B, T) -> (L, B, T, f)."""
        steps, cache = [], None
        fed = tokens.to(self.model.device)
        with Applied(self.model, None, engine="mask", anatomy=self.anatomy) as applied, applied.prompt(tokens.shape[1]):
            for t in range(tokens.shape[1]):
                observer = _AllTaps(["mid"])
                with applied.watched(observer=observer):
                    output = self.model(input_ids=fed[:, t : t + 1], use_cache=True, **given_cache(self.model, cache))
                cache = cache_of(output)
                steps.append(torch.stack([observer.kept[b.layer, "mid"] for b in self.blocks]))
        return torch.stack(steps, dim=2)

    def scores(self, values: Tensor) -> Tensor:
        """Oracle scores ||n_j|| = |a_j| ||w_j||: values (L, ..., f) -> the same shape."""
        return torch.stack([v.abs() * n for v, n in zip(values, self.column_norms, strict=True)])

    def active(self, values: Tensor, share: float = SHARE) -> Tensor:
        """Active sets: the top `share` of neurons by oracle score, as far as they are not 0, (L, ..., f) -> bool."""
        return leading(self.scores(values), share)

    def above(self, values: Tensor, thresholds: Tensor) -> Tensor:
        """Active sets by one threshold per layer on the oracle score: (L, ..., f) and (L,) -> (L, ..., f) bool."""
        return torch.stack([s > t for s, t in zip(self.scores(values), thresholds, strict=True)])

    def thresholds(self, tokens: Tensor, tau: float = 0.2) -> Tensor:
        """For each layer, the largest threshold with a mean CETT of at most `tau` on some texts: (B, T) -> (L,)."""
        values = self.values(tokens)[:, :, SINK:].flatten(1, 2)
        downs = [b.pieces["down"].weight.detach().float().cpu() for b in self.blocks]
        found = [cett_search(v, d, tau, tokens=64) for v, d in zip(values, downs, strict=True)]
        return torch.tensor(found).clamp(min=0)

    def losses(self, tokens: Tensor, labels: Tensor | None = None, *, first: int = SINK) -> Tensor:
        """Mean loss in nats of each sequence over the tokens behind position `first`: (B, T) -> (B,). Under autograd too."""
        logits = self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits[:, first:-1].float().cpu()
        targets = (tokens if labels is None else labels)[:, first + 1 :]
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(targets.shape).mean(1)

    @contextmanager
    def kept_neurons(self) -> Iterator[list[Tensor]]:
        """Inside, every forward pass stores the neuron values (B, T, f) of each layer in the list, with their graph."""
        kept: list[Tensor] = []

        def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
            kept.append(inputs[0])

        hooks = [b.pieces["down"].module.register_forward_pre_hook(keep) for b in self.blocks]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    def saliencies(self, tokens: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Neuron values a and dl/da, l the loss summed over scored tokens: (L, B, T, f) each. One batch at a time."""
        with torch.enable_grad(), self.kept_neurons() as kept:
            loss = self.losses(tokens, labels).sum() * (tokens.shape[1] - SINK - 1)
            gradients = torch.autograd.grad(loss, kept)
        shape = (*tokens.shape, -1)
        values = torch.stack([k.detach().reshape(shape).cpu() for k in kept])
        return values, torch.stack([g.reshape(shape).cpu() for g in gradients])
