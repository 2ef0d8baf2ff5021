"""Routers off the loop: trained on a frozen model's activations, and graded on text that they have not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

EPOCHS = 20
BATCH = 128
RATE = 1e-2


def low_rank(width: int, rank: int, units: int, seed: int) -> nn.Module:
    """An untrained router of two matrices without a bias, inner (rank, width) and outer (units, rank)."""
    generator = torch.Generator().manual_seed(seed)
    router = nn.Sequential()
    for name, outputs, inputs in (("inner", rank, width), ("outer", units, rank)):
        layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.normal_(layer.weight, std=inputs**-0.5, generator=generator)
        router.add_module(name, layer)
    return router


def train(router: nn.Module, x: Tensor, labels: Tensor, weights: Tensor) -> nn.Module:
    """Train a router, (N, n) -> (N, units) logits, on weighted binary cross-entropy; the same result at every call.

    It moves to where x is.

    x (N, n), labels (N, units) in [0, 1], weights (N, units) >= 0. Adam with a rate that falls to 0.
    """
    x, labels, weights = x.float(), labels.float(), weights.float()
    router.to(x.device)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(router.parameters(), lr=RATE)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for index in torch.randperm(len(x), generator=generator).split(BATCH):
                logits = router(x[index])
                loss = functional.binary_cross_entropy_with_logits(logits, labels[index], weights[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return router.requires_grad_(False)


@dataclass(frozen=True)
class Grade:
    """How well scores find the units that matter."""

    recall: float  # share of the units that matter most (k, or all that add anything) among the k best scores
    auroc: float  # probability that one of them has a larger score than one of the others
    captured: float  # share of all units' mass that the k best scores hold
    ideal: float  # the same for the k units that matter most


def grade(scores: Tensor, mass: Tensor, k: int) -> Grade:
    """Grade scores (N, units) by the mass (N, units) >= 0 of what each unit adds, for k kept units of each row."""
    wanted = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, mass.topk(k, dim=1).indices, True) & (mass > 0)
    found = torch.zeros_like(wanted).scatter_(1, scores.topk(k, dim=1).indices, True)
    total = mass.sum().clamp(min=1e-30)
    place = torch.empty_like(scores, dtype=torch.float64)
    order = torch.arange(scores.shape[1], dtype=torch.float64, device=scores.device).expand_as(place)
    place.scatter_(1, scores.argsort(dim=1, stable=True), order)
    count = wanted.sum(1).double()
    pairs = count * (scores.shape[1] - count)
    # Mann-Whitney of each row: places of the wanted units less the least that so many places can sum to.
    above = (place * wanted).sum(1) - count * (count - 1) / 2
    return Grade(
        recall=float((wanted & found).sum() / wanted.sum().clamp(min=1)),
        auroc=float((above[pairs > 0] / pairs[pairs > 0]).mean()),
        captured=float((mass * found).sum() / total),
        ideal=float((mass * wanted).sum() / total),
    )
