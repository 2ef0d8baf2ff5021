"""Does a prompt's mask stay good, and is it specific to the prompt? Masks of one size from different sources, on continuations.

We measure kappa_J of the prompt's set with the set of each later token, by distance; and the loss of the continuation under
the mask of its own prompt, of another prompt of the domain, of another domain, of random tokens, and of static popularity.
The oracle's mask and a random one are the bounds.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moyu.methods.random import uniform
from moyu.methods.values import Rows, Site
from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.over_activation import masked_losses, popularity
from moyu.research.studies.subject import Subject, leading
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, griffin_statistic, half_life, kappa, top_sets

PROMPT, CONTINUATION = 96, 96
KEPT = 0.5
MASKS = ("own", "same domain", "other domain", "random tokens", "popular", "random mask", "oracle")


class Decay(Study):
    """E2c."""

    name: ClassVar[str] = "decay"
    claim: ClassVar[str] = "A prompt's own active set serves its continuation, and fades slowly."
    prediction: ClassVar[str] = (
        "At half of the neurons the own prompt's mask costs less loss than another prompt's of the same domain; its overlap "
        "with later tokens is above the other's, and keeps more than half of its first value over 96 tokens."
    )
    refutation: ClassVar[str] = (
        "Own and other masks are equivalent (0.01 nats, kappa_J 0.01): then inertia is popularity; or the excess halves."
    )
    conditions: ClassVar = (
        Condition("own mask", "nats per token that another prompt's mask costs more", "above", 0.0, 0.01),
        Condition("own overlap", "kappa_J of the own prompt's set less another's, first 8 tokens", "above", 0.0, 0.01),
        Condition("slow decay", "that excess over the last quarter, over the first", "above", 0.5, 0.1),
    )
    controls: ClassVar = (
        Control("ceiling", "nats by which the oracle's mask beats the own prompt's", "at least", 0.0),
        Control("floor", "nats by which a random mask is worse than the own prompt's", "at least", 0.0),
    )

    def observe(self, setup: Setup) -> Observed:
        subject, count = setup.subject, setup.size(96, 3)
        texts = domains.windows(subject, "library", 2 * count, PROMPT + CONTINUATION, seed=setup.seed)
        own, other = texts[:count], texts[count:]
        far = domains.windows(subject, "docstrings", min(count, 60), PROMPT, seed=setup.seed)
        far = far[torch.arange(count) % len(far)]
        trained = setup.part("decay/trained", lambda: _observe(subject, own, other, far, setup))
        plain = setup.untrained_part("decay/untrained", lambda who: {"kappa": _overlaps(who, own, other)})
        return {**trained, "untrained_kappa": plain["kappa"]}

    def analyse(self, observed: Observed) -> Finding:
        losses, dense = observed["losses"], observed["dense"]  # (documents, masks), (documents,)
        extra = dict(zip(MASKS, (losses - dense[:, None]).T, strict=True))
        excess = observed["kappa"][:, 0] - observed["kappa"][:, 1]  # (documents, tokens)
        quarter = excess.shape[1] // 4

        def remaining(data: np.ndarray) -> float:
            first = data[:, :quarter].mean()
            return float(data[:, -quarter:].mean() / first) if first > 0 else 0.0

        blocks = excess.mean(0).reshape(-1, 8).mean(1)
        return Finding(
            {
                "own mask": bootstrap(extra["same domain"] - extra["own"]),
                "own overlap": bootstrap(excess[:, :8].mean(1)),
                "slow decay": bootstrap(excess, remaining),
            },
            controls={
                "ceiling": float((extra["own"] - extra["oracle"]).mean()),
                "floor": float((extra["random mask"] - extra["own"]).mean()),
            },
            nulls={
                "nats over dense, random mask": float(extra["random mask"].mean()),
                "nats over dense, static popularity": float(extra["popular"].mean()),
                "own overlap, untrained": float(
                    (observed["untrained_kappa"][:, 0] - observed["untrained_kappa"][:, 1])[:, :8].mean()
                ),
            },
            details={
                "nats over dense": {m: round(float(v.mean()), 4) for m, v in extra.items()},
                "dense nats": float(dense.mean()),
                "half-life of the excess, tokens": _finite(half_life(np.arange(len(blocks)) * 8, blocks)),
                "kappa_J own by distance": observed["kappa"][:, 0].mean(0).round(4).tolist(),
                "kappa_J other by distance": observed["kappa"][:, 1].mean(0).round(4).tolist(),
                "kept": KEPT,
            },
            notes=("continuations are the texts' own next tokens, fed by teacher forcing, not generated ones",),
        )


def _finite(value: float) -> float | str:
    return round(value, 2) if np.isfinite(value) else "does not fall"


def _prompt_scores(subject: Subject, prompts: Tensor) -> Tensor:
    """GRIFFIN's statistic of prompts, (L, B, f)."""
    return griffin_statistic(subject.values(prompts)[:, :, 1:])


def _overlaps(subject: Subject, own: Tensor, other: Tensor) -> np.ndarray:
    """kappa_J of prompt sets with the set of each continuation token: own and other prompt, (documents, 2, tokens)."""
    sets = [leading(_prompt_scores(subject, t[:, :PROMPT]))[:, :, None] for t in (own, other)]
    out = []
    for i in range(len(own)):
        later = subject.active(subject.values(own[i : i + 1])[:, :, PROMPT:])  # (L, 1, t, f)
        out.append(torch.stack([kappa(s[:, i : i + 1], later).mean((0, 1)) for s in sets]))
    return torch.stack(out).numpy()


def _observe(subject: Subject, own: Tensor, other: Tensor, far: Tensor, setup: Setup) -> Observed:
    generator = torch.Generator().manual_seed(setup.seed)
    noise = torch.randint(3, int(own.max()), (len(own), PROMPT), generator=generator)
    noise[:, 0] = subject.bos
    prompts = {"own": own[:, :PROMPT], "same domain": other[:, :PROMPT], "other domain": far, "random tokens": noise}
    count = round(KEPT * subject.neurons)
    masks = {name: top_sets(_prompt_scores(subject, p), count) for name, p in prompts.items()}  # (L, B, f)
    popular = top_sets(popularity(subject, other), count)
    masks["popular"] = popular[:, None].expand(-1, len(own), -1)
    sites = [Site(l, "mid", "columns", ("down",), subject.neurons, 0) for l in range(len(subject.blocks))]
    drawn = torch.stack([uniform(setup.seed, site, torch.arange(len(own)), subject.neurons) for site in sites])
    masks["random mask"] = top_sets(drawn, count)
    losses = np.empty((len(own), len(MASKS)))
    for column, name in enumerate(MASKS):
        setup.progress("masks", column, len(MASKS))
        for i in range(0, len(own), 16):
            mask = None if name == "oracle" else masks[name][:, i : i + 16].to(subject.model.device)
            losses[i : i + 16, column] = masked_losses(subject, own[i : i + 16], _chooser(mask, count), prompt=PROMPT)
    with torch.no_grad():
        dense = torch.cat([subject.losses(p, first=PROMPT) for p in own.split(16)])
    return {"losses": losses, "dense": dense.numpy(), "kappa": _overlaps(subject, own, other)}


def _chooser(masks: Tensor | None, count: int):
    """A choice for `masked_losses`: one mask per sequence (L, B, f), or the best neurons of each token."""

    def choose(layer: int, scores: Tensor, rows: Rows) -> Tensor:
        return top_sets(scores, count) if masks is None else masks[layer][rows.seq]

    return choose
