"""Figure 2: do tokens of a text activate the same neurons because they share a history, or because they mean something?

{sentence, random} x {parallel, sequential}. With a cache, feeding token by token computes the same as one pass, so this panel
is an identity control. To remove history, each token is fed alone behind BOS, at its own position.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import SINK, Subject
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, flocking, jaccard, pairwise_spearman, popularity_null, singular_energy

LENGTH = 64
INPUTS = ("PAR", "SEQ-KV", "SEQ-ISO", "SEQ-ISO at position 1")
SAMPLINGS = ("sentence", "unigram", "uniform")
MEASURES = ("flocking", "Jaccard", "active in over 80 %", "singular energy", "singular energy, shuffled")
SHOWN_TOKENS, SHOWN_NEURONS = 40, 96  # of a heat map
FED = 8  # documents fed at once: on a GPU a step costs the same for all of them


class Figure2(Study):
    """Flocking in three input arms and three samplings."""

    name: ClassVar[str] = "figure2"
    claim: ClassVar[str] = "Activation patterns follow the history that is fed, not the meaning of what is fed."
    prediction: ClassVar[str] = (
        "Tokens of one sequence share active neurons when fed with their history, random tokens too; taking history away costs "
        "more flocking than taking sense away."
    )
    refutation: ClassVar[str] = "The effect of meaning is as large as that of history, or random tokens do not flock."
    conditions: ClassVar = (
        Condition(
            "history over meaning",
            "effect of history less the size of that of meaning, on flocking",
            "above",
            0.0,
            0.02,
        ),
        Condition("random tokens flock", "flocking of random tokens, with history less without", "above", 0.0, 0.02),
    )
    controls: ClassVar = (
        Control("identity", "largest difference of SEQ-KV from PAR over the largest value", "at most", 1e-3),
        Control("same sets", "Jaccard of the sets of SEQ-KV and PAR", "at least", 0.995),
    )

    def observe(self, setup: Setup) -> Observed:
        subject, count = setup.subject, setup.size(100, 2)
        texts = domains.windows(subject, "library", count, LENGTH, seed=setup.seed)
        generator = torch.Generator().manual_seed(setup.seed)
        random = torch.randint(3, int(subject.model.config.vocab_size), texts.shape, generator=generator)
        random[:, 0] = subject.bos
        samples = (texts, domains.unigrams(subject, texts, texts.shape, setup.seed), random)
        out: dict[str, Any] = {}
        for name, tokens in zip(SAMPLINGS, samples, strict=True):

            def make(who: Subject, name: str = name, tokens: Tensor = tokens, arms: Any = INPUTS) -> Observed:
                return _sampling(who, tokens, setup, name, arms)

            found = setup.part(f"figure2/{name}", lambda make=make: make(subject))
            plain = setup.untrained_part(
                f"figure2/untrained/{name}", lambda who, make=make: make(who, arms=INPUTS[::2])
            )
            out |= {f"{name}/{k}": v for k, v in found.items()} | {f"untrained/{name}/{k}": v for k, v in plain.items()}
        return out

    def analyse(self, observed: Observed) -> Finding:
        names = [s for s in SAMPLINGS if f"{s}/measures" in observed]
        table = np.stack([observed[f"{s}/measures"] for s in names])  # (samplings, documents, inputs, measures, layers)
        flock = table[:, :, :, 0].mean(3)  # (samplings, documents, inputs)
        par, iso = flock[:, :, 0], flock[:, :, 2]
        history = ((par - iso)[[0, -1]]).mean(0)
        meaning = (flock[0] - flock[-1])[:, [0, 2]].mean(1)
        interaction = (par - iso)[0] - (par - iso)[-1]
        plain = [observed[f"untrained/{s}/measures"][:, :, 0].mean((0, 2)) for s in names]
        mean = table.mean((1, 4))  # (samplings, inputs, measures)
        return Finding(
            {
                "history over meaning": bootstrap(
                    np.stack([history, meaning], axis=1), lambda d: d[:, 0].mean() - abs(d[:, 1].mean())
                ),
                "random tokens flock": bootstrap((par - iso)[-1]),
            },
            controls={
                "identity": float(max(observed[f"{s}/difference"].max() for s in names)),
                "same sets": float(min(observed[f"{s}/same"].mean() for s in names)),
            },
            nulls={
                "history, untrained": float(np.mean([p[0] - p[1] for p in (plain[0], plain[-1])])),
                "meaning, untrained": float((plain[0] - plain[-1]).mean()),
                "flocking of random sets": 0.0,
                "Jaccard of popular neurons, sentences in parallel": float(observed[f"{names[0]}/popular"][0].mean()),
            },
            details={
                "history": _spelt(history),
                "meaning": _spelt(meaning),
                "interaction": _spelt(interaction),
                "measures": {
                    s: {a: dict(zip(MEASURES, mean[i, j].round(4).tolist(), strict=True)) for j, a in enumerate(INPUTS)}
                    for i, s in enumerate(names)
                },
                "flocking, popularity null": {
                    s: dict(zip(INPUTS, _above_popularity(table[i, :, :, 1], observed[f"{s}/popular"]), strict=True))
                    for i, s in enumerate(names)
                },
                "Spearman of |a|": {
                    s: dict(zip(INPUTS, observed[f"{s}/spearman"].round(4).tolist(), strict=True)) for s in names
                },
                "flocking by layer": {
                    s: {a: table[i, :, j, 0].mean(0).round(4).tolist() for j, a in enumerate(INPUTS)}
                    for i, s in enumerate(names)
                },
                "heat maps": {
                    s: {a: _digits(observed[f"{s}/heat"][j]) for j, a in enumerate(INPUTS[:3])} for s in names
                },
                "layer of the heat maps": int(observed[f"{names[0]}/layer"]),
            },
        )


def _above_popularity(observed: np.ndarray, popular: np.ndarray) -> list[float]:
    """Jaccard (documents, inputs, layers) above sets that draw each neuron with its frequency over all documents."""
    return ((observed - popular) / (1 - popular)).mean((0, 2)).round(4).tolist()


def _spelt(values: np.ndarray) -> list[float]:
    found = bootstrap(values)
    return [round(v, 4) for v in (found.value, found.low, found.high)]


def _digits(heat: np.ndarray) -> list[str]:
    """A heat map as one string of digits per token: 0 is nothing, 9 the token's largest value."""
    return ["".join(str(int(v)) for v in row) for row in np.clip(heat * 9.999, 0, 9)]


def fed(subject: Subject, tokens: Tensor, arm: str) -> Tensor:
    """Neuron values of every token behind BOS, fed by `arm`: (B, T) -> (L, B, T - 1, f)."""
    if arm == "PAR":
        return subject.values(tokens)[:, :, 1:]
    if arm == "SEQ-KV":
        return subject.stepwise(tokens)[:, :, 1:]
    count, length = tokens.shape
    alone = torch.stack([torch.full((count, length - 1), subject.bos), tokens[:, 1:]], dim=2).view(-1, 2)
    places = torch.arange(1, length) if arm == "SEQ-ISO" else torch.ones(length - 1, dtype=torch.long)
    positions = torch.stack([torch.zeros_like(places), places], dim=1).repeat(count, 1)
    values = subject.values(alone, positions=positions, batch=512)[:, :, 1]
    return values.unflatten(1, (count, length - 1))


def _sampling(subject: Subject, tokens: Tensor, setup: Setup, name: str, arms: tuple[str, ...]) -> Observed:
    """Every measure of every document under each feeding: (documents, inputs, measures, layers)."""
    layer = len(subject.blocks) // 2
    rows: list[np.ndarray] = []
    given: list[Tensor] = []
    differences, same, heat = [], [], []
    ranks = np.zeros((len(arms),))
    few = min(len(tokens), 8)
    frequency = torch.zeros(len(arms), len(subject.blocks), subject.neurons, dtype=torch.float64)
    for i in range(len(tokens)):
        setup.progress(f"feeding, {name}", i, len(tokens))
        if i % FED == 0:
            given = [fed(subject, tokens[i : i + FED], arm)[:, :, SINK - 1 :] for arm in arms]  # BOS and sink left out
        by_arm = []
        reference: Tensor | None = None
        for j, arm in enumerate(arms):
            values = given[j][:, i % FED]  # (L, T, f)
            sets = subject.active(values)
            if arm == "PAR":
                reference = values
            if arm == "SEQ-KV" and reference is not None:
                differences.append(float((values - reference).abs().max() / reference.abs().max()))
                same.append(float(jaccard(sets, subject.active(reference)).mean()))
            frequency[j] += sets.double().mean(1) / len(tokens)
            by_arm.append(
                [
                    flocking(sets),
                    flocking(sets, null=0.0),
                    (sets.double().mean(1) > 0.8).double().mean(1),
                    singular_energy(values.abs()),
                    singular_energy(_shuffled(values.abs())),
                ]
            )
            if i < few:
                ranks[j] += np.mean([pairwise_spearman(v) for v in values.abs().numpy()]) / few
            if i == 0:
                shown = values[layer].abs()[:SHOWN_TOKENS]
                heat.append((shown / shown.amax(1, keepdim=True))[:, :SHOWN_NEURONS].numpy())
        rows.append(np.array([[m.double().numpy() for m in measures] for measures in by_arm]))
    return {
        "measures": np.stack(rows),
        "spearman": ranks,
        "popular": popularity_null(frequency).numpy(),  # (inputs, layers)
        "heat": np.stack(heat),
        "layer": np.array(layer),
        "difference": np.array(differences),
        "same": np.array(same),
    }


def _shuffled(values: Tensor) -> Tensor:
    """Shuffle the entries of each row independently. Only the distribution of values stays."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(values.shape, generator=generator).argsort(-1)
    return values.gather(-1, order)
