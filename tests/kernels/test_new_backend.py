"""A new back end is one object and one line: asked for by its name, it computes what the reference computes."""

import pytest
import torch

import moyu
from equality import plan_for
from moyu import kernels, methods
from moyu.engine.applied import Applied
from moyu.kernels import choosing
from moyu.kernels.choosing import BACKENDS
from moyu.kernels.reference import Reference
from moyu.model import machine
from tiny import build, tokens


class Counting(Reference):
    """The reference under another name, which counts its calls and refuses 16-bit floats."""

    name = "counting"

    def __init__(self):
        self.calls = 0

    def supports(self, op, format, x):
        return "it has no 16-bit floats" if x.dtype.itemsize == 2 else None

    def rows(self, *args):
        self.calls += 1
        return super().rows(*args)

    def columns(self, *args):
        self.calls += 1
        return super().columns(*args)


@pytest.fixture
def counting(monkeypatch):
    backend = Counting()
    monkeypatch.setitem(BACKENDS, backend.name, backend)  # the one line
    return backend


def test_a_plan_decodes_on_it(counting):
    model, ids = build("llama", torch.float32), tokens(1, 8)
    plan = plan_for(model, methods.method("teal"))
    texts = {}
    for name in ("reference", "counting"):
        with Applied(model, plan, backend=name) as applied:
            texts[name] = [int(t) for t in moyu.generate(applied, ids, max_new_tokens=6)]
            assert f"back end {name!r} has no native step" in applied.traces.summary()
    assert texts["counting"] == texts["reference"] and counting.calls > 0


def test_auto_is_the_back_end_that_the_code_around_asks_for(counting):
    """The commands whose plans are simulated ask for theirs so."""
    model, seen = build("llama", torch.float32), []
    plan = plan_for(model, methods.method("teal"))
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(choosing._asked.get()))
    for backend, used in (("auto", "counting"), ("reference", "reference")):
        with kernels.use("counting"), Applied(model, plan, engine="mask", backend=backend) as applied, torch.no_grad():
            with applied.prompt(2):
                model(tokens(1, 4))
        assert seen[-1] == used


def test_it_is_named_where_back_ends_are_named_and_obeyed(counting):
    assert machine.backend_of("counting") == "counting"
    assert kernels.available()["counting"] is None
    x, weight = torch.randn(1, 64, dtype=torch.bfloat16), torch.randn(8, 64, dtype=torch.bfloat16)
    with kernels.use("counting"), pytest.raises(RuntimeError, match="no 16-bit floats"):
        kernels.rows(x, weight)
