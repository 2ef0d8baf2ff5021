"""The origin of over-activation: decoders from scratch, at initialisation and during training.

At initialisation, removing a neuron should lower the loss in more than half of the cases, whatever the labels. During
training this force fades; the ReLU family is left with exact zeros, smooth activations with many small values but no zeros.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moyu.calibration.profiling import needed
from moyu.research.studies import tiny
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import SINK, Subject
from moyu.research.studies.tiny import Arm
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, gini_impurity, participation_ratio, sign_statistic

SERIES = ("exact zeros", "near zero", "participation", "force", "lowers the loss", "impurity", "dead", "loss")
LABELS: tuple[tiny.Labels, ...] = ("true", "permuted", "uniform")
MAIN = Arm()
SECONDARY = {  # arms without a verdict: decoders and number of seeds
    Arm(decay=0.0): (tiny.NAMES, 2),
    Arm(labels="permuted", decay=0.0): (("relu", "gelu", "silu", "swiglu"), 2),
    Arm(labels="uniform", decay=0.0): (("relu", "gelu", "silu", "swiglu"), 2),
    Arm(freeze=True): (("relu", "silu"), 2),
    Arm(noise=True): (("relu", "silu"), 2),
    Arm(rate=0.0): (("relu", "silu"), 1),
}


class RootCause(Study):
    """Section 9."""

    name: ClassVar[str] = "root_cause"
    needs: ClassVar = "nothing"
    trains: ClassVar[bool] = True
    claim: ClassVar[str] = (
        "Over-activation begins as a force at initialisation, and the activation function decides what is left of it."
    )
    prediction: ClassVar[str] = (
        "In untrained decoders the last layer's neurons raise the loss, and more than half of their activations do, with true "
        "and permuted labels alike, in proportion to the Gini law; training removes the force, leaves ReLU's family exact zeros, "
        "and smooth activations more neurons near zero."
    )
    refutation: ClassVar[str] = (
        "No force and no excess over one half in the last layer, a dependence on labels, or no growth of sparsity."
    )
    conditions: ClassVar = (
        Condition(
            "force at initialisation", "G summed over the last layer's neurons, nats per token", "above", 0.0, 0.01
        ),
        Condition("share", "share of the last layer's activations that raise the loss", "above", 0.5, 0.002),
        Condition("labels", "that share with permuted labels less with true ones", "within", 0.0, 0.01),
        Condition("gini law", "slope of dl/da on a nu (1 - |s|^2), last layer", "above", 0.0, 0.1),
        Condition("exact zeros", "exact zeros gained by training, ReLU's family", "above", 0.0, 0.05),
        Condition("near zero", "neurons not needed for CETT 0.2, gained by training, smooth", "above", 0.0, 0.05),
        Condition("stationarity", "force after training over the force at initialisation", "below", 0.5, 0.1),
    )
    controls: ClassVar = (
        Control("no zeros", "largest share of exact zeros of a smooth activation", "at most", 1e-3),
        Control("trained", "loss after training less that before, mean", "at most", -0.3),
    )

    def observe(self, setup: Setup) -> Observed:
        seeds = setup.size(5, 2)
        out = dict(setup.part("root_cause/initialisation", lambda: _at_initialisation(setup, setup.size(48, 2))))
        names = tiny.NAMES if not setup.quick else ("relu", "silu")
        plan = [(n, s, MAIN) for s in range(seeds) for n in names]
        if not setup.quick:
            plan += [(n, s, arm) for arm, (chosen, count) in SECONDARY.items() for s in range(count) for n in chosen]
        steps = setup.size(tiny.STEPS, 4)
        for done, (name, seed, arm) in enumerate(plan):
            setup.progress("training runs", done, len(plan))
            key = f"root_cause/{name}-{arm.name}-{seed}"
            run = setup.part(key, lambda n=name, s=seed, a=arm: _run(n, s, a, steps, setup))
            out[f"run/{name}/{arm.name}/{seed}"] = run["series"]
            out["steps"] = run["steps"]
        return out

    def analyse(self, observed: Observed) -> Finding:
        first = observed["share"]  # (decoders, seeds, labels, layers)
        runs: dict[tuple[str, str], list[np.ndarray]] = {}
        for key, series in observed.items():
            if key.startswith("run/"):
                _, name, arm, _ = key.split("/")
                runs.setdefault((name, arm), []).append(series)  # (logged steps, series, layers)
        last = first[..., -1]
        main = {name: np.stack(found) for (name, arm), found in runs.items() if arm == MAIN.name}

        def gained(series: str, exact: bool) -> np.ndarray:
            i = SERIES.index(series)
            per_name = [d[:, -1, i].mean(1) - d[:, 0, i].mean(1) for n, d in main.items() if (n in tiny.EXACT) == exact]
            return np.stack(per_name, axis=1).mean(1)  # (seeds,)

        force = np.stack(
            [d[:, :, SERIES.index("force"), -1] for d in main.values()], axis=1
        )  # (seeds, decoders, steps)
        zeros, loss = SERIES.index("exact zeros"), SERIES.index("loss")
        smooth = [d[:, :, zeros].max() for n, d in main.items() if n not in tiny.EXACT]
        return Finding(
            {
                "force at initialisation": bootstrap(observed["force"][:, :, 0].mean(0)),
                "share": bootstrap(last[:, :, 0].mean(0)),
                "labels": bootstrap((last[:, :, 1] - last[:, :, 0]).mean(0)),
                "gini law": bootstrap(observed["slope"].mean(0)),
                "exact zeros": bootstrap(gained("exact zeros", exact=True)),
                "near zero": bootstrap(gained("near zero", exact=False)),
                "stationarity": bootstrap(
                    np.stack([force[:, :, -1].mean(1), force[:, :, 0].mean(1)], axis=1),
                    lambda d: d[:, 0].mean() / d[:, 1].mean(),
                ),
            },
            controls={
                "no zeros": float(max(smooth)),
                "trained": float(np.mean([(d[:, -1, loss] - d[:, 0, loss]).mean() for d in main.values()])),
            },
            nulls={
                "share by chance": 0.5,
                "share, confident head": float(observed["confident"].mean()),
                "share at the usual initialisation (0.02)": float(observed["usual"].mean()),
                "share without the final norm": float(observed["bare"].mean()),
                "force without the final norm": float(observed["bare_force"].mean()),
                **_null_arms(runs),
            },
            details={
                "decoders": list(tiny.NAMES),
                "force at initialisation": dict(
                    zip(tiny.NAMES, observed["force"][:, :, 0].mean(1).round(4).tolist(), strict=True)
                ),
                "force at initialisation, permuted and uniform labels": observed["force"]
                .mean((0, 1))
                .round(4)[1:]
                .tolist(),
                "share at initialisation, last layer": dict(
                    zip(tiny.NAMES, last[:, :, 0].mean(1).round(4).tolist(), strict=True)
                ),
                "share at initialisation by layer": first[:, :, 0].mean((0, 1)).round(4).tolist(),
                "share, uniform labels": float(last[:, :, 2].mean()),
                "slope on the Gini law": dict(
                    zip(tiny.NAMES, observed["slope"].mean(1).round(3).tolist(), strict=True)
                ),
                "share without the final norm": _spelt(observed["bare"]),
                "force without the final norm": _spelt(observed["bare_force"]),
                "main arm": MAIN.name,
                "steps": observed["steps"].tolist(),
                "series": list(SERIES),
                "curves": {f"{n}, {a}": np.stack(d).mean((0, 3)).round(4).T.tolist() for (n, a), d in runs.items()},
                "seeds": {f"{n}, {a}": len(d) for (n, a), d in runs.items()},
            },
            notes=("arms other than the main one have one or two seeds and carry no verdict",),
        )


def _spelt(by_seed: np.ndarray) -> list[float]:
    """Mean over decoders and its interval over seeds: (decoders, seeds)."""
    found = bootstrap(by_seed.mean(0))
    return [found.value, found.low, found.high]


def _null_arms(runs: dict[tuple[str, str], list[np.ndarray]]) -> dict[str, float]:
    """Sparsity gained in arms without a force towards it."""
    nulls = {"learning rate 0": Arm(rate=0.0), "frozen networks": Arm(freeze=True), "random signs": Arm(noise=True)}
    out = {}
    for what, arm in nulls.items():
        found = np.stack(
            [r for (n, a), f in runs.items() if a == arm.name and n == "relu" for r in f] or [np.zeros((2, 8, 1))]
        )
        zeros = found[:, :, SERIES.index("exact zeros")].mean(2)
        out[f"exact zeros gained by relu, {what}"] = float((zeros[:, -1] - zeros[:, 0]).mean())
    return out


def _at_initialisation(setup: Setup, seeds: int) -> Observed:
    """Share of activations that raise the loss (decoders, seeds, labels, layers), and the law's slope in the last layer."""
    tokens = tiny.probe(setup.size(8, 2))
    share = np.empty((len(tiny.NAMES), seeds, len(LABELS), tiny.LAYERS))
    force = np.empty((len(tiny.NAMES), seeds, len(LABELS)))
    slope, confident, usual, bare, bare_force = (np.empty((len(tiny.NAMES), seeds)) for _ in range(5))
    for i, name in enumerate(tiny.NAMES):
        setup.progress("initialisation", i, len(tiny.NAMES))
        for seed in range(seeds):
            model = tiny.build(name, 1000 + seed)
            who = tiny.subject(name, model)
            for j, labels in enumerate(LABELS):
                values, gradients = who.saliencies(tokens, tiny.relabelled(tokens, labels, seed))
                share[i, seed, j] = _share(values, gradients)
                force[i, seed, j] = _force(values, gradients)
                if labels == "true":
                    slope[i, seed] = _slope(who, tokens, values[-1], gradients[-1])
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(40.0)  # pyright: ignore  # tied: norms undo it at the input
            confident[i, seed] = _share(*who.saliencies(tokens))[-1]
            without = tiny.without_final_norm(tiny.build(name, 1000 + seed))
            values, gradients = tiny.subject(name, without).saliencies(tokens)
            bare[i, seed] = _share(values, gradients)[-1]
            bare_force[i, seed] = _force(values, gradients)
            plain = tiny.build(name, 1000 + seed)
            with torch.no_grad():
                for parameter in plain.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(0.02 * parameter.shape[1] ** 0.5)
            usual[i, seed] = _share(*tiny.subject(name, plain).saliencies(tokens))[-1]
    return {
        "bare": bare,
        "bare_force": bare_force,
        "share": share,
        "force": force,
        "slope": slope,
        "confident": confident,
        "usual": usual,
    }


def _share(values: Tensor, gradients: Tensor) -> np.ndarray:
    """Share of the counted activations with a dl/da > 0, by layer."""
    effect = (values * gradients)[:, :, SINK:-1].flatten(1)
    return ((effect > 0).sum(1) / (effect != 0).sum(1).clamp(min=1)).numpy()


def _force(values: Tensor, gradients: Tensor) -> float:
    """G summed over the last layer's neurons, over scored tokens: (L, B, T, f) each."""
    a, g = (x[-1, :, SINK:-1].flatten(0, 1) for x in (values, gradients))
    return float(sign_statistic(a, g).sum())


def _slope(who: Subject, tokens: Tensor, values: Tensor, gradients: Tensor) -> float:
    """Least squares slope of dl/da on a nu (1 - |s|^2), nu the variance of the neuron's logits: (B, T, f) each."""
    with torch.no_grad():
        logits = who.model(input_ids=tokens, use_cache=False).logits[:, SINK:-1]
        impurity = gini_impurity(logits.softmax(-1))[..., None]
        readout = who.model.get_output_embeddings().weight @ who.blocks[-1].pieces["down"].weight
        law = values[:, SINK:-1] * readout.var(0) * impurity
    x, y = law.flatten().double(), gradients[:, SINK:-1].flatten().double()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum().clamp(min=1e-30))


def _run(name: str, seed: int, arm: Arm, steps: int, setup: Setup) -> Observed:
    """One training run: the logged steps, and (logged steps, series, layers)."""
    tokens = tiny.probe()
    logged: list[int] = []
    series: list[np.ndarray] = []

    def watch(step: int, model: torch.nn.Module) -> None:
        logged.append(step)
        series.append(measure(tiny.subject(name, model), tokens))  # pyright: ignore[reportArgumentType]

    model = tiny.train(name, seed, arm, steps=steps, watch=watch)
    if arm == MAIN and setup.cache is not None and not setup.quick:
        tiny.keep(setup.cache / "tiny" / f"{name}-seed{seed}-steps{steps}", model)
    return {"steps": np.array(logged), "series": np.stack(series)}


def measure(who: Subject, tokens: Tensor) -> np.ndarray:
    """Every series of every layer: (series, layers)."""
    values, gradients = who.saliencies(tokens)
    values, gradients = values[:, :, SINK:-1].flatten(1, 2), gradients[:, :, SINK:-1].flatten(1, 2)  # (L, N, f)
    with torch.no_grad():
        logits = who.model(input_ids=tokens.to(who.model.device), use_cache=False).logits[:, SINK:-1]
        impurity = float(gini_impurity(logits.softmax(-1)).mean())
        loss = float(who.losses(tokens).mean())
    rows = []
    for block, a, g in zip(who.blocks, values, gradients, strict=True):
        some = a[:: max(1, len(a) // 32)]
        rows.append([
            float((a == 0).float().mean()),
            1 - float(needed(some, block.pieces["down"].weight.detach().cpu()).mean()),
            float(participation_ratio(a).mean()),
            float(sign_statistic(a, g).sum()),
            float((a * g > 0).sum() / (a * g != 0).sum().clamp(min=1)),
            impurity,
            float((a == 0).all(0).float().mean()),
            loss,
        ])  # fmt: skip
    return np.array(rows).T
