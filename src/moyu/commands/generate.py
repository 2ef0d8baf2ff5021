"""`moyu generate`: text after a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moyu.commands.options import (
    BackendName,
    Device,
    Json,
    Lossless,
    Model,
    PlanFolder,
    Prompt,
    Seed,
    Strict,
    Weights,
    refuse_unused,
)
from moyu.errors import UserError

SIRIUS_DRAFTS = 4
PROMPT = "def read_config(path):\n"  # for the embedded models, which know Python alone


def generate(
    typed: typer.Context,
    model: Model = "swiglu",
    plan: PlanFolder = None,
    prompt: Prompt = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put --prompt into the model's chat template, or continue it as it is. By default into the template, where there is one.",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Write at most this many tokens.", min=1)] = 64,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run dense as well, and say where its text first differs.")
    ] = False,
    lossless: Lossless = False,
    sirius: Annotated[
        float | None,
        typer.Option(
            help="The plan drafts, and dense rewrites from the first token that it finds less likely than this."
        ),
    ] = None,
    draft_length: Annotated[
        int | None,
        typer.Option(help="Tokens that are drafted before dense checks them. Default: as many as pay.", min=1),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of --lossless and --sirius: 0 is greedy.", min=0)] = 0.0,
    weights: Weights = None,
    device: Device = "cpu",
    backend: BackendName = "auto",
    strict: Strict = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Continue a prompt, or answer it in a chat template, dense or under a plan. The text goes to stdout, its speed to stderr."""
    check_correction(lossless, sirius, temperature, plan)
    if not lossless and sirius is None:
        refuse_unused(typed, "draft_length", because="nothing is drafted", remedy="give --lossless or --sirius as well")
    from moyu.model import machine

    kernels = machine.backend_of(backend)
    machine.check(device, kernels, weights)
    from moyu.calibration.context import open_with_plan
    from moyu.commands.writing import generation_record, write
    from moyu.engine.speculation import Correction
    from moyu.model import dissect
    from moyu.model.prompts import as_chat, check_length, prompt_ids, written
    from moyu.records.about import about_model
    from moyu.reporting.summary import generated

    correction = None
    if lossless or sirius is not None:
        length = draft_length or (None if lossless else SIRIUS_DRAFTS)
        correction = Correction("lossless" if lossless else "sirius", length, temperature, sirius or 0.0)
    loaded, asked = open_with_plan(model, plan, weights, device)
    if compare and asked is None and correction is None:
        raise UserError("--compare holds a plan or --lossless against dense, and there is neither", "give one, or leave it out")
    templated = bool(prompt is not None and loaded.tokenizer.chat_template) if chat is None else chat
    prompt = PROMPT if prompt is None else written(prompt)
    if templated:
        prompt = as_chat(loaded, [{"role": "user", "content": prompt}], "--raw continues the text itself")
    if templated and chat is None:
        print("moyu: the prompt goes into the model's chat template; --raw continues it as it is", file=sys.stderr)
    ids = prompt_ids(loaded, prompt)
    check_length(loaded, ids, new_tokens)
    anatomy = dissect.dissect(loaded.model)
    pieces = _Pieces("" if templated else prompt)
    text = write(
        loaded,
        anatomy,
        asked,
        ids,
        new_tokens,
        backend=kernels,
        strict=strict,
        correction=correction,
        margins=compare,
        seed=seed,
        show=None if as_json else pieces.show,
    )
    if not as_json:
        pieces.end()
    dense = write(loaded, anatomy, None, ids, new_tokens, backend=kernels) if compare else None
    about = about_model(loaded.name, loaded.model, anatomy, seed=seed, plan=asked)
    row = generation_record(about, asked, prompt, text, dense, correction)
    if as_json:
        print(row.model_dump_json())
        return
    for line in generated(row):
        print(f"moyu: {line}", file=sys.stderr)


def check_correction(lossless: bool, sirius: float | None, temperature: float, plan: Path | None) -> None:
    """Refuse options of drafting that contradict each other."""
    if not lossless and sirius is None:
        if temperature:
            raise UserError("--temperature is of --lossless and --sirius", "plain generation is greedy")
        return
    if lossless and sirius is not None:
        raise UserError("both --lossless and --sirius are given", "give one of them")
    if plan is None and sirius is not None:
        raise UserError("no plan to draft with", "`moyu calibrate` makes one; then --plan runs/plans/METHOD")
    if sirius is not None and not 0 <= sirius <= 1:
        raise UserError(f"--sirius is a likelihood in [0, 1], not {sirius}", "the paper's is 0.1")


class _Pieces:
    """Prints text as it is written, with `prompt` before the first piece: an error until then leaves stdout empty."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def show(self, piece: str) -> None:
        print(self.prompt + piece, end="", flush=True)
        self.prompt = ""

    def end(self) -> None:
        self.show("\n")
