"""Does the prefix or the content determine the active set? Same or different prefix x same or different continuation.

I = kappa(same prefix, different continuation) - kappa(both different): inertia. S = kappa(different prefix, same
continuation) - kappa(both different): content. Sets are compared at the same position of the continuation.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import SHARE, SHARES, Subject, leading
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, griffin_statistic, jaccard, kappa

PREFIX, CONTINUATION = 64, 32
PLACES = ("library", "manuals", "headers", "docstrings")
SETS = (*(f"top {share:.0%}" for share in SHARES), "CETT 0.2")  # how a token's active set is chosen
MAIN = SHARES.index(SHARE)
ARMS = ("same prefix", "same continuation", "both different", "same words shuffled in the prefix")


class Inertia(Study):
    """E2a."""

    name: ClassVar[str] = "inertia"
    claim: ClassVar[str] = (
        "What was active keeps being active: the prefix fixes the active set more than the content does."
    )
    prediction: ClassVar[str] = (
        "Two continuations behind one prefix share more active neurons than unrelated ones (I > 0), and more than one "
        "continuation behind two prefixes does (I > S)."
    )
    refutation: ClassVar[str] = (
        "I below the smallest of interest (0.02), or S at or above I: then content carries the set."
    )
    conditions: ClassVar = (
        Condition("inertia", "I: kappa_J gained from the same prefix, popularity null", "above", 0.0, 0.02),
        Condition("inertia over content", "I - S", "above", 0.0, 0.02),
    )
    controls: ClassVar = (
        Control("rounding", "1 - kappa_J of one text in batches of two sizes", "at most", 0.01),
    )  # fmt: skip

    def observe(self, setup: Setup) -> Observed:
        count = setup.size(120, 4)
        quads = _quads(setup.subject, count, setup.seed)
        history = domains.windows(setup.subject, "library", 8, PREFIX, skip=200, seed=setup.seed)

        def measure(who: Subject, label: str) -> Observed:
            rows = []
            thresholds = who.thresholds(history)
            for i, quad in enumerate(quads):
                setup.progress(f"2 x 2, {label}", i, count)
                rows.append(_one(who, quad, thresholds))
            return {k: np.stack([r[k] for r in rows]) for k in rows[0]}

        trained = setup.part("inertia/trained", lambda: measure(setup.subject, "trained"))
        plain = setup.part("inertia/untrained", lambda: measure(setup.subject.untrained(setup.seed), "untrained"))
        return {**trained, **{f"untrained_{k}": v for k, v in plain.items()}}

    def analyse(self, observed: Observed) -> Finding:
        token = observed["token"].mean(3)  # Jaccard, (quads, shares, arms)
        base = token[:, :, 2].mean(0)  # popularity null: sets of other documents at the same position
        above = (token - base[:, None]) / (1 - base[:, None])
        main = above[:, MAIN]  # (quads, arms)
        uniform = observed["uniform"].mean((0, 2))  # kappa_J against random sets, (arms,)
        i, s = main[:, 0] - main[:, 2], main[:, 1] - main[:, 2]
        sequence = observed["sequence"].mean(2)
        plain = observed["untrained_token"].mean(3)[:, MAIN]
        return Finding(
            {"inertia": bootstrap(i), "inertia over content": bootstrap(i - s)},
            controls={"rounding": float(1 - observed["rounding"].mean())},
            nulls={
                "I, untrained": float((plain[:, 0] - plain[:, 2]).mean() / (1 - plain[:, 2].mean())),
                "S, untrained": float((plain[:, 1] - plain[:, 2]).mean() / (1 - plain[:, 2].mean())),
                "Jaccard of unrelated texts (popularity)": float(base[MAIN]),
                "kappa_J of unrelated texts above random sets (uniform)": float(uniform[2]),
                "I, prefix with its words shuffled": float((main[:, 3] - main[:, 2]).mean()),
            },
            details={
                "S": bootstrap(s).value,
                "I, uniform null": float(uniform[0] - uniform[2]),
                "S, uniform null": float(uniform[1] - uniform[2]),
                "I by active set": {v: float((above[:, n, 0] - above[:, n, 2]).mean()) for n, v in enumerate(SETS)},
                "S by active set": {v: float((above[:, n, 1] - above[:, n, 2]).mean()) for n, v in enumerate(SETS)},
                "I by layer": (observed["token"][:, MAIN, 0] - observed["token"][:, MAIN, 2]).mean(0).round(4).tolist(),
                "S by layer": (observed["token"][:, MAIN, 1] - observed["token"][:, MAIN, 2]).mean(0).round(4).tolist(),
                "I of sequence sets": float((sequence[:, 0] - sequence[:, 2]).mean()),
                "S of sequence sets": float((sequence[:, 1] - sequence[:, 2]).mean()),
            },
        )


def _quads(subject: Subject, count: int, seed: int) -> torch.Tensor:
    """Two prefixes and two continuations of four documents, from domains in turn: (count, 4, PREFIX)."""
    texts = []
    for place in PLACES:
        own = -(-count // len(PLACES))
        found = domains.windows(subject, place, min(4 * own, _most(subject, place)), PREFIX, seed=seed)
        texts.append(found[: len(found) // 4 * 4].view(-1, 4, PREFIX))
    return torch.cat([t[i : i + 1] for i in range(count) for t in texts if i < len(t)])[:count]


def _most(subject: Subject, place: str) -> int:
    """Documents of a domain that fill a window."""
    return sum(len(subject.encode(t[: 40 * PREFIX])) >= PREFIX for t in domains.documents(place))


def _one(subject: Subject, quad: torch.Tensor, thresholds: torch.Tensor) -> dict[str, np.ndarray]:
    """Jaccard of token-level sets, (sets, arms, layers), and kappa_J of them and of sequence-level ones, (arms, layers)."""
    p1, p2 = quad[0], quad[1]
    c1, c2 = quad[2, 1 : CONTINUATION + 1], quad[3, 1 : CONTINUATION + 1]
    mixed = p1.clone()
    mixed[1:] = p1[1:][torch.randperm(PREFIX - 1, generator=torch.Generator().manual_seed(0))]
    texts = torch.stack([torch.cat(t) for t in ((p1, c1), (p1, c2), (p2, c1), (p2, c2), (mixed, c2))])
    values = subject.values(texts)[:, :, PREFIX:]  # (L, 5, t, f)
    pairs = (
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
    )  # against p1 c1: c2 behind p1, c1 behind p2, c2 behind p2, c2 behind p1 mixed

    def overlap(sets: torch.Tensor, measure=jaccard) -> torch.Tensor:
        return torch.stack([measure(sets[:, a], sets[:, b]) for a, b in pairs])  # (arms, L, ...)

    found = [subject.active(values, s) for s in SHARES] + [subject.above(values, thresholds)]
    token = torch.stack([overlap(sets).mean(-1) for sets in found])
    sequence = leading(griffin_statistic(values))  # (L, 5, f)
    again = subject.values(texts[:1], batch=1)[:, 0, PREFIX:]
    same = jaccard(subject.active(values[:, 0]), subject.active(again))
    return {
        "token": token.numpy(),
        "uniform": overlap(found[MAIN], kappa).mean(-1).numpy(),
        "sequence": overlap(sequence, kappa).numpy(),
        "rounding": same.mean(-1).numpy(),
    }
