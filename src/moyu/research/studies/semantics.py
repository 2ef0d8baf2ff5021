"""Does meaning or wording drive the active set? A text against its paraphrase, its shuffled tokens and unrelated texts.

Paraphrases are generated with the same meaning and few common words, so that no embedding must judge sameness. A regression
explains kappa_J of sequence-level sets by same meaning, token overlap and difference of length. Its data are a text's
paraphrase, an unrelated text's paraphrase, and the latter with as many of the text's tokens as the paraphrase has.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moyu.research.studies import domains, paraphrases
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import Subject, leading
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, griffin_statistic, kappa

LENGTH = 160
ARMS = ("paraphrase", "shuffled", "unigram", "unrelated", "unrelated paraphrase", "matched overlap")


class Semantics(Study):
    """E2b."""

    name: ClassVar[str] = "semantics"
    claim: ClassVar[str] = "The active set of a text follows its wording, not its meaning."
    prediction: ClassVar[str] = (
        "A paraphrase with few words in common is as far from a text as an unrelated one of the same style; the same tokens in "
        "random order are close. Given token overlap, same meaning adds nothing to kappa_J."
    )
    refutation: ClassVar[str] = "Same meaning adds more than 0.02 to kappa_J at equal overlap; or overlap adds nothing."
    conditions: ClassVar = (
        Condition("meaning", "kappa_J added by the same meaning, at equal token overlap", "below", 0.02, 0.0),
        Condition("wording", "kappa_J added by full token overlap", "above", 0.0, 0.05),
        Condition("order", "kappa_J of the shuffled text less that of a paraphrase", "above", 0.0, 0.02),
    )
    controls: ClassVar = (
        Control("paraphrases differ", "mean token overlap of a text and its paraphrase", "at most", 0.5),
    )  # fmt: skip

    def observe(self, setup: Setup) -> Observed:
        count = setup.size(60, 2)
        tokens = [_pairs(setup.subject, kind, count, setup.seed) for kind in paraphrases.KINDS]

        def measure(who: Subject, label: str) -> Observed:
            rows = []
            for done, pairs in enumerate(tokens):
                setup.progress(f"paraphrases, {label}", done, len(tokens))
                rows.append(_kind(who, pairs, setup.seed))
            return {k: np.stack([r[k] for r in rows]) for k in rows[0]}

        trained = setup.part("semantics/trained", lambda: measure(setup.subject, "trained"))
        plain = setup.part("semantics/untrained", lambda: measure(setup.subject.untrained(setup.seed), "untrained"))
        return {**trained, "untrained_kappa": plain["kappa"]}

    def analyse(self, observed: Observed) -> Finding:
        value, overlap, length = observed["kappa"], observed["overlap"], observed["length"]  # (kinds, documents, arms)
        kinds = len(value)
        stacked = np.stack([value, overlap, length], axis=-1).transpose(1, 0, 2, 3)  # (documents, kinds, arms, 3)

        def coefficients(data: np.ndarray) -> np.ndarray:
            chosen = [ARMS.index(a) for a in ("paraphrase", "unrelated paraphrase", "matched overlap")]
            y, words, size = (data[:, :, chosen, i] for i in range(3))
            same = np.zeros_like(y)
            same[:, :, 0] = 1
            each = [np.broadcast_to(np.eye(kinds)[k][None, :, None], y.shape) for k in range(kinds)]
            design = np.stack([same, words, size, *each], axis=-1).reshape(-1, 3 + kinds)
            return np.linalg.lstsq(design, y.ravel(), rcond=None)[0]

        means = {a: float(value[..., i].mean()) for i, a in enumerate(ARMS)}
        order = (value[..., ARMS.index("shuffled")] - value[..., 0]).mean(0)
        return Finding(
            {
                "meaning": bootstrap(stacked, lambda d: coefficients(d)[0]),
                "wording": bootstrap(stacked, lambda d: coefficients(d)[1]),
                "order": bootstrap(order),
            },
            controls={"paraphrases differ": float(overlap[..., 0].mean())},
            nulls={
                "kappa_J of an unrelated text's paraphrase": means["unrelated paraphrase"],
                "kappa_J of it with tokens of the text put in, to a paraphrase's overlap": means["matched overlap"],
                "kappa_J of random tokens of the same frequencies": means["unigram"],
                "paraphrase less unrelated paraphrase, untrained": float(
                    (observed["untrained_kappa"][..., 0] - observed["untrained_kappa"][..., 4]).mean()
                ),
            },
            details={
                "kappa_J": means,
                "meaning, by kind": {
                    kind: float((value[k, :, 0] - value[k, :, ARMS.index("matched overlap")]).mean())
                    for k, kind in enumerate(list(paraphrases.KINDS)[:kinds])
                },
                "token overlap": {a: float(overlap[..., i].mean()) for i, a in enumerate(ARMS)},
                "paraphrase less unrelated paraphrase, by kind": {
                    kind: float((value[k, :, 0] - value[k, :, 4]).mean())
                    for k, kind in enumerate(list(paraphrases.KINDS)[:kinds])
                },
            },
            notes=("meaning is known by construction; no embedding model is used",),
        )


def _pairs(subject: Subject, kind: str, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    made = paraphrases.KINDS[kind](count, seed)
    return [(_ids(subject, a), _ids(subject, b)) for a, b in made]


def _ids(subject: Subject, text: str) -> Tensor:
    return torch.tensor([subject.bos, *subject.encode(text)[: LENGTH - 1]])


def _kind(subject: Subject, pairs: list[tuple[Tensor, Tensor]], seed: int) -> dict[str, np.ndarray]:
    """kappa_J of sequence sets, token overlap and difference of length of each text with each arm: (documents, arms)."""
    everything = torch.cat([a[1:] for a, _ in pairs])[None]
    own = [_set(subject, a) for a, _ in pairs]
    other = [_set(subject, b) for _, b in pairs]
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, list[list[float]]] = {"kappa": [], "overlap": [], "length": []}
    for i, (text, paraphrase) in enumerate(pairs):
        far = (i + 1) % len(pairs)
        mixed = torch.cat([text[:1], text[1:][torch.randperm(len(text) - 1, generator=generator)]])
        drawn = domains.unigrams(subject, everything, (1, len(text)), seed + i)[0]
        arms = [
            (paraphrase, other[i]),
            (mixed, _set(subject, mixed)),
            (drawn, _set(subject, drawn)),
            (pairs[far][0], own[far]),
            (pairs[far][1], other[far]),
        ]
        matched = _mixed_in(pairs[far][1], text, _overlap(text, paraphrase), generator)
        arms.append((matched, _set(subject, matched)))
        out["kappa"].append([float(kappa(own[i], found).mean()) for _, found in arms])
        out["overlap"].append([_overlap(text, tokens) for tokens, _ in arms])
        out["length"].append([abs(float(np.log(len(tokens) / len(text)))) for tokens, _ in arms])
    return {k: np.array(v) for k, v in out.items()}


def _set(subject: Subject, tokens: Tensor) -> Tensor:
    """Sequence-level set of every layer, (L, f)."""
    values = subject.values(tokens[None])[:, 0, 1:]
    return leading(griffin_statistic(values))


def _mixed_in(base: Tensor, source: Tensor, overlap: float, generator: torch.Generator) -> Tensor:
    """`base` with tokens of `source` at random places, until its overlap with `source` reaches `overlap`."""
    out = base.clone()
    places = torch.randperm(len(base) - 1, generator=generator) + 1
    drawn = source[1:][torch.randperm(len(source) - 1, generator=generator)]
    for place, token in zip(places, drawn, strict=False):
        if _overlap(source, out) >= overlap:
            break
        out[place] = token
    return out


def _overlap(a: Tensor, b: Tensor) -> float:
    """Jaccard of two texts' bags of tokens, without BOS."""
    size = int(max(a.max(), b.max())) + 1
    counts = [torch.bincount(t[1:], minlength=size) for t in (a, b)]
    return float(torch.minimum(*counts).sum() / torch.maximum(*counts).sum())
