"""Lossless generation beside dense: acceptance, tokens a dense pass, and tokens a second, variants in turn on every prompt.

    python benchmarks/lossless/lossless.py [MODEL] [--prompts 20] [--tokens 48]

Dense is timed twice, in transformers' own loop and on MOYU's kernels. Prints a table; medians over the prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from transformers.generation import BaseStreamer

from moyu.calibration.context import Context
from moyu.calibration.settings import Settings
from moyu.engine.applied import Applied
from moyu.engine.generate import generate
from moyu.engine.speculation import Speculation, best_drafts, expected_speedup, lossless, sirius, speculate

PLANS = (("griffin", 0.5), ("deja-vu", 0.5), ("teal", 0.4))


class Clock(BaseStreamer):
    """Notes when transformers' loop hands over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def transformers_rate(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> float:
    """Tokens a second of transformers' loop, the first token apart."""
    clock = Clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    return (len(clock.times) - 2) / (clock.times[-1] - clock.times[1])


def own_rate(session: Applied, ids: torch.Tensor, options: dict[str, Any]) -> float:
    """Tokens a second of MOYU's loop, the first token apart."""
    times = [time.perf_counter() for _ in generate(session, ids, **options)]
    return (len(times) - 1) / (times[-1] - times[0])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="swiglu")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    asked = parser.parse_args()
    settings = Settings(test=asked.prompts, calibration=16)
    context = Context.open(asked.model, settings)
    model, rates, told = context.loaded.model, defaultdict(list), defaultdict(list)
    plans = {name: context.plan(name, sparsity=sparsity) for name, sparsity in PLANS}
    prompts = [row[None, :64] for row in context.split.test.tokens]
    costs = {}
    options = {"max_new_tokens": asked.tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for ids in prompts:
        rates["transformers eager"].append(transformers_rate(model, ids, options))
    for name, plan in [(None, None), *plans.items()]:
        with Applied(model, plan, anatomy=context.anatomy) as applied:
            for ids in prompts:
                plain = own_rate(applied, ids, options)
                rates["dense on the kernels" if name is None else f"{name}, uncorrected"].append(plain)
                if name is None:
                    continue
                for label, drafts, rule in (
                    ("lossless", 2, lossless),
                    ("lossless", 4, lossless),
                    ("sirius 0.1", 16, sirius()),
                ):
                    made = Speculation()
                    for _ in speculate(applied, ids, drafts=drafts, rule=rule, out=made, **options):
                        pass
                    key = f"{name}, {label}, {drafts} drafts"
                    rates[key].append(made.tok_s)
                    told[key].append((made.acceptance, made.tokens_per_pass))
                    costs.setdefault((name, drafts), []).append(
                        (made.draft_s / made.drafted, made.verify_s / made.passes)
                    )
    dense = {k: statistics.median(rates[k]) for k in ("transformers eager", "dense on the kernels")}
    print("| variant | tokens/s | x eager | x dense on the kernels | accepted | tokens a dense pass |")
    print("|---|---|---|---|---|---|")
    for key, found in rates.items():
        rate = statistics.median(found)
        accepted, per_pass = (statistics.mean(v) for v in zip(*told[key], strict=True)) if key in told else (None, None)
        extra = "| |" if accepted is None else f"{accepted:.0%} | {per_pass:.2f} |"
        print(f"| {key} | {rate:.0f} | {rate / dense['transformers eager']:.2f} | "
              f"{rate / dense['dense on the kernels']:.2f} | {extra}")  # fmt: skip
    for (name, drafts), found in costs.items():
        if drafts != 4:
            continue
        step, verify = (statistics.median(v) * dense["dense on the kernels"] for v in zip(*found, strict=True))
        accepted = statistics.mean(a for a, _ in told[f"{name}, lossless, 4 drafts"])
        best = best_drafts(accepted, step, verify)
        print(
            f"{name}: a sparse step costs {step:.2f} dense ones and a verification {verify:.2f}; at {accepted:.0%} "
            f"{best} drafts are best: {expected_speedup(accepted, best, step, verify):.2f}x expected"
        )


if __name__ == "__main__":
    main()
