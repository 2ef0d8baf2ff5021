"""The same GGUF file in llama.cpp and in MOYU, nothing skipped: logits, perplexity on held-out text, greedy tokens.

    .venv/bin/python benchmarks/cpu/check_gguf.py [--windows 16] [--types F16,BF16,Q8_0,Q4_0] [--out RECORDS.jsonl]

The embedded model `swiglu`, every matrix in one type: F16, BF16, Q8_0, Q4_0. Both decode token by token and get the same ids.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from gguf_file import write
from llama_cpp_loop import LlamaCpp
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from moyu import kernels, records
from moyu.engine.applied import Applied
from moyu.measure.text import windows_for
from moyu.model import loading
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import read

KINDS = ("F16", "BF16", "Q8_0", "Q4_0")
WINDOW, PROMPT, NEW = 256, 32, 64  # tokens: of text that is scored, of a greedy prompt, after it
PERPLEXITY = 0.005  # may differ by this
BLOCK = 32
Step = Callable[[list[int]], Tensor]  # the next tokens of a sequence -> logits (V,) after the last


def padded(model: nn.Module) -> nn.Module:
    """The same function with a feed-forward width of whole blocks: neurons of zeros are added."""
    config = model.config
    more = -config.intermediate_size % BLOCK
    for layer in model.model.layers:
        mlp = layer.mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data = functional.pad(linear.weight.data, (0, 0, 0, more))
            linear.out_features += more
        mlp.down_proj.weight.data = functional.pad(mlp.down_proj.weight.data, (0, more))
        mlp.down_proj.in_features += more
    config.intermediate_size += more
    return model


def llama_cpp(engine: LlamaCpp) -> Step:
    """A new sequence in llama.cpp."""
    engine.reset()
    return lambda ids: torch.from_numpy(engine.step(ids).copy())


def moyu(applied: Applied) -> Step:
    """A new sequence in MOYU, on its kernels."""
    cache = DynamicCache(config=applied.model.config)

    def step(ids: list[int]) -> Tensor:
        with applied.prompt(1):
            return applied.model(torch.tensor([ids]), past_key_values=cache).logits[0, -1].float()

    return step


def greedy(step: Step, prompt: list[int]) -> tuple[list[int], list[Tensor]]:
    """The most likely tokens after a prompt, and the logits that chose them."""
    ids, seen = list(prompt), [step(prompt)]
    for _ in range(NEW):
        ids.append(int(seen[-1].argmax()))
        seen.append(step(ids[-1:]))
    return ids[len(prompt) :], seen


class Score:
    """Sums over scored tokens."""

    def __init__(self) -> None:
        self.tokens, self.nats, self.kl, self.agree, self.worst, self.squares = 0, [0.0, 0.0], 0.0, 0, 0.0, [0.0, 0.0]

    def add(self, theirs: Tensor, ours: Tensor, target: int) -> None:
        """Two rows of logits before a token."""
        first, second = (functional.log_softmax(x.double(), -1) for x in (theirs, ours))
        self.tokens += 1
        self.nats[0] -= float(first[target])
        self.nats[1] -= float(second[target])
        self.kl += float((first.exp() * (first - second)).sum())
        self.agree += int(theirs.argmax() == ours.argmax())
        error, size = (float(x.double().square().sum()) for x in (theirs - ours, theirs))
        self.worst = max(self.worst, math.sqrt(error / size))
        self.squares = [self.squares[0] + error, self.squares[1] + size]

    @property
    def perplexities(self) -> tuple[float, float]:
        """llama.cpp's and MOYU's."""
        return tuple(math.exp(n / self.tokens) for n in self.nats)  # pyright: ignore[reportReturnType]

    @property
    def error(self) -> float:
        """Of the logits, relative, root mean square."""
        return math.sqrt(self.squares[0] / self.squares[1])


def compare(engine: LlamaCpp, applied: Applied, windows: Tensor) -> Score:
    """Both on the same text, token by token."""
    score = Score()
    for ids in windows.tolist():
        theirs, ours = llama_cpp(engine), moyu(applied)
        for token, following in pairwise(ids):
            score.add(theirs([token]), ours([token]), following)
    return score


def same_text(engine: LlamaCpp, applied: Applied, windows: Tensor) -> tuple[int, int, list[float]]:
    """Greedy texts: how many are equal, of how many, and where one is not, how far apart the two tokens are for llama.cpp.

    In units of the largest difference between the two's logits there: below 2 either could have come first.
    """
    equal, gaps = 0, []
    for ids in windows[:, :PROMPT].tolist():
        (theirs, seen), (ours, own) = greedy(llama_cpp(engine), ids), greedy(moyu(applied), ids)
        first = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b), None)
        if first is None:
            equal += 1
            continue
        gap = seen[first][theirs[first]] - seen[first][ours[first]]
        gaps.append(float(gap / (seen[first] - own[first]).abs().max()))
    return equal, len(windows), gaps


@torch.no_grad()
def main() -> None:
    """A row a type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--types", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--out", type=Path, help="records to write")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a step of this model is too short for a second one
    text = windows_for(
        loading.load("swiglu"), None, length=WINDOW, prompt=PROMPT, calibration=1, test=options.windows
    ).test
    rows, failed = [], []
    print(
        "type   tokens  perplexity llama.cpp  MOYU     apart    logits' error  same first choice  KL        greedy texts equal"
    )
    for kind in options.types.split(","):
        model = padded(loading.load("swiglu", dtype="bfloat16").model)
        with tempfile.TemporaryDirectory() as folder:
            path = write(model, Path(folder) / "model.gguf", kind)
            engine = LlamaCpp(path, torch.get_num_threads())
            with Applied(load_model(read(path)), None) as applied:
                score = compare(engine, applied, text.tokens)
                equal, texts, gaps = same_text(engine, applied, text.tokens)
            engine.close()
        theirs, ours = score.perplexities
        apart = ours / theirs - 1
        note = f"{equal} of {texts} greedy texts of {NEW} tokens equal, {sum(g < 2 for g in gaps)} of {len(gaps)} others from a near-tie on"
        print(
            f"{kind:6s} {score.tokens:6d}  {theirs:20.4f}  {ours:7.4f}  {apart:+7.3%}  {score.error:13.5f}  "
            f"{score.agree / score.tokens:16.2%}  {score.kl / score.tokens:.2e}  {note}"
        )
        if abs(apart) > PERPLEXITY or any(g >= 2 for g in gaps):
            failed.append(kind)
        rows.append(
            records.stamp(
                kind="quality", model="swiglu", weights="trained", dtype=kind.lower(), method="dense", simulated=False, seed=0,
                corpus=dict(text.source), tokens=score.tokens, ppl_dense=theirs, ppl=ours, kl=max(score.kl / score.tokens, 0.0),
                top1_agreement=score.agree / score.tokens, realized_sparsity=0.0, byte_fraction=1.0,
                notes=[
                    f"one GGUF file of {kind}: ppl_dense is llama.cpp's, ppl MOYU's with {kernels.describe()}",
                    f"logits differ by {score.error:.5f} (root mean square, relative), {score.worst:.5f} at most", note,
                ],
            )
        )  # fmt: skip
    if options.out is not None:
        records.write(options.out, rows)
    if failed:
        raise SystemExit(
            f"apart by more than {PERPLEXITY:.1%} in perplexity, or greedy texts by more than near-ties: {', '.join(failed)}"
        )


if __name__ == "__main__":
    main()
