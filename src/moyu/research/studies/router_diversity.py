"""Does a diverse history hurt a router, and more so without ReLU?

Routers (d -> r -> f) are fitted on activations from 1, 2, 4 or 8 domains, with cross-entropy on the top twentieth of neurons,
so that all activation functions have the same base rate. They are tested on unseen documents of the first domain and of a
domain that none was fitted on. Two budgets: equal tokens in total, or equal tokens of the tested domain. ReLU and GELU of the
zoo differ in nothing else; plain SiLU, GELU and ReLU are compared on small decoders of five seeds.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moyu.measure.statistics import Interval
from moyu.methods import routers
from moyu.methods.deja_vu import DejaVu
from moyu.research.studies import domains, tiny
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import SINK, Subject, leading
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, cett, mixed_model, top_sets

HISTORY = ("library", "docstrings", "json", "headers", "manuals", "arithmetic", "tables", "logs")
UNSEEN = "symbolic"
DIVERSITY = (1, 2, 4, 8)
BUDGETS = ("total tokens fixed", "in-domain tokens fixed")
METRICS = ("recall", "AUROC", "captured mass", "relative error")
CONTROLS = ("rank x 2", "rank x 4", "shuffled labels", "popularity")
RANK, LENGTH = 32, 96
SHARE = 0.05  # of neurons to predict: fewer than are active with ReLU, so that base rates are equal
TRIO = ("relu", "gelu", "silu")


class RouterDiversity(Study):
    """E1a."""

    name: ClassVar[str] = "router_diversity"
    needs: ClassVar = "matched models"
    claim: ClassVar[str] = (
        "A router learnt from a more diverse history foresees the present worse, most of all without ReLU."
    )
    prediction: ClassVar[str] = (
        "Recall of the top twentieth falls with every doubling of the domains at equal tokens, and falls faster with GELU, and "
        "with plain SiLU, than with ReLU."
    )
    refutation: ClassVar[str] = (
        "A slope, or a difference of slopes, whose interval excludes a loss of one point a doubling."
    )
    conditions: ClassVar = (
        Condition("diversity", "recall a doubling of domains, smooth plain model", "below", 0.0, 0.01),
        Condition("GELU", "that slope less ReLU's, matched models of the zoo", "below", 0.0, 0.01),
        Condition("SiLU", "slope of plain SiLU less ReLU's, small decoders", "below", 0.0, 0.01),
    )
    controls: ClassVar = (
        Control("learns", "recall of the router less that of the popularity mask, one domain", "at least", 0.0),
        Control("labels matter", "recall of the router less that of one with shuffled labels", "at least", 0.05),
    )

    def observe(self, setup: Setup) -> Observed:
        out: dict[str, np.ndarray] = {}
        for name in [m.strip() for m in str(setup.model).split(",")]:
            found = setup.part(f"router_diversity/{name}", lambda name=name: _subject(Subject.open(name), setup, name))
            out |= {f"zoo/{name}/{k}": v for k, v in found.items()}
        folder = None if setup.cache is None else setup.cache / "tiny"
        steps = setup.size(tiny.STEPS, 4)
        for seed in range(setup.size(5, 2)):
            for name in TRIO if not setup.quick else TRIO[::2]:
                key = f"router_diversity/tiny-{name}-{seed}"

                def make(name: str = name, seed: int = seed) -> Observed:
                    return _subject(
                        tiny.checkpoint(folder, name, seed, steps), setup, f"tiny {name} {seed}", small=True
                    )

                out |= {f"tiny/{name}/{seed}/{k}": v for k, v in setup.part(key, make).items()}
        return out

    def analyse(self, observed: Observed) -> Finding:
        zoo = {k.split("/")[1]: v for k, v in observed.items() if k.startswith("zoo/") and k.endswith("/grades")}
        seeds: dict[str, list[np.ndarray]] = {}
        for key, value in observed.items():
            if key.startswith("tiny/") and key.endswith("/grades"):
                seeds.setdefault(key.split("/")[1], []).append(value)
        slopes = {m: _slopes(g[:, 0, :, 0, 0]) for m, g in zoo.items()}  # by document
        estimates: dict[str, Interval] = {}
        smooth = next((m for m in ("gelu", *zoo) if m in zoo and m != "relu"), None)
        if smooth is not None:
            estimates["diversity"] = bootstrap(slopes[smooth])
        if {"relu", "gelu"} <= zoo.keys():
            estimates["GELU"] = bootstrap(slopes["gelu"] - slopes["relu"])
        by_seed = {n: np.array([_slopes(g[:, 0, :, 0, 0]).mean() for g in found]) for n, found in seeds.items()}
        if {"relu", "silu"} <= by_seed.keys():
            estimates["SiLU"] = bootstrap(by_seed["silu"] - by_seed["relu"])
        grades = np.concatenate([g for g in zoo.values()])  # (documents, budgets, diversity, texts, metrics)
        others = np.concatenate([v for k, v in observed.items() if k.startswith("zoo/") and k.endswith("/controls")])
        one = float(grades[:, 0, 0, 0, 0].mean())
        details = {
            "recall by domains": {m: _table(g, 0) for m, g in zoo.items()},
            "recall by domains, small decoders": {n: _table(np.concatenate(g), 0) for n, g in seeds.items()},
            "slope": {m: _spelt(bootstrap(s)) for m, s in slopes.items()},
            "slope, in-domain tokens fixed": {m: _spelt(bootstrap(_slopes(g[:, 1, :, 0, 0]))) for m, g in zoo.items()},
            "slope, unseen domain": {m: _spelt(bootstrap(_slopes(g[:, 0, :, 1, 0]))) for m, g in zoo.items()},
            "slope, small decoders": {n: _spelt(bootstrap(s)) for n, s in by_seed.items()},
            "AUROC": {m: _table(g, 1) for m, g in zoo.items()},
            "captured mass": {m: _table(g, 2) for m, g in zoo.items()},
            "relative error": {m: _table(g, 3) for m, g in zoo.items()},
        }
        if {"relu", "gelu"} <= zoo.keys():
            details["mixed model, interaction of doubling and GELU"] = _mixed(observed)
        return Finding(
            estimates,
            controls={"learns": one - float(others[:, 3].mean()), "labels matter": one - float(others[:, 2].mean())},
            nulls={
                "recall by chance": SHARE,
                **{f"recall, {name}, one domain": float(others[:, i].mean()) for i, name in enumerate(CONTROLS)},
            },
            details=details,
            notes=("swiglu is matched to no other model: its row is no contrast of activation functions",),
        )


def _slopes(recall: np.ndarray) -> np.ndarray:
    """Least squares slope of recall on log2 of the number of domains, by document: (documents, diversity) -> (documents,)."""
    x = np.log2(DIVERSITY) - np.log2(DIVERSITY).mean()
    return recall @ x / (x @ x)


def _table(grades: np.ndarray, metric: int) -> dict[str, list[float]]:
    mean = grades[..., metric].mean(0).round(4)  # (budgets, diversity, texts)
    return {
        f"{budget}, {text}": mean[b, :, t].tolist()
        for b, budget in enumerate(BUDGETS)
        for t, text in enumerate(("same domain", "unseen domain"))
    }


def _spelt(found: Interval) -> list[float]:
    return [round(v, 4) for v in (found.value, found.low, found.high)]


def _mixed(observed: Observed) -> list[float] | str:
    """recall ~ log2 domains x activation with random documents, layers and router seeds: estimate and interval."""
    columns: dict[str, list[float]] = {k: [] for k in ("recall", "doublings", "gelu", "document", "layer", "seed")}
    for flag, name in enumerate(("relu", "gelu")):
        each = observed[f"zoo/{name}/each"]  # (seeds, layers, diversity, documents)
        for (seed, layer, d, document), recall in np.ndenumerate(each):
            row = (float(recall), np.log2(DIVERSITY[d]), flag, document, layer, seed)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(float(value))
    try:
        effects = mixed_model("recall ~ doublings * gelu", columns, "document", ["layer", "seed"])
    except np.linalg.LinAlgError:
        return "not identified by so few rows"
    return _spelt(effects["doublings:gelu"])


def _subject(subject: Subject, setup: Setup, name: str, *, small: bool = False) -> Observed:
    """Grades of every router: (documents, budgets, diversity, texts, metrics), means over layers and seeds; and controls."""
    documents, rows = setup.size(24, 3), setup.size(1024, 64)
    per_domain = -(-rows // (LENGTH - SINK))
    layers = sorted({0, len(subject.blocks) // 2, len(subject.blocks) - 1})[: 1 if setup.quick else 3]
    seeds = 1 if setup.quick or small else 3
    texts = {"same": domains.windows(subject, HISTORY[0], documents, LENGTH, seed=setup.seed)}
    texts["unseen"] = domains.windows(subject, UNSEEN, documents, LENGTH, seed=setup.seed)
    history = {
        d: domains.windows(subject, d, per_domain, LENGTH, skip=80 if d == HISTORY[0] else 0, seed=setup.seed)
        for d in HISTORY
    }
    seen = {k: _rows(subject, t, layers) for k, t in {**texts, **history}.items()}
    grades = np.zeros((documents, 2, len(DIVERSITY), 2, len(METRICS)))
    controls = np.zeros((documents, len(CONTROLS)))
    each = np.zeros((seeds, len(layers), len(DIVERSITY), documents))
    done, total = 0, seeds * len(layers) * (2 * len(DIVERSITY) + len(CONTROLS))
    share = 1 / (seeds * len(layers))
    for seed in range(seeds):
        for at, layer in enumerate(layers):
            fit = _Fit(subject, layer, at, seen, documents, seed)
            for b in range(2):
                for d, count in enumerate(DIVERSITY):
                    setup.progress(f"routers, {name}", done, total)
                    done += 1
                    each_domain = rows // count if b == 0 else rows // 2
                    router = fit.router(HISTORY[:count], each_domain)
                    for t, text in enumerate(("same", "unseen")):
                        found = fit.grades(router, text)
                        grades[:, b, d, t] += found * share
                        if b == 0 and t == 0:
                            each[seed, at, d] = found[:, 0]
            for c, kind in enumerate(CONTROLS):
                setup.progress(f"routers, {name}", done, total)
                done += 1
                controls[:, c] += fit.control(kind, rows) * share
    return {"grades": grades, "controls": controls, "each": each}


def _rows(subject: Subject, tokens: Tensor, layers: list[int]) -> tuple[Tensor, Tensor]:
    """Network inputs and oracle scores behind the sink: (layers, B, T, d) and (layers, B, T, f)."""
    inputs = subject.values(tokens, tap="mlp_in")[layers][:, :, SINK:]
    values = subject.values(tokens)[layers][:, :, SINK:]
    norms = torch.stack([subject.column_norms[l] for l in layers])
    return inputs, values * norms[:, None, None]


class _Fit:
    """Fits and grades routers of one layer."""

    def __init__(self, subject: Subject, layer: int, at: int, seen: dict, documents: int, seed: int) -> None:
        self.block, self.at, self.seen, self.documents, self.seed = subject.blocks[layer], at, seen, documents, seed
        self.norms = subject.column_norms[layer]
        self.k = round(SHARE * self.block.neurons)

    def data(self, names: tuple[str, ...], each: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of `each` tokens of every domain."""
        inputs = torch.cat([self.seen[n][0][self.at].flatten(0, 1)[:each] for n in names])
        scores = torch.cat([self.seen[n][1][self.at].flatten(0, 1)[:each] for n in names])
        return inputs, leading(scores.abs(), SHARE)

    def router(self, names: tuple[str, ...], each: int, rank: int = RANK, mixed: bool = False) -> torch.nn.Module:
        """A trained router. mixed: trained on the labels of other tokens."""
        inputs, labels = self.data(names, each)
        if mixed:
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))]
        method = DejaVu(rank=rank)
        (site,) = method.sites(self.block)
        made = method.router(site, inputs.shape[1])
        with torch.no_grad():  # seeds of the study on top of the method's own start
            generator = torch.Generator().manual_seed(1000 + self.seed)
            for parameter in made.parameters():
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        return routers.train(made, inputs, labels, torch.ones_like(labels, dtype=torch.float32))

    def grades(self, router: torch.nn.Module, text: str) -> np.ndarray:
        """(documents, metrics)."""
        inputs, scores = (s[self.at] for s in self.seen[text])
        return np.stack([self._grade(router(i), s) for i, s in zip(inputs, scores, strict=True)])

    def _grade(self, logits: Tensor, scores: Tensor) -> np.ndarray:
        found = routers.grade(logits, scores.abs(), self.k)
        down = self.block.pieces["down"].weight.detach().float()
        error = cett(scores / self.norms.clamp(min=1e-12), down, ~top_sets(logits, self.k))
        return np.array([found.recall, found.auroc, found.captured, float(error.mean())])

    def control(self, kind: str, rows: int) -> np.ndarray:
        """Recall by document of a control, fitted on the first domain alone."""
        names = HISTORY[:1]
        if kind == "popularity":
            _, labels = self.data(names, rows)
            popular = labels.float().mean(0)
            return np.array([self._grade(popular.expand(len(s), -1), s)[0] for s in self.seen["same"][1][self.at]])
        rank = {"rank x 2": 2 * RANK, "rank x 4": 4 * RANK}.get(kind, RANK)
        return self.grades(self.router(names, rows, rank, mixed=kind == "shuffled labels"), "same")[:, 0]
