"""How alike two active sets are, beyond what chance and popularity explain.

    kappa_J = (J - J_0) / (1 - J_0),  J = |A & B| / |A | B|                                                       (13)

The uniform null draws sets of these sizes at random. The popularity null draws neuron j with its own frequency; overlap
above it is more than a preference for the same few neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**24  # entries of one product, so that memory stays bounded


def top_sets(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, (..., f) -> (..., f) bool."""
    best = scores.topk(k, dim=-1).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, best, True)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|A & B| / |A | B| along the last axis: (..., f) bool each -> (...); 1 for two empty sets."""
    either = (a | b).sum(-1)
    return torch.where(either > 0, (a & b).sum(-1) / either.clamp(min=1), 1.0)


def uniform_null(first: Tensor | float, second: Tensor | float, neurons: int) -> Tensor:
    """Expected Jaccard of independent uniform sets of these sizes: E|A & B| / E|A | B|; k/(2m - k) if both have size k."""
    both = torch.as_tensor(first, dtype=torch.float64) * torch.as_tensor(second, dtype=torch.float64) / neurons
    return both / (torch.as_tensor(first) + torch.as_tensor(second) - both).clamp(min=1e-12)


def popularity_null(frequencies: Tensor) -> Tensor:
    """Jaccard of sets that draw neuron j with frequency f_j: sum f^2 / sum(2f - f^2), (..., f) -> (...)."""
    squares = frequencies.square()
    return squares.sum(-1) / (2 * frequencies - squares).sum(-1).clamp(min=1e-12)


def chance_corrected(observed: Tensor, null: Tensor | float) -> Tensor:
    """kappa_J: 1 for equal sets, 0 at the null."""
    return (observed - null) / (1 - torch.as_tensor(null)).clamp(min=1e-12)


def kappa(a: Tensor, b: Tensor) -> Tensor:
    """kappa_J of two sets against the uniform null of their sizes: (..., f) bool each -> (...)."""
    null = uniform_null(a.sum(-1), b.sum(-1), a.shape[-1])
    return chance_corrected(jaccard(a, b).double(), null)


def flocking(sets: Tensor, null: Tensor | float | None = None) -> Tensor:
    """Mean kappa_J over pairs of tokens (14): sets (..., T, f) bool -> (...).

    null: the Jaccard of chance; None: the uniform one, of each pair's sizes.
    """
    *lead, tokens, neurons = sets.shape
    flat = sets.reshape(-1, tokens, neurons)
    upper = torch.triu_indices(tokens, tokens, offset=1)
    out = []
    for part in flat.split(max(1, BLOCK // (tokens * neurons))):
        member = part.float()
        both = member @ member.transpose(1, 2)  # (b, T, T)
        sizes = member.sum(-1)
        either = sizes[:, :, None] + sizes[:, None, :] - both
        observed = torch.where(either > 0, both / either.clamp(min=1), 1.0)
        chance = uniform_null(sizes[:, :, None], sizes[:, None, :], neurons).float() if null is None else null
        out.append(chance_corrected(observed, chance)[:, upper[0], upper[1]].mean(-1))
    return torch.cat(out).reshape(lead)
