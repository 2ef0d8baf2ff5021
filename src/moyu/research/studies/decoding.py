"""An extension of Figure 2: does the decoding strategy change activation patterns, compared with the kind of prompt?

Greedy, temperature, top-k, top-p and beam search after prompts of three kinds. Every generated text is run again in one
teacher-forced pass, so that only the tokens differ.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import Subject
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, flocking

PROMPT, NEW = 32, 48
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature 1": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "top-k 40": {"do_sample": True, "temperature": 1.0, "top_k": 40, "top_p": 1.0},
    "top-p 0.9": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9},
    "beam 4": {"do_sample": False, "num_beams": 4},
}
PROMPTS = ("sentence", "unigram", "uniform")


class Decoding(Study):
    """Decoding strategies x kinds of prompt."""

    name: ClassVar[str] = "decoding"
    claim: ClassVar[str] = "What the prompt is decides how much generated tokens flock, more than how they are sampled."
    prediction: ClassVar[str] = (
        "Flocking of generated tokens differs more between a sentence and random tokens as prompts than between any two "
        "decoding strategies."
    )
    refutation: ClassVar[str] = "The strategies differ as much as the prompts."
    conditions: ClassVar = (
        Condition(
            "prompt over strategy", "range over prompts less range over strategies, flocking", "above", 0.0, 0.02
        ),
    )
    controls: ClassVar = (
        Control("strategies differ", "share of generated tokens that differ between greedy and temperature 1", "at least", 0.1),
    )  # fmt: skip

    def observe(self, setup: Setup) -> Observed:
        subject, count = setup.subject, setup.size(64, 2)
        texts = domains.windows(subject, "library", count, PROMPT + NEW, seed=setup.seed)
        generator = torch.Generator().manual_seed(setup.seed)
        random = torch.randint(3, int(subject.model.config.vocab_size), (count, PROMPT), generator=generator)
        random[:, 0] = subject.bos
        prompts = (texts[:, :PROMPT], domains.unigrams(subject, texts, (count, PROMPT), setup.seed), random)

        def everything() -> Observed:
            flock = np.empty((count, len(PROMPTS), len(STRATEGIES)))
            distinct, differ = np.empty_like(flock), []
            for i, prompt in enumerate(prompts):
                paths = []
                for j, how in enumerate(STRATEGIES.values()):
                    setup.progress("generating", i * len(STRATEGIES) + j, len(PROMPTS) * len(STRATEGIES))
                    path = _generated(subject, prompt, how, setup.seed)
                    paths.append(path)
                    flock[:, i, j] = _flock(subject, path)
                    distinct[:, i, j] = [len(set(p[PROMPT:].tolist())) / NEW for p in path]
                differ.append(float((paths[0][:, PROMPT:] != paths[1][:, PROMPT:]).double().mean()))
            return {"flock": flock, "distinct": distinct, "differ": np.array(differ), "real": _flock(subject, texts)}

        return setup.part("decoding/paths", everything)

    def analyse(self, observed: Observed) -> Finding:
        flock = observed["flock"]  # (documents, prompts, strategies)

        def contrast(data: np.ndarray) -> float:
            by_prompt, by_strategy = data.mean((0, 2)), data.mean((0, 1))
            return float(np.ptp(by_prompt) - np.ptp(by_strategy))

        distinct = observed["distinct"]
        x, y = (v - v.mean() for v in (distinct.ravel(), flock.ravel()))
        slope = float((x * y).sum() / max((x * x).sum(), 1e-12))
        return Finding(
            {"prompt over strategy": bootstrap(flock, contrast)},
            controls={"strategies differ": float(observed["differ"].mean())},
            nulls={
                "flocking of random sets": 0.0,
                "flocking of the text's own continuation": float(observed["real"].mean()),
            },
            details={
                "flocking": {
                    p: dict(zip(STRATEGIES, flock[:, i].mean(0).round(4).tolist(), strict=True))
                    for i, p in enumerate(PROMPTS)
                },
                "distinct tokens": {
                    p: dict(zip(STRATEGIES, distinct[:, i].mean(0).round(3).tolist(), strict=True))
                    for i, p in enumerate(PROMPTS)
                },
                "slope of flocking on the share of distinct tokens": slope,
            },
            notes=("not in the paper: an extension of its figure",),
        )


@torch.no_grad()
def _generated(subject: Subject, prompt: Tensor, how: dict[str, Any], seed: int) -> Tensor:
    """Prompts with exactly NEW tokens behind each, (B, PROMPT + NEW)."""
    torch.manual_seed(seed)
    pad = subject.model.config.pad_token_id
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": subject.bos if pad is None else pad}
    parts = prompt.to(subject.model.device).split(16)
    return torch.cat(
        [subject.model.generate(p, attention_mask=torch.ones_like(p), **settings, **how).cpu() for p in parts]
    )


def _flock(subject: Subject, paths: Tensor) -> np.ndarray:
    """Flocking of the tokens behind the prompt, mean over layers: (B,)."""
    values = subject.values(paths)[:, :, PROMPT:]
    return flocking(subject.active(values)).mean(0).numpy()
