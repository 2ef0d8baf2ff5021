"""Observations whose answer is known: for every study one that must hold, one that must fail, one too noisy to tell.

Each builder takes the effects to put in and the noise around them; documents are rows, as in the studies themselves.
"""

from __future__ import annotations

import numpy as np

from moyu.research.studies import domains, figure2, root_cause, router_diversity, semantics, tiny
from moyu.research.studies import inertia as inertia_study

N, LAYERS = 40, 3


def _rng():
    return np.random.default_rng(0)


def texts(gap, noise):
    count = len(domains.DOMAINS)
    bits = np.full((count, count, N), 4.0) + gap + noise * _rng().normal(size=(count, count, N))
    bits[np.arange(count), np.arange(count)] = 4.0
    return {"bits": bits}


def theorem(agreement, noise):
    cells = 100
    sign = np.resize([1.0, -1.0], cells)
    mean = sign.copy()
    mean[: round(cells * (1 - agreement))] *= -1
    law = np.ones((20, 4))
    measured = law + 0.01 * _rng().normal(size=law.shape)
    return {"mean": mean, "error": np.full(cells, noise), "sign": sign, "measured": measured, "law": law}


def over_activation(dropped, noise, uplift=0.55):
    """A step: the loss is dense's from 1 - dropped on, and static masks need three tenths more."""
    kept = np.linspace(0.05, 1.0, 20)
    base = 3.0 + 0.1 * _rng().normal(size=(N, 1))
    losses = np.empty((N, 3, len(kept)))
    for arm, need in enumerate((1 - dropped, min(1.0, 1 - dropped + 0.3), 1.0)):
        step = 1 / (1 + np.exp(-80 * (need - kept)))
        losses[:, arm] = base + step + noise * _rng().normal(size=(N, 1)) * step
    losses[:, :, -1] = base
    share = uplift + 0.01 * _rng().normal(size=(N, LAYERS)) + noise * _rng().normal(size=(N, 1))
    chance = np.full((N, LAYERS), 0.5)
    return {
        "losses": losses,
        "kept": kept,
        "uplift": share,
        "uplift_permuted": chance,
        "uplift_untrained": chance,
        "dense": base[:, 0],
    }


def router_diversity_(slopes, noise):
    """slopes: recall a doubling for relu, gelu, silu."""
    doublings = np.log2(router_diversity.DIVERSITY)
    out = {}
    for seed, (name, slope) in enumerate(zip(("relu", "gelu", "silu"), slopes, strict=True)):
        rng = np.random.default_rng(seed)
        grades = np.full((N, 2, 4, 2, 4), 0.6) + slope * doublings[:, None, None]
        own = noise * rng.normal(size=(N, 1, 1, 1, 1)) * doublings[:, None, None]
        if name != "silu":
            out[f"zoo/{name}/grades"] = grades + own
            out[f"zoo/{name}/controls"] = np.full((N, 4), 0.4)
            each = (grades + own)[:, 0, :, 0, 0].T + 0.01 * rng.normal(size=(2, 2, 4, N))
            out[f"zoo/{name}/each"] = each
        if name != "gelu":
            for number in range(5):
                tilt = noise * rng.normal() * doublings[:, None, None]
                out[f"tiny/{name}/{number}/grades"] = grades + tilt
    return out


def prefix_swap(share, noise, fade=0.2):
    rng = _rng()
    offset = np.linspace(1, 0, 32)
    kappa = 0.8 - fade * offset + noise * rng.normal(size=(N, 1, 1)) * offset + 0.005 * rng.normal(size=(N, LAYERS, 32))
    return {
        "kappa": kappa,
        "kappa_floor": np.ones((N, LAYERS, 32)),
        "kappa_mixed": kappa,
        "by_share": np.full((N, 3), 0.8),
        "share": share + noise * rng.normal(size=(N, 1)) + 0.005 * rng.normal(size=(N, LAYERS)),
        "share_floor": np.zeros((N, LAYERS)),
        "untrained_kappa": kappa,
        "untrained_share": np.zeros((N, LAYERS)),
    }


def importance(common, noise):
    """Weights' importance is one pattern for all domains to the degree `common`; `noise` blurs each document."""
    rng = _rng()
    kinds, documents, weights = 4, 12, 60
    shared, own = rng.normal(size=(1, 1, 1, weights)), rng.normal(size=(kinds, 1, 1, weights))
    pattern = np.exp(common * shared + (1 - common) * own + 0 * np.zeros((kinds, 1, LAYERS, weights)))
    steps = pattern * np.exp(noise * rng.normal(size=(kinds, documents, LAYERS, weights)))
    return {"snip": steps, "taylor": steps, "untrained": steps}


def inertia(prefix, content, noise):
    rng = _rng()
    base = np.array([0.4 + prefix, 0.4 + content, 0.4, 0.4 + prefix])
    size = (N, len(inertia_study.SETS), 4, LAYERS)
    token = base[:, None] + noise * rng.normal(size=size) + 0.002 * rng.normal(size=size)
    return {
        "token": token,
        "uniform": token[:, 1],
        "sequence": token[:, 1],
        "rounding": np.ones((N, LAYERS)),
        "untrained_token": np.full(size, 0.4),
    }


def semantics_(meaning, noise):
    rng = _rng()
    overlap = np.empty((3, N, len(semantics.ARMS)))
    overlap[:] = [0.2, 1.0, 0.4, 0.4, 0.05, 0.2]
    overlap += 0.02 * rng.random(overlap.shape)
    value = 0.1 + 0.5 * overlap + 0.003 * rng.normal(size=overlap.shape)
    value[..., 0] += meaning + noise * rng.normal(size=(3, N))
    return {"kappa": value, "overlap": overlap, "length": 0.1 * rng.random(overlap.shape), "untrained_kappa": value}


def decay(own, noise):
    """own: what the own prompt's mask and set have over another's."""
    rng = _rng()
    other = 1.0 + 0.01 * rng.normal(size=N)
    losses = np.stack([other - own + noise * rng.normal(size=N), *[other] * 4, other + 2, other - 3], axis=1)
    kappa = np.empty((N, 2, 96))
    kappa[:, 1] = 0.2
    kappa[:, 0] = 0.2 + own * 0.98 ** (np.arange(96) / 8) + noise * rng.normal(size=(N, 1))
    return {"losses": losses + 2, "dense": np.full(N, 2.0), "kappa": kappa, "untrained_kappa": kappa[:, ::-1]}


def dominance(excess, noise):
    rng = _rng()
    change = 0.2 + 0.005 * rng.normal(size=(N, 4, LAYERS)) + noise * rng.normal(size=(N, 4, 1))
    change[:, :2] += excess
    return {"change": change, "untrained_change": change}


def figure1(families):
    return {"method": np.array([f"method-{i}" for i in range(len(families))]), "family": np.array(families)}


def figure2_(history, meaning, noise):
    rng = _rng()
    out = {}
    for i, name in enumerate(figure2.SAMPLINGS):
        level = 0.2 + meaning * (i == 0)
        measures = np.full((N, 4, len(figure2.MEASURES), LAYERS), level)
        measures[:, :2, 0] += history + noise * rng.normal(size=(N, 1, 1))
        measures[:, :, 0] += 0.002 * rng.normal(size=(N, 4, LAYERS))
        out[f"{name}/measures"] = measures
        out[f"{name}/popular"] = np.full((4, LAYERS), 0.2)
        out[f"{name}/spearman"] = np.zeros(4)
        out[f"{name}/heat"] = np.linspace(0, 1, 24).reshape(1, 4, 6).repeat(3, 0)
        out[f"{name}/layer"] = np.array(1)
        out[f"{name}/difference"] = np.zeros(N)
        out[f"{name}/same"] = np.ones(N)
        out[f"untrained/{name}/measures"] = measures[:, ::2]
    return out


def decoding(prompt, strategy, noise):
    rng = _rng()
    by_prompt, by_strategy = np.array([prompt, 0, 0]), np.array([strategy, 0, 0, 0, 0])
    flock = 0.3 + by_prompt[:, None] + by_strategy + 0.005 * rng.normal(size=(N, 3, 5))
    flock = flock + noise * rng.normal(size=(N, 1, 1)) * (by_prompt[:, None] > 0)
    return {"flock": flock, "distinct": rng.random((N, 3, 5)), "differ": np.array([0.9]), "real": np.full(N, 0.3)}


def root_cause_(force, noise, zeros=0.3):
    rng = _rng()
    names, seeds, steps = tiny.NAMES, 12, np.array([0, 1, 2, 4])
    out = {
        "share": 0.5 + force / 4 + 0.0005 * rng.normal(size=(len(names), seeds, 3, tiny.LAYERS)),
        "force": force
        + noise * np.linspace(-1, 1, seeds)[None, :, None]
        + 0.001 * rng.normal(size=(len(names), seeds, 3)),
        "slope": force * 10 + 0.01 * rng.normal(size=(len(names), seeds)),
        "confident": np.full((len(names), seeds), 0.5),
        "usual": np.full((len(names), seeds), 0.5),
        "bare": np.full((len(names), seeds), 0.52),
        "bare_force": np.full((len(names), seeds), 0.2),
        "steps": steps,
    }
    index = {s: i for i, s in enumerate(root_cause.SERIES)}
    for name in names:
        for seed in range(5):
            run = np.zeros((len(steps), len(index), tiny.LAYERS))
            run[:, index["force"]] = np.array([0.1, 0.05, 0.01, 0.0])[:, None] * (1 + 0.01 * rng.normal())
            run[:, index["loss"]] = np.array([5.0, 4.0, 3.0, 2.5])[:, None]
            grown = np.linspace(0, zeros, 4)[:, None] * (1 + 0.01 * rng.normal())
            run[:, index["near zero"]] = 0.4 + grown
            run[:, index["exact zeros"]] = grown * (name in tiny.EXACT)
            out[f"run/{name}/{root_cause.MAIN.name}/{seed}"] = run
    return out


CASES = {  # study -> what must hold, fail, and stay open
    "texts": (texts(0.5, 0.1), texts(0.02, 0.02), texts(0.15, 0.8)),
    "theorem": (theorem(1.0, 0.01), theorem(0.7, 0.01), theorem(1.0, 0.8)),
    "root_cause": (root_cause_(0.1, 0.01), root_cause_(0.0, 0.001, zeros=0.0), root_cause_(0.1, 1.0)),
    "over_activation": (over_activation(0.8, 0.0), over_activation(0.2, 0.0, 0.5), over_activation(0.8, 0.2)),
    "router_diversity": (
        router_diversity_((-0.01, -0.04, -0.04), 0.002),
        router_diversity_((0.0, 0.0, 0.0), 0.002),
        router_diversity_((-0.01, -0.04, -0.04), 0.3),
    ),
    "prefix_swap": (prefix_swap(0.2, 0.01), prefix_swap(0.0, 0.005), prefix_swap(0.1, 2.0)),
    "importance": (importance(0.1, 0.3), importance(1.0, 0.3), importance(0.96, 1.0)),
    "inertia": (inertia(0.2, 0.05, 0.01), inertia(0.02, 0.3, 0.01), inertia(0.04, 0.0, 0.6)),
    "semantics": (semantics_(0.0, 0.01), semantics_(0.3, 0.01), semantics_(0.02, 0.2)),
    "decay": (decay(0.1, 0.01), decay(0.0, 0.001), decay(0.1, 1.0)),
    "dominance": (dominance(0.05, 0.01), dominance(0.0, 0.005), dominance(0.02, 0.3)),
    "figure1": (
        figure1(["threshold", "router_off_loop", "router_in_loop", "sequence"]),
        figure1(["threshold", "router_off_loop", "router_in_loop", "sequence", "unheard of"]),
        figure1(["threshold", "router_off_loop", "sequence"]),
    ),
    "figure2": (figure2_(0.2, 0.02, 0.01), figure2_(0.02, 0.2, 0.01), figure2_(0.1, 0.0, 1.0)),
    "decoding": (decoding(0.2, 0.02, 0.02), decoding(0.02, 0.2, 0.02), decoding(0.1, 0.05, 1.0)),
}
