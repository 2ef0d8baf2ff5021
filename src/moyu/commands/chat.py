"""`moyu chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moyu.commands.options import BackendName, Device, Lossless, Model, PlanFolder, Seed, Weights
from moyu.errors import UserError

COMMANDS = "/reset begins anew, /plan FOLDER takes a plan, /plan off none, /quit ends; Ctrl-C stops an answer"


def chat(
    model: Model = "swiglu",
    plan: PlanFolder = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Write at most this many tokens an answer.", min=1)] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: as the model's generation config has it.", min=0, max=2)
    ] = None,
    lossless: Lossless = False,
    weights: Weights = None,
    device: Device = "cpu",
    backend: BackendName = "auto",
    seed: Seed = 0,
) -> None:
    """Talk with a model in its chat template, dense or under a plan. Answers go to stdout, their speed to stderr."""
    from moyu.model import machine

    kernels = machine.backend_of(backend)
    machine.check(device, kernels, weights)
    from moyu.calibration.context import open_with_plan
    from moyu.commands.conversation import Conversation
    from moyu.plan import Plan

    loaded, asked = open_with_plan(model, plan, weights, device)
    sampling = {} if temperature is None else {"do_sample": temperature > 0, "temperature": temperature or None}
    talk = Conversation(loaded, asked, system, new_tokens, sampling, lossless=lossless, backend=kernels, seed=seed)
    print(f"moyu: {loaded.name}, {talk.named}; {COMMANDS}", file=sys.stderr)
    with talk:
        while (said := _listen()) is not None:
            try:
                match said.split(maxsplit=1):
                    case []:
                        pass
                    case ["/quit" | "/exit"]:
                        return
                    case ["/reset"]:
                        talk.reset()
                        print("moyu: the conversation begins anew", file=sys.stderr)
                    case ["/plan", *rest]:
                        if rest:
                            talk.take(None if rest[0].strip() == "off" else Plan.load(Path(rest[0].strip())))
                        print(f"moyu: {talk.named}", file=sys.stderr)
                    case [word, *_] if word.startswith("/"):
                        raise UserError(f"no command {word!r}", COMMANDS)
                    case _:
                        line = talk.say(said, lambda piece: print(piece, end="", flush=True))
                        print(flush=True)
                        print(f"moyu: {line}", file=sys.stderr)
            except UserError as error:
                print(f"moyu: error: {error}", file=sys.stderr)


def _listen() -> str | None:
    """The next line that is typed or piped; None at the end."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401 -- gives input() its editing and history

            return input("> ")
        line = sys.stdin.readline()
    except EOFError:
        return None
    return line.rstrip("\n") if line else None
