"""Which drafted tokens stay, and what is written in place of the first that does not.

Lossless is speculative sampling (arXiv 2211.17192): a drafted token is accepted with probability min(1, p / q), p dense and q the
draft's, and in place of the first refused one a token is drawn from the positive part of p - q, so that the text is distributed
as the dense model's. Sirius (arXiv 2409.03856) keeps what dense finds likelier than a threshold. It is not lossless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# (drafted (D,), distributions they were drawn from (D, V), dense ones (D + 1, V), dense likelihoods of the drafted (D,), generator)
# -> (accepted tokens, the distribution (V,) of the token after them). Distributions are those that tokens are drawn from;
# likelihoods the model's own.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator | None], tuple[int, Tensor]]
Source = Literal[
    "plan", "text", "both"
]  # of drafts: sparse steps or first bits, what followed the same words before, or the better of the two


def acceptance(dense: Tensor, sparse: Tensor) -> Tensor:
    """min(1, p / q) for every token: probabilities p, q (..., V) -> (..., V); 1 where q is 0, which is never drawn."""
    return torch.where(sparse > 0, dense / sparse, 1.0).clamp(max=1.0)


def remainder(dense: Tensor, sparse: Tensor) -> Tensor:
    """The distribution of a token that replaces a refused one: (p - q)+ over its sum, (..., V); p where p = q."""
    rest = (dense - sparse).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, dense)


def first_unlikely(likelihoods: Tensor, threshold: float) -> int:
    """Sirius' trigger: the index of the first of D tokens whose dense likelihood is below `threshold`; D where none is."""
    below = (likelihoods < threshold).nonzero()
    return int(below[0]) if len(below) else len(likelihoods)


def lossless(
    drafted: Tensor, sparse: Tensor, dense: Tensor, likelihoods: Tensor, generator: torch.Generator | None
) -> tuple[int, Tensor]:
    """The rule of speculative sampling: drafted (D,), q (D, V), p (D + 1, V) -> (accepted, distribution of the next)."""
    chances = acceptance(dense[:-1], sparse).gather(1, drafted[:, None])[:, 0]
    refused = (torch.rand(len(drafted), generator=generator, dtype=chances.dtype) >= chances).nonzero()
    accepted = int(refused[0]) if len(refused) else len(drafted)
    return accepted, dense[accepted] if accepted == len(drafted) else remainder(dense[accepted], sparse[accepted])


def sirius(threshold: float = 0.1) -> Rule:
    """Sirius' rule: text is kept up to the first token that dense finds less likely than `threshold`, in [0, 1]."""

    def rule(
        drafted: Tensor, sparse: Tensor, dense: Tensor, likelihoods: Tensor, generator: torch.Generator | None
    ) -> tuple[int, Tensor]:
        accepted = first_unlikely(likelihoods, threshold)
        return accepted, dense[accepted]

    return rule


@dataclass(frozen=True)
class Correction:
    """How dense corrects drafts: `rule` "lossless", or "sirius" with its `threshold`; drafts: None as many as pay, or so many."""

    rule: Literal["lossless", "sirius"]
    drafts: int | None = None
    temperature: float = 0.0
    threshold: float = 0.1

    @property
    def decide(self) -> Rule:
        """The rule itself."""
        return lossless if self.rule == "lossless" else sirius(self.threshold)

    @property
    def source(self) -> Source:
        """Sirius asks how likely a plan's words are; only lossless takes words from anywhere."""
        return "both" if self.rule == "lossless" else "plan"

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of a generation that say how a token is drawn."""
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
