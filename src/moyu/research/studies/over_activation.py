"""Over-activation: how few neurons a token needs, how few are enough with one fixed set, and how many raise the loss.

rho_dyn(delta) is the least active fraction of an input-dependent mask (the oracle's) with a loss within 1 + delta of dense.
rho_stat(delta) is the same for one fixed mask (the neurons that calibration text used most). The difference is what only
dynamic activation can gain. Uplift is the share of active neurons whose removal lowers the loss to first order.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moyu import methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.measure.windows import Windows
from moyu.methods.random import uniform
from moyu.methods.selection import keep_count, top_k
from moyu.methods.values import Rows, Site
from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import SINK, Subject
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, uplift_share

TOLERANCE = 0.01  # delta
KEPT = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
ARMS = ("dynamic", "static", "random")
LENGTH = 128


class OverActivation(Study):
    """Section 1: rho_dyn, rho_stat and uplift."""

    name: ClassVar[str] = "over_activation"
    claim: ClassVar[str] = (
        "A trained model activates far more neurons than a token needs, and many of them raise the loss."
    )
    prediction: ClassVar[str] = (
        "At 1 % more loss an input-dependent mask drops more than half of the neurons; one fixed mask drops at least a tenth "
        "fewer; and more than half of the active neurons raise the loss to first order."
    )
    refutation: ClassVar[str] = (
        "Most neurons are needed; or a fixed mask does as well, so that nothing is dynamic; or removals that lower the loss "
        "are no more frequent than chance."
    )
    conditions: ClassVar = (
        Condition("over-activation", "1 - rho_dyn: neurons that a token can do without", "above", 0.5, 0.05),
        Condition("dynamic part", "rho_stat - rho_dyn: what no fixed mask can drop", "above", 0.0, 0.1),
        Condition("uplift", "share of active neurons whose removal lowers the loss", "above", 0.5, 0.01),
    )
    controls: ClassVar = (
        Control("all kept", "largest change of a document's loss when every neuron is kept", "at most", 1e-4),
    )  # fmt: skip

    def observe(self, setup: Setup) -> Observed:
        subject = setup.subject
        count = setup.size(64, 4)
        tokens = domains.windows(subject, "library", count, LENGTH, seed=setup.seed)
        history = domains.windows(subject, "library", setup.size(48, 16), LENGTH, skip=count, seed=setup.seed)
        kept = KEPT if not setup.quick else KEPT[1::4]
        losses = setup.part(
            "over_activation/losses", lambda: {"losses": _losses(subject, tokens, history, kept, setup)}
        )
        uplift = setup.part("over_activation/uplift", lambda: _uplifts(subject, tokens))
        return {**losses, **uplift, "kept": kept}

    def analyse(self, observed: Observed) -> Finding:
        losses, kept = observed["losses"], observed["kept"]  # (documents, arms, levels)

        def gap(data: np.ndarray) -> float:
            return least(data[:, 1], kept) - least(data[:, 0], kept)

        estimates = {
            "over-activation": bootstrap(losses, lambda d: 1 - least(d[:, 0], kept)),
            "dynamic part": bootstrap(losses, gap),
            "uplift": bootstrap(observed["uplift"].mean(1)),
        }
        dense = losses[:, 0, -1]
        means = losses.mean(0)
        return Finding(
            estimates,
            controls={"all kept": float(np.abs(losses[:, :, -1] - observed["dense"][:, None]).max())},
            nulls={
                "rho of random masks": least(losses[:, 2], kept),
                "uplift share by chance": 0.5,
                "uplift share, permuted labels": float(observed["uplift_permuted"].mean()),
                "uplift share, untrained": float(observed["uplift_untrained"].mean()),
            },
            details={
                "rho_dyn": least(losses[:, 0], kept),
                "rho_stat": least(losses[:, 1], kept),
                "kept": kept.tolist(),
                "loss over dense": {arm: (means[i] / dense.mean()).round(4).tolist() for i, arm in enumerate(ARMS)},
                "uplift by layer": observed["uplift"].mean(0).round(4).tolist(),
            },
            notes=("rho_stat is that of the most used neurons: the best fixed mask may need fewer",),
        )


def least(losses: np.ndarray, kept: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """The least kept fraction above which the mean loss stays within 1 + tolerance of the loss at the largest fraction.

    losses (documents, levels) at ascending kept fractions (levels,); linear between levels.
    """
    excess = losses.mean(0) / losses[:, -1].mean() - 1 - tolerance
    above = np.nonzero(excess > 0)[0]
    if not len(above):
        return float(kept[0])
    i = int(above[-1])
    return float(kept[i] + (kept[i + 1] - kept[i]) * excess[i] / (excess[i] - excess[i + 1]))


def masked_losses(subject: Subject, tokens: Tensor, choose, *, prompt: int = 0, batch: int = 16) -> np.ndarray:
    """Loss of each document when `choose(layer index, oracle scores (N, f), rows) -> (N, f) bool` masks every layer.

    Scores and rows are on the model's device. Positions before `prompt` are dense and not scored.
    """
    windows = Windows(tokens[:2, :32], 1)
    plan = calibrate(subject.model, methods.method("oracle"), windows, sparsity=0.5, anatomy=subject.anatomy)
    order = {b.layer: i for i, b in enumerate(subject.blocks)}

    def chooser(site: Site, mask: Tensor, rows: Rows, oracle) -> Tensor:
        return choose(order[site.layer], oracle(), rows)

    out = []
    with torch.no_grad(), Applied(subject.model, plan, engine="mask", anatomy=subject.anatomy, check=False) as applied:
        for part in tokens.split(batch):
            with applied.prompt(prompt), applied.watched(chooser=chooser):
                out.append(subject.losses(part, first=max(prompt, SINK)))
    return torch.cat(out).numpy()


def popularity(subject: Subject, history: Tensor) -> Tensor:
    """Mean oracle score of every neuron over some texts, sink positions left out: (L, f)."""
    return subject.scores(subject.values(history)[:, :, SINK:]).mean((1, 2))


def _losses(subject: Subject, tokens: Tensor, history: Tensor, kept: np.ndarray, setup: Setup) -> np.ndarray:
    popular = popularity(subject, history).to(subject.model.device)
    out = np.empty((len(tokens), len(ARMS), len(kept)))
    for level, share in enumerate(kept):
        setup.progress("masked passes", level, len(kept))

        def choose(layer: int, scores: Tensor, rows: Rows, arm: str, share: float = float(share)) -> Tensor:
            counts = torch.full((len(scores),), keep_count(scores.shape[1], 1 - share), device=scores.device)
            if arm == "static":
                return top_k(popular[layer][None], counts[:1]).expand(len(scores), -1)
            if arm == "random":
                site = Site(layer, "mid", "columns", ("down",), scores.shape[1], 0)
                scores = uniform(setup.seed, site, rows.pos, scores.shape[1])
            return top_k(scores, counts)

        for i, arm in enumerate(ARMS):
            out[:, i, level] = masked_losses(subject, tokens, lambda l, s, r, arm=arm: choose(l, s, r, arm))
    return out


def _uplifts(subject: Subject, tokens: Tensor) -> Observed:
    generator = torch.Generator().manual_seed(0)
    mixed = tokens.flatten()[torch.randperm(tokens.numel(), generator=generator)].view(tokens.shape)
    arms = {
        "uplift": (subject, None),
        "uplift_permuted": (subject, mixed),
        "uplift_untrained": (subject.untrained(), None),
    }
    out: dict[str, np.ndarray] = {}
    for name, (who, labels) in arms.items():
        rows = []
        for i in range(0, len(tokens), 4):
            values, gradients = who.saliencies(tokens[i : i + 4], None if labels is None else labels[i : i + 4])
            share = uplift_share(values[:, :, SINK:-1], gradients[:, :, SINK:-1], dim=(2, 3))
            rows.append(share.t().numpy())
        out[name] = np.concatenate(rows)  # (documents, layers)
    with torch.no_grad():
        out["dense"] = torch.cat([subject.losses(part) for part in tokens.split(16)]).numpy()
    return out
