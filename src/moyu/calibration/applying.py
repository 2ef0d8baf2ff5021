"""`moyu.apply`: a plan on a model; or the plan that skips the most at a cost, found on a text and put on the model."""

from __future__ import annotations

from pathlib import Path
from typing import overload

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moyu.calibration.context import Context
from moyu.calibration.largest import Allowed, largest
from moyu.calibration.settings import Settings, Stage, quiet
from moyu.engine.applied import Applied
from moyu.engine.session import Engine
from moyu.errors import UserError
from moyu.kernels import BackendName
from moyu.measure.text import Text
from moyu.methods.control import Controller
from moyu.model.loading import Loaded
from moyu.plan import Plan

RECOMMENDED = ("levels", "estimate")  # the first that has a site: levels where weights are quantised
MAX_KL = 0.02  # nats a token


@overload
def apply(
    model: nn.Module,
    plan: Plan | str | Path | None,
    *,
    backend: BackendName = "auto",
    engine: Engine = "skip",
    controller: Controller | None = None,
) -> Applied: ...


@overload
def apply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    /,
    *,
    text: Text | None = None,
    max_kl: float = MAX_KL,
    method: str | None = None,
    window: int = 256,
    prompt: int = 128,
    progress: Stage = quiet,
    backend: BackendName = "auto",
    engine: Engine = "skip",
    controller: Controller | None = None,
) -> Applied: ...


def apply(
    model: nn.Module,
    plan: Plan | str | Path | PreTrainedTokenizerBase | None,
    *,
    text: Text | None = None,
    max_kl: float | None = None,
    method: str | None = None,
    window: int | None = None,
    prompt: int | None = None,
    progress: Stage = quiet,
    backend: BackendName = "auto",
    engine: Engine = "skip",
    controller: Controller | None = None,
) -> Applied:
    """Let a model skip: `with moyu.apply(model, plan): model.generate(...)`.

    The result is a context manager with `.restore()`, after which the model is bit-identical to before; `.plan` is its plan.

    plan: a plan, or the folder that one was saved in. Or the model's tokenizer: then the plan is made here, as `moyu calibrate
    --max-kl` makes it. That takes minutes; `.plan.save(folder)` keeps it.
    text: like the text that will be written, some 100 kB: a file, the text itself, or a list of documents. One half calibrates, a
    quarter decides how much is skipped. None: Python code that comes with MOYU.
    max_kl: how far the model may come from itself, in nats a token on that quarter; 0.02 where nothing is said.
    method: a name of `moyu methods`. None: `levels` where weights are quantised in 3 to 8 bits, else `estimate`.
    window, prompt: tokens in a window of text (256), and those at its start that run dense (128).
    progress: called with the name of a stage, what of it is done, and all of it.
    backend, engine: as `moyu.Applied` has them.

    Raises UserError where the plan does not fit the model, where a plan is applied already, where a back end was asked for that this
    machine has not, and where a plan cannot be found.
    """
    found = plan
    asked = {"text": text, "max_kl": max_kl, "method": method, "window": window, "prompt": prompt}
    given = {name: value for name, value in asked.items() if value is not None}
    if isinstance(plan, PreTrainedTokenizerBase):
        found = _found(model, plan, progress=progress, **given)
    elif given:
        raise UserError(
            f"{' and '.join(given)} say how to make a plan, and {plan!r:.60} is no tokenizer",
            "moyu.apply(model, tokenizer, text=...) makes a plan, moyu.apply(model, plan) applies one",
        )
    elif isinstance(plan, str | Path):
        found = Plan.load(plan)
    return Applied(model, found, backend=backend, engine=engine, controller=controller)  # pyright: ignore[reportArgumentType]


def _found(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: Text | None = None,
    max_kl: float = MAX_KL,
    method: str | None = None,
    window: int = 256,
    prompt: int = 128,
    progress: Stage,
) -> Plan:
    """The plan that skips the most at a KL of at most `max_kl`."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{type(model).__name__} is no model of transformers", "make its plan with moyu.calibrate")
    if not max_kl > 0:
        raise UserError(f"max_kl must be positive, not {max_kl}", "0.02 nats a token, for example")
    names = RECOMMENDED if method is None else (method,)
    settings = Settings(methods=names, text=text, window=window, boundary=prompt, device=model.device.type)
    settings.check()
    context = Context.of(Loaded(model.name_or_path or "", model, tokenizer), settings)
    able = context.applicable(names)[0]
    return largest(context, (able or names)[0], Allowed("kl", max_kl), progress)
