"""Results that are kept on disk are found again by what they were made from, never by a name; and two writers lose nothing."""

from __future__ import annotations

import dataclasses
import multiprocessing

import numpy as np
import pytest
import torch

from moyu import UserError, records
from moyu.calibration import fitting
from moyu.calibration.context import Context
from moyu.calibration.profiling import profile
from moyu.calibration.settings import Settings
from moyu.model import loading
from moyu.model.contents import weights_digest
from moyu.research import coverage, trinity
from moyu.research.studies import running
from moyu.research.studies.base import Setup, Study
from moyu.research.studies.verdicts import Condition, Finding
from tiny import build

TEXT = "".join(f"value_{n} = compute({n * 7 % 13}, other={n})\n" for n in range(400))


@pytest.fixture
def place(tmp_path):
    """A folder with a model of the zoo, and what puts another one there."""
    loaded = loading.load("swiglu")
    folder = tmp_path / "model"

    def put(seed: int | None = None):
        if seed is not None:
            torch.manual_seed(seed)
            weight = loaded.model.model.layers[3].mlp.up_proj.weight
            weight.data[17, 5] += 0.5  # one weight of four million
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        return str(folder)

    put()
    return put


def test_a_digest_sees_one_weight_its_type_and_its_scales():
    model = build("llama", torch.float32)
    found = {weights_digest(model)}
    assert weights_digest(build("llama", torch.float32)) in found
    model.model.layers[2].mlp.down_proj.weight.data[-1, -1] += 1e-3
    found.add(weights_digest(model))
    found.add(weights_digest(model.to(torch.bfloat16)))
    loading.quantise_model(model, "q8_0")
    found.add(weights_digest(model))
    model.model.layers[2].mlp.down_proj.blocks.tensors[1][-1, -1] *= 2
    found.add(weights_digest(model))
    assert len(found) == 5


def cell(board, bits, name, target):
    """A cell that was measured in no time."""
    return records.stamp(
        kind="cell", model=board.model, weights="trained", method=name, simulated=True, weight_bits=float(bits), seed=board.asked.seed,
        status="n/a (not measured here)",
    )  # fmt: skip


def test_cells_of_other_weights_text_and_definitions_are_measured_again(place, tmp_path, monkeypatch):
    measured, window = [], [64]
    monkeypatch.setattr(trinity.Board, "reference", None)
    monkeypatch.setattr(
        trinity.Asked,
        "settings",
        lambda self: Settings(window=window[0], boundary=32, calibration=2, test=16, seed=self.seed),
    )
    for name in ("measure", "rounding"):
        monkeypatch.setattr(
            trinity.PlainBoard, name, lambda board, *asked: (measured.append(1), cell(board, 16, "cats", None))[1]
        )
    asked = trinity.Asked(models=(place(),), methods=("cats",), bytes=(0.75,), quick=True, speed=False)

    def runs(asked=asked):
        measured.clear()
        trinity.run(asked, tmp_path / "out")
        return len(measured)

    assert runs() > 0 and runs() == 0
    place(seed=1)  # other weights under the same name
    assert runs() > 0
    assert runs(dataclasses.replace(asked, seed=3)) > 0
    monkeypatch.setattr(trinity.board, "DEFINITION", 99)
    assert runs(dataclasses.replace(asked, seed=3)) > 0
    window[0] = 72  # other text
    assert runs() > 0


def test_a_router_of_other_weights_is_trained_again(place, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    asked = Settings(
        methods=("deja-vu",),
        knobs={"rank": 2},
        text=tmp_path / "text.txt",
        window=48,
        boundary=24,
        calibration=2,
        test=2,
    )
    trained = []
    plan = Context.plan
    monkeypatch.setattr(Context, "plan", lambda self, *a, **k: (trained.append(1), plan(self, *a, **k))[1])
    monkeypatch.setattr(fitting, "foresight", lambda *a, **k: {})

    def trains():
        trained.clear()
        fitting.fit(place_now, asked, None, tmp_path / "plan")
        return len(trained)

    place_now = place()
    assert trains() == 1 and trains() == 0
    place(seed=1)
    assert trains() == 1 and trains() == 0
    monkeypatch.setattr(fitting, "DEFINITION", 99)
    assert trains() == 1


class Counted(Study):
    """A study that counts how often it runs."""

    name = "counted"
    claim = prediction = refutation = "it is counted"
    conditions = (Condition("all", "nothing", "above", 0.0, 0.1),)
    seen: list[float] = []  # noqa: RUF012

    def observe(self, setup: Setup):
        def look():
            value = float(next(setup.subject.model.parameters()).detach().double().sum())
            Counted.seen.append(value)
            return {"sum": np.array([value])}

        return setup.part("counted/sum", look)

    def analyse(self, observed) -> Finding:
        return Finding({}, details={"sum": float(observed["sum"][0])})


def test_studies_of_other_weights_run_again(place, tmp_path, monkeypatch):
    model = place()
    monkeypatch.setattr(running, "plan", lambda names, models, quick: [(Counted(), model)])

    def observed(**more):
        Counted.seen.clear()
        (row,) = running.run([], [], tmp_path / "out", **more)
        return row, len(Counted.seen)

    (first, once), (again, never) = observed(), observed()
    assert (once, never) == (1, 0) and again == first
    assert observed(again=True)[1] == 0  # analysed again, from what was observed
    place(seed=1)
    second, once = observed()
    assert once == 1 and second.made_from != first.made_from
    monkeypatch.setattr(Counted, "definition", 2)
    assert observed()[1] == 1


def test_coverage_of_another_examination_is_not_taken(tmp_path, monkeypatch):
    examined = []

    def survey(types, **more):
        examined.extend(types)
        return ({"architecture": t, "taken": True} for t in types)

    monkeypatch.setattr(coverage, "survey", survey)
    for known in (["llama"], ["llama"], ["llama", "opt"]):
        coverage.run(known, tmp_path / "c.jsonl")
    assert examined == ["llama", "opt"]
    monkeypatch.setattr(coverage, "DEFINITION", 99)
    coverage.run(["llama"], tmp_path / "c.jsonl")
    assert examined == ["llama", "opt", "llama"]


def test_a_profile_of_another_model_is_refused(tmp_path):
    context = Context.open("relu", Settings(window=48, boundary=24, calibration=2, test=2))
    profile(context.loaded.model, context.split.calibration).save(tmp_path)
    context.use_profile(tmp_path)
    other = Context.open("gelu", Settings(window=48, boundary=24, calibration=2, test=2))
    with pytest.raises(UserError, match="made from another model than 'gelu'"):
        other.use_profile(tmp_path)


def _append(path, who):
    for n in range(50):
        records.append(path, records.stamp(kind="environment", command=f"{who} {n}"))


def test_two_processes_append_to_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path / "r.jsonl", who)) for who in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [row.command for row in records.read(tmp_path / "r.jsonl")]
    assert sorted(found) == sorted(f"{who} {n}" for who in "abc" for n in range(50))


def test_a_record_that_another_process_writes_meanwhile_stays(place, tmp_path, monkeypatch):
    """A second study ends while this one is running, in the same folder."""
    file, model = tmp_path / "studies.jsonl", place()
    other = records.stamp(kind="study", name="other", verdict="HOLDS", model=model, seed=0)
    observe = Counted.observe

    def meanwhile(self, setup):
        records.append(file, other)
        return observe(self, setup)

    monkeypatch.setattr(Counted, "observe", meanwhile)
    monkeypatch.setattr(running, "plan", lambda names, models, quick: [(Counted(), model)])
    (row,) = running.run([], [], tmp_path)
    assert records.read(file) == [other, row]
