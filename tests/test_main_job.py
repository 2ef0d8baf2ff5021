"""What makes the main job fast leaves its results as they were: one run a layer, one dense run, references on fewer windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moyu import methods
from moyu.calibration.layers import LayerFit
from moyu.calibration.settings import MATCHED, SMALL, WINDOWS, Settings
from moyu.calibration.streams import Chain
from moyu.calibration.walk import calibrate
from moyu.commands import output
from moyu.measure.evaluation import evaluate, evaluate_all
from moyu.measure.windows import Windows
from moyu.methods.selection import top_k
from moyu.model.dissect import dissect
from tiny import build, tokens

TEXT = Windows(tokens(4, 40), 20)
IN_FLIGHT = ("teal", "cats", "countdown", "chess", "larosa", "cett", "wina", "r-sparse", "estimate", "deja-vu")


def planned(model, name: str, **options):
    return calibrate(model, methods.method(name), TEXT, sparsity=0.5, name="tiny", **options)


@pytest.mark.parametrize("name", IN_FLIGHT)
@pytest.mark.parametrize("bias", [False, True])
def test_sites_fitted_in_one_run_are_those_of_a_run_for_every_stage(name, bias, monkeypatch):
    model = build("llama", torch.float32)
    at_once = planned(model, name, bias=bias)
    monkeypatch.setattr(LayerFit, "flows", property(lambda self: False))
    assert at_once.hash == planned(model, name, bias=bias).hash


def test_a_layer_runs_once_for_teal_behind_the_dense_run():
    model, runs = build("llama", torch.float32), []
    anatomy = dissect(model)
    hooks = [layer.register_forward_hook(lambda *_, n=n: runs.append(n)) for n, layer in enumerate(model.model.layers)]
    planned(model, "teal", anatomy=anatomy)
    for hook in hooks:
        hook.remove()
    assert sorted(runs) == sorted([*range(len(model.model.layers))] * 2)


class Known(nn.Module):
    def __init__(self, y: torch.Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.y


def test_a_layer_that_reads_an_input_before_it_is_shown_is_fitted_stage_by_stage(monkeypatch):
    """Here v runs before q, which shows what both read: v would miss its own mask, and the sites behind it with it."""
    model = build("llama", torch.float32)
    usual = planned(model, "teal")
    for layer in model.model.layers:
        attention = layer.self_attn
        inner, v = attention.forward, attention.v_proj

        def early(hidden_states, *args, inner=inner, attention=attention, v=v, **kwargs):
            attention.v_proj = Known(v(hidden_states))
            try:
                return inner(hidden_states, *args, **kwargs)
            finally:
                attention.v_proj = v

        monkeypatch.setattr(attention, "forward", early)
    found = planned(model, "teal")
    assert {key: part[1].rule for key, part in found.parts.items()} == {
        key: part[1].rule for key, part in usual.parts.items()
    }


def test_calibrations_share_a_dense_run():
    model, chains = build("llama", torch.float32), dict[str, Chain]()
    anatomy = dissect(model)
    first = planned(model, "teal", chains=chains, anatomy=anatomy)
    assert list(chains) == [TEXT.digest]
    runs = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: runs.append(0))
    again = planned(model, "teal", chains=chains, anatomy=anatomy)
    hook.remove()
    assert len(runs) == 1 and again.hash == first.hash


def test_plans_evaluated_together_score_as_each_alone():
    model = build("llama", torch.float32)
    plans = {name: planned(model, name) for name in ("teal", "griffin", "popularity")}
    together = evaluate_all(model, plans, TEXT, batch=2)
    for name, plan in plans.items():
        alone = evaluate(model, plan, TEXT, batch=2)
        for kind in ("dense", "method", "random", "oracle"):
            assert torch.equal(getattr(together[name], kind).kl, getattr(alone, kind).kl), (name, kind)
        assert together[name].byte_fraction == alone.byte_fraction


@pytest.mark.parametrize("batch", [2, 4])
def test_references_on_fewer_windows_are_those_of_the_first_ones(batch):
    model = build("llama", torch.float64)
    plan = planned(model, "teal")
    everything, few = evaluate(model, plan, TEXT, batch=batch), evaluate(model, plan, TEXT, matched=3, batch=batch)
    assert torch.equal(few.method.kl, everything.method.kl)
    for kind in ("random", "oracle"):
        own, whole = getattr(few, kind), getattr(everything, kind)
        assert len(own.kl) == 3
        torch.testing.assert_close(own.kl, whole.kl[:3], rtol=0, atol=1e-10)  # another number of rows, other sums


@given(
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
def test_the_highest_scores_are_kept_and_ties_go_to_the_lower_index(width, seed, dtype, tied):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, width, generator=generator).to(dtype)
    scores = scores.round() if tied else scores
    counts = torch.randint(0, width + 1, (5,), generator=generator)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    wanted = torch.zeros_like(scores, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        wanted[row, order[row, :count]] = True
    assert torch.equal(top_k(scores, counts), wanted)


def test_large_models_have_fewer_windows_on_a_cpu_alone():
    assert Settings().windows(SMALL) == WINDOWS
    assert Settings().windows(2 * SMALL) == (WINDOWS[0] // 2, WINDOWS[1] // 2)
    assert Settings().windows(100 * SMALL) == (4, 8)
    assert Settings(device="cuda").windows(100 * SMALL) == WINDOWS
    assert Settings(calibration=3, test=5).windows(100 * SMALL) == (3, 5)
    assert Settings().matched(MATCHED / 8) == 8 and Settings(test=6).matched(MATCHED) is True


def test_lines_of_progress_say_how_much_is_done_and_what_is_left(capsys, monkeypatch):
    now = iter([0.0, 1.0, 12.0, 13.0, 40.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(now))
    with output.progress() as stage:
        for done in (0, 1, 3, 4, 10):
            stage("evaluate", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "moyu: evaluate",
        "moyu: evaluate, 3 of 10, 28 s left",
        "moyu: evaluate, all 10 after 40 s",
    ]
