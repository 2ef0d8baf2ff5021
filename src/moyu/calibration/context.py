"""A loaded model with its text and what was asked for: it plans methods and measures their quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypedDict

from moyu import methods
from moyu.calibration import allocation, compensation
from moyu.calibration.budget import Reader, Way, plan_for_bytes, solve, ways
from moyu.calibration.profiling import Profile, profile
from moyu.calibration.settings import WINDOWS, Settings, Stage, quiet
from moyu.calibration.streams import Chain, Progress
from moyu.calibration.walk import calibrate
from moyu.errors import UserError
from moyu.measure import accounting, text
from moyu.measure.evaluation import Quality, evaluate_all, predict, score
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.model import dissect, loading
from moyu.model.anatomy import Anatomy
from moyu.model.contents import weights_digest
from moyu.model.loading import Loaded
from moyu.plan import Plan
from moyu.records import Protocol
from moyu.records.about import AboutModel, about_model
from moyu.weights import QUANTISED

REFERENCE_BYTES = 512 << 20


def open_model(name: str, weights: str | None, device: str = "cpu") -> Loaded:
    """A model as loaded, or in bfloat16 where that is asked for; blocks come later, once its text is known."""
    return loading.load(name, dtype="bfloat16" if weights == "bf16" else "auto", device=device)


def open_with_plan(
    name: str, plan: Path | None, weights: str | None, device: str = "cpu"
) -> tuple[Loaded, Plan | None]:
    """A model in the weights that are asked for, and the plan of this folder; without one its own, where it carries one."""
    asked = None if plan is None else Plan.load(plan)  # before the model, which takes longer
    loaded = open_model(name, weights, device)
    if asked is None and loaded.plan is not None:
        asked = Plan.load(loaded.plan)
    if weights in QUANTISED:
        loading.quantise_model(loaded.model, weights)
    return loaded, asked


@dataclass(frozen=True)
class Quantising:
    """What quantising alone costs, nothing skipped."""

    ppl_unquantised: float
    kl_quantising: float

    @property
    def note(self) -> str:
        """For readers of a table, whose columns are of skipping alone."""
        return (
            f"quantising its weights costs {self.kl_quantising:.2g} nats a token (perplexity {self.ppl_unquantised:.3g} before); "
            "the tables say what skipping costs on top"
        )

    @classmethod
    def measure(cls, loaded: Loaded, kind: str, windows: Windows) -> Quantising:
        """Quantise a model in place, and hold it against what it was before on the first of the windows.

        Their log-probabilities take REFERENCE_BYTES at most: some thousand tokens of a large vocabulary.
        """
        model = loaded.model
        scored = windows.tokens.shape[1] - windows.prompt - 1
        count = max(1, REFERENCE_BYTES // (4 * scored * dissect.text_config(model).vocab_size))
        seen = dataclasses.replace(windows, tokens=windows.tokens[:count])
        before = predict(model, seen)
        loading.quantise_model(model, kind)
        found, own = score(before, predict(model, seen), seen), score(before, before, seen)
        return cls(own.perplexity, max(0.0, float(found.kl.mean())))


class _Asked(TypedDict):
    """What every calibration of a context has in common: options of `calibrate`."""

    name: str
    revision: str | None
    bias: bool
    centre: bool
    seed: int
    chains: dict[str, Chain]


@dataclass
class Context:
    """A loaded model with its text, ready for the stages."""

    loaded: Loaded
    anatomy: Anatomy
    split: text.Split
    settings: Settings
    quantising: Quantising | None = None
    weights: float = 0.0  # that a token meets
    chains: dict[str, Chain] = field(default_factory=dict)  # dense runs that all calibrations share

    @classmethod
    def open(cls, name: str, settings: Settings, stage: Stage = quiet) -> Context:
        """Load a model and its text."""
        settings.check()
        stage("load", 0, 1)
        context = cls.of(open_model(name, settings.weights, settings.device), settings)
        stage("load", 1, 1)
        return context

    @classmethod
    def of(cls, loaded: Loaded, settings: Settings) -> Context:
        """A model that is loaded, with its text; its weights are quantised here where the settings ask for it."""
        anatomy = dissect.dissect(loaded.model, settings.dense_layers)
        weights = accounting.step_weights(loaded.model, anatomy)
        calibration, test = settings.windows(weights)
        split = text.windows_for(
            loaded,
            settings.text,
            length=settings.window,
            prompt=settings.boundary,
            calibration=calibration,
            test=test,
            seed=settings.seed,
            by_document=settings.by_document,
        )
        quantising = None
        if settings.weights in QUANTISED:
            quantising = Quantising.measure(loaded, settings.weights, split.test)
            anatomy = dissect.dissect(loaded.model, settings.dense_layers)
        return cls(loaded, anatomy, split, settings, quantising, weights)

    # ------------------------------------------------------------------------------------------------- for its records

    def about(self, plan: Plan | None = None) -> AboutModel:
        """Fields that every record about this model carries."""
        return about_model(
            self.loaded.name,
            self.loaded.model,
            self.anatomy,
            seed=self.settings.seed,
            plan=plan,
            notes=self._notes,
        )

    @property
    def _notes(self) -> list[str]:
        """What a reader must know of all figures."""
        notes = [] if self.quantising is None else [self.quantising.note]
        windows, asked = self.settings.windows(self.weights), (self.settings.calibration, self.settings.test)
        if asked == (None, None) and windows != WINDOWS:
            notes.append(
                f"a token meets {self.weights / 1e9:.2g} billion weights of this model, so that {windows[0]} windows of text "
                f"calibrate and {windows[1]} test at most, in place of {WINDOWS[0]} and {WINDOWS[1]}"
            )
        return notes

    @property
    def protocol(self) -> Protocol:
        """How quality is scored here."""
        boundary = self.settings.boundary
        return Protocol(prompt=boundary, window=self.settings.window, table="main" if boundary else "token")

    @cached_property
    def kv_bytes(self) -> list[dict[str, int]]:
        """Bytes of the full KV cache that a step reads, by context."""
        return accounting.kv_bytes(self.loaded.model)

    # ------------------------------------------------------------------------------------------------------- its text

    def without_prompt(self) -> Context:
        """The same test text at P = 0, every position sparse and scored: about as many tokens, so fewer windows."""
        tokens, length = self.split.test.tokens, self.settings.window
        count = max(1, round(len(tokens) * (length - self.settings.boundary - 1) / (length - 1)))
        test = dataclasses.replace(self.split.test, tokens=tokens[:count], prompt=0)
        return dataclasses.replace(
            self,
            split=dataclasses.replace(self.split, test=test),
            settings=dataclasses.replace(self.settings, boundary=0),
        )

    def use_profile(self, folder: Path) -> None:
        """Calibrate on the windows of a saved profile. Raises UserError for one of another model."""
        profile = Profile.load(folder)
        if profile.weights != weights_digest(self.loaded.model):
            raise UserError(
                f"the profile in {folder} was made from another model than {self.loaded.name!r}",
                "run `moyu profile` on this one",
            )
        self.split = dataclasses.replace(self.split, calibration=profile.windows)

    def profile(self) -> Profile:
        """Sketch the model's activations on the calibration windows."""
        return profile(self.loaded.model, self.split.calibration, anatomy=self.anatomy)

    # --------------------------------------------------------------------------------------------- methods and plans

    def method(self, name: str) -> Method:
        """A method with those of the asked knobs that it has."""
        return methods.method(name, **self.settings.knobs_for(name))

    def applicable(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Methods that have a site in this model, and those that have none."""
        able = [n for n in names if any(self.method(n).sites(b) for b in self.anatomy.places())]
        return able, [n for n in names if n not in able]

    def ways(self, name: str, progress: Progress | None = None) -> list[Way]:
        """The ways in which one method can spend a byte budget."""
        reader = Reader(self.loaded.model, self.anatomy)
        return ways(reader, self.method(name), self.split.calibration, progress, **self._asked)

    @property
    def _asked(self) -> _Asked:
        """What every plan is made with."""
        settings = self.settings
        return {
            "name": self.loaded.name,
            "revision": self.loaded.revision,
            "bias": settings.bias,
            "centre": settings.centre,
            "seed": settings.seed,
            "chains": self.chains,
        }

    def plan(self, name: str, sparsity: float | None = None, progress: Progress | None = None) -> Plan:
        """Calibrate one method, at `sparsity` or for what the settings ask; OutOfReach below the method's floor."""
        settings, model, windows = self.settings, self.loaded.model, self.split.calibration
        method, asked = self.method(name), self._asked
        fraction = settings.bytes if sparsity is None else None
        if fraction is not None and settings.allocation == "uniform":
            return self.learnt(plan_for_bytes(self.ways(name, progress), self.split, fraction, progress=progress))
        if fraction is not None:
            sparsity = solve(Reader(model, self.anatomy), method, windows, fraction)
        level = settings.target() if sparsity is None else sparsity
        if settings.allocation == "uniform":
            plan = calibrate(model, method, windows, sparsity=level, anatomy=self.anatomy, progress=progress, **asked)
        else:
            plan = allocation.calibrate_allocated(
                model,
                method,
                windows,
                self.split.validation,
                allocation=settings.allocation,
                sparsity=level,
                anatomy=self.anatomy,
                progress=progress,
                **asked,
            )
        return self.learnt(plan)

    def learnt(self, plan: Plan) -> Plan:
        """The plan with a trained bias at every site, where that was asked for."""
        if not self.settings.learn_bias:
            return plan
        model, windows, steps = self.loaded.model, self.split.calibration, self.settings.learn_bias
        return compensation.learn(model, plan, windows, steps=steps, anatomy=self.anatomy)

    def quality(self, plan: Plan, *, matched: bool = True, progress: Progress | None = None) -> Quality:
        """Evaluate a plan on the test windows."""
        return self.qualities({"plan": plan}, matched=matched, progress=progress)["plan"]

    def qualities(
        self, plans: Mapping[str, Plan], *, matched: bool = True, progress: Progress | None = None
    ) -> dict[str, Quality]:
        """Evaluate plans on the test windows, beside one dense run; matched references on as many as the settings allow."""
        windows = self.split.test
        return evaluate_all(
            self.loaded.model,
            plans,
            windows,
            matched=matched and self.settings.matched(self.weights),
            anatomy=self.anatomy,
            text_bytes=text.scored_bytes(self.loaded.tokenizer, windows.tokens, windows.prompt),
            progress=progress,
        )
