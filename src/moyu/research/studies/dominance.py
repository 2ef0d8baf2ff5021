"""Do a few tokens determine a prompt's mask? Delete the tokens of the largest activations, those most attended to, or others.

The change of the sequence-level set, 1 - kappa_J, after a text is run again without an eighth of its tokens: the dominant one
of every sixteenth of the text, or another one of the same sixteenth, so that positions are matched exactly. (Early tokens
receive more attention whatever they are; dominance over the whole text would be dominance of its beginning.)
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import SINK, Subject, leading
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, griffin_statistic, kappa

LENGTH, PARTS = 129, 16
DRAWS = 4  # matched random deletions per text
ARMS = ("norm", "attention", "random for norm", "random for attention")


class Dominance(Study):
    """E2d."""

    name: ClassVar[str] = "dominance"
    claim: ClassVar[str] = "Dominant tokens of the input fix which neurons a prompt selects."
    prediction: ClassVar[str] = (
        "Deleting each passage's token of the largest activations, or the one that receives most attention, changes the "
        "prompt's set more than deleting another token of each passage."
    )
    refutation: ClassVar[str] = "The difference of the changes is below the smallest of interest (0.01), or reversed."
    conditions: ClassVar = (
        Condition("by norm", "change of the set, largest activations less matched random", "above", 0.0, 0.01),
        Condition("by attention", "change of the set, most attended less matched random", "above", 0.0, 0.01),
    )
    controls: ClassVar = (
        Control("deletions matter", "change of the set by random deletions", "at least", 0.005),
    )  # fmt: skip

    def observe(self, setup: Setup) -> Observed:
        tokens = domains.windows(setup.subject, "library", setup.size(120, 3), LENGTH, seed=setup.seed)

        def measure(who: Subject, label: str) -> Observed:
            rows = []
            for i, text in enumerate(tokens):
                setup.progress(f"deletions, {label}", i, len(tokens))
                rows.append(_one(who, text, setup.seed + i))
            return {"change": np.stack(rows)}

        trained = setup.part("dominance/trained", lambda: measure(setup.subject, "trained"))
        plain = setup.untrained_part("dominance/untrained", lambda who: measure(who, "untrained"))
        return {**trained, "untrained_change": plain["change"]}

    def analyse(self, observed: Observed) -> Finding:
        change = observed["change"]  # (documents, arms, layers)
        mean = change.mean(2)
        plain = observed["untrained_change"].mean(2)
        return Finding(
            {"by norm": bootstrap(mean[:, 0] - mean[:, 2]), "by attention": bootstrap(mean[:, 1] - mean[:, 3])},
            controls={"deletions matter": float(mean[:, 2:].mean())},
            nulls={
                "change by matched random deletions": float(mean[:, 2:].mean()),
                "by norm, untrained": float((plain[:, 0] - plain[:, 2]).mean()),
                "by attention, untrained": float((plain[:, 1] - plain[:, 3]).mean()),
            },
            details={
                "change": {a: float(mean[:, i].mean()) for i, a in enumerate(ARMS)},
                "by norm, layer by layer": (change[:, 0] - change[:, 2]).mean(0).round(4).tolist(),
                "by attention, layer by layer": (change[:, 1] - change[:, 3]).mean(0).round(4).tolist(),
                "deleted": f"{PARTS} of {LENGTH - 1} tokens, the first {SINK - 1} kept",
            },
        )


def _one(subject: Subject, text: Tensor, seed: int) -> np.ndarray:
    """Change of the sets by each arm, (arms, L)."""
    values = subject.values(text[None])[:, 0]  # (L, T, f)
    full = _sets(values)
    norms = values.norm(dim=2)
    by_norm = (norms / norms.mean(1, keepdim=True)).mean(0)
    generator = torch.Generator().manual_seed(seed)
    dominant = [_top(score) for score in (by_norm, attention_received(subject, text))]
    variants = [*dominant]
    for chosen in dominant:
        variants += [_matched(chosen, len(text), generator) for _ in range(DRAWS)]
    shorter = torch.stack([_without(text, gone) for gone in variants])
    change = 1 - kappa(full[:, None], _sets(subject.values(shorter)))  # (L, variants)
    first, second = change[:, 2 : 2 + DRAWS].mean(1), change[:, 2 + DRAWS :].mean(1)
    return torch.stack([change[:, 0], change[:, 1], first, second]).numpy()


def _sets(values: Tensor) -> Tensor:
    """Sequence sets behind BOS: (L, ..., T, f) -> (L, ..., f)."""
    return leading(griffin_statistic(values[..., 1:, :]))


def _parts(length: int) -> tuple[Tensor, ...]:
    """Positions behind the sink in PARTS passages."""
    return torch.arange(SINK, length).tensor_split(PARTS)


def _top(scores: Tensor) -> Tensor:
    """The best position of each passage."""
    return torch.stack([part[scores[part].argmax()] for part in _parts(len(scores))])


def _matched(chosen: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Another position of each passage."""
    out = []
    for part, best in zip(_parts(length), chosen, strict=True):
        others = part[part != best]
        out.append(others[torch.randint(len(others), (1,), generator=generator)])
    return torch.cat(out)


def _without(text: Tensor, gone: Tensor) -> Tensor:
    kept = torch.ones(len(text), dtype=torch.bool)
    kept[gone] = False
    return text[kept]


@torch.no_grad()
def attention_received(subject: Subject, text: Tensor) -> Tensor:
    """Mean attention that each position receives from later ones, over heads and layers: (T,)."""
    config = subject.model.config
    before = config._attn_implementation
    subject.model.set_attn_implementation("eager")
    try:
        output = subject.model(input_ids=text[None].to(subject.model.device), use_cache=False, output_attentions=True)
    finally:
        subject.model.set_attn_implementation(before)
    weights = torch.stack([a[0].mean(0) for a in output.attentions]).mean(0).cpu()  # (T, T)
    later = torch.arange(len(text), 0, -1)
    return weights.sum(0) / later  # few positions attend to one near the end
