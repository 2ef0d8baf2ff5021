"""Train the router of a method, on a frozen model or together with its weights, and grade it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from moyu import methods
from moyu.calibration import in_loop
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings, Stage, quiet
from moyu.calibration.speed import kept_plan
from moyu.errors import UserError
from moyu.files import key_of
from moyu.measure.foresight import foresight
from moyu.methods.routers import Grade
from moyu.model.contents import weights_digest
from moyu.plan import Plan, digests, fingerprint

DEFINITION = 1  # of what a training makes: one more wherever it changes


@dataclass(frozen=True)
class Graded:
    """How well a router foresees what one layer needs, on one text."""

    text: str  # "held-out" or "shifted"
    layer: int
    grade: Grade


@dataclass(frozen=True)
class Tuned:
    """What tuning the weights together with the router gave."""

    checkpoint: str
    plan: str  # its hash
    realized_sparsity: float
    ppl_dense: float
    ppl_before_tuning: float
    ppl: float
    ppl_tuned_dense: float


def fit(name: str, settings: Settings, shifted: Path | None, out: Path, stage: Stage = quiet) -> list[Graded]:
    """Train the router of the one method of `settings`, save its plan, and grade it on held-out and on shifted text."""
    (method,) = settings.methods
    if not methods.method_class(method).trains:
        able = [n for n in methods.names() if methods.method_class(n).trains]
        raise UserError(f"method {method!r} trains no router", f"`moyu calibrate` plans it; routers: {', '.join(able)}")
    context = Context.open(name, settings, stage)
    plan = _fitted(context, method, out, stage)
    texts = {"held-out": context.split.test}
    if shifted is not None:
        texts["shifted"] = Context.open(name, dataclasses.replace(settings, text=shifted), stage).split.test
    rows = []
    for kind, windows in texts.items():
        stage(f"grade on {kind} text", 0, 1)
        grades = foresight(context.loaded.model, plan, windows, anatomy=context.anatomy)
        rows += [Graded(kind, layer, own) for layer, own in grades.items()]
        stage(f"grade on {kind} text", 1, 1)
    return rows


def _fitted(context: Context, method: str, out: Path, stage: Stage) -> Plan:
    """The plan in `out` where the same training made it, or a new one, saved there."""
    model, anatomy, settings = context.loaded.model, context.anatomy, context.settings
    own, windows = context.method(method), context.split.calibration
    key = key_of(
        weights=[weights_digest(model), fingerprint(model)],
        text=[windows.digest, settings.seed],
        settings=[method, own.knobs(), settings.sparsity, settings.bytes, settings.allocation, settings.bias,
                  settings.centre, settings.learn_bias, anatomy.dense_layers],
        definition=DEFINITION,
    )  # fmt: skip

    def train() -> Plan:
        return context.plan(method, progress=lambda done, whole: stage(f"train {method}", done, whole))

    return kept_plan(out, key, train)


def tune(name: str, settings: Settings, out: Path, stage: Stage = quiet) -> Tuned:
    """Train a router in the loop together with the feed-forward weights; writes a checkpoint, and its plan in `out/plan`."""
    (method,) = settings.methods
    if not methods.method_class(method).joint:
        able = [n for n in methods.names() if methods.method_class(n).joint]
        raise UserError(f"method {method!r} does not train in the loop", f"these do: {', '.join(able)}")
    context = Context.open(name, settings, stage)
    model, windows = context.loaded.model, context.split.calibration
    before = context.plan(method, progress=lambda done, whole: stage(f"train {method}", done, whole))
    frozen = context.quality(before, matched=False)
    plan = in_loop.train(
        model,
        before,
        windows,
        before.target_sparsity or 0.0,
        steps=before.method.knobs()["steps"],
        tune=True,
        anatomy=context.anatomy,
        progress=lambda done, whole: stage("tune weights", done, whole),
    )
    about = {**plan.model, "name": str(out), "digests": digests(context.anatomy, plan.sites())}
    plan = dataclasses.replace(plan, model=about)
    model.save_pretrained(out)  # pyright: ignore[reportCallIssue]
    context.loaded.tokenizer.save_pretrained(out)
    plan.save(out / "plan")
    tuned = context.quality(plan, matched=False)
    return Tuned(
        checkpoint=str(out),
        plan=plan.hash,
        realized_sparsity=tuned.realized_sparsity,
        ppl_dense=frozen.dense.perplexity,
        ppl_before_tuning=frozen.method.perplexity,
        ppl=tuned.method.perplexity,
        ppl_tuned_dense=tuned.dense.perplexity,
    )
