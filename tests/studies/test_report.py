"""The report's section on the paper, from records of the synthetic observations."""

import re

import pytest

from moyu.reporting import paper, render
from moyu.research import studies, theory
from moyu.research.studies.base import Setup
from moyu.research.studies.running import record
from studies.synthetic import CASES


@pytest.fixture(scope="module")
def rows():
    patch = pytest.MonkeyPatch()
    patch.setattr(theory.bootstrap, "__kwdefaults__", {"resamples": 50, "seed": 0})
    chosen = ("texts", "figure1", "figure2", "over_activation", "decay", "root_cause", "dominance")
    found = []
    for name in chosen:
        study = studies.study(name)
        for case in CASES[name][: 2 if name == "dominance" else 1]:
            found.append(record(study, Setup(None if study.needs == "nothing" else "relu"), study.analyse(case), 1.0))
    patch.undo()
    return found


def test_failures_stand_beside_what_holds(rows):
    line = paper.headline(rows)
    assert line == (
        "7 hold: texts, figure1, figure2 (relu), over_activation (relu), decay (relu), root_cause, dominance (relu); "
        "1 fail: dominance (relu); 0 stay open."
    )


def test_every_figure_is_drawn_from_its_record(rows):
    found = paper.section(rows)
    assert found is not None
    titles = [f.title for f in found.figures]
    maps = [t for t in titles if t.startswith("Figure 2")]
    assert titles[0] == "Figure 1: the kinds of dynamic activation" and len(maps) == 6
    assert {"Exact zeros in training", "Loss against neurons kept, relu"} <= set(titles)
    curves = next(f for f in found.figures if f.title == "Exact zeros in training")
    assert curves.svg.count("<polyline") == 7  # a curve an activation function
    for kind in ("TDA", "RODA", "RIDA", "sRIDA"):
        assert f">{kind}: " in found.figures[0].svg


def test_heat_map_shows_its_numbers():
    lines = ["0009", "9000"]
    svg = paper.heat(lines, "a map")
    pieces = re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)", svg)
    assert pieces == [("330.0", "0", "440.0"), ("0.0", "4", "110.0")]


def test_page_shows_verdicts_conditions_and_texts(rows):
    page = render(rows)
    assert "The paper</h2>" in page and "1 fail: dominance (relu)" in page
    assert "Model of" in page and ">by attention<" in page
    assert "<script" not in page


def test_no_studies_no_section():
    assert paper.section([]) is None
