"""What the studies measure on the embedded models: identities that must be exact, and that a run can be resumed."""

import json

import numpy as np
import pytest
import torch

import tiny as tiny_models
from moyu import records
from moyu.commands.cli import app
from moyu.errors import UserError
from moyu.model.loading import Loaded
from moyu.research import studies, theory
from moyu.research.studies import domains, figure2, paraphrases, running, tiny
from moyu.research.studies.base import Setup
from moyu.research.studies.dominance import attention_received
from moyu.research.studies.over_activation import least, masked_losses
from moyu.research.studies.router_diversity import _slopes
from moyu.research.studies.subject import Subject


@pytest.fixture(scope="module")
def relu():
    return Subject.open("relu")


@pytest.fixture(scope="module")
def texts(relu):
    return domains.windows(relu, "library", 3, 24)


@pytest.mark.parametrize("model", ["relu", "swiglu"])
def test_feeding_with_a_cache_is_one_parallel_pass(model, texts):
    subject = Subject.open(model)
    parallel, stepwise = (figure2.fed(subject, texts, arm) for arm in ("PAR", "SEQ-KV"))
    assert float((parallel - stepwise).abs().max() / parallel.abs().max()) < 1e-5
    assert theory.jaccard(subject.active(parallel), subject.active(stepwise)).mean() > 0.999
    alone = figure2.fed(subject, texts, "SEQ-ISO")
    assert theory.jaccard(subject.active(parallel), subject.active(alone)).mean() < 0.9  # a history is something else
    torch.testing.assert_close(alone[:, :, 0], parallel[:, :, 0], rtol=1e-4, atol=1e-4)  # the first token has none yet


def test_values_are_the_networks_own(relu, texts):
    values = relu.values(texts)
    output = relu.values(texts, tap="mlp_in")
    block = relu.blocks[0]
    up = block.pieces["up"]
    torch.testing.assert_close(values[0], torch.relu(output[0] @ up.weight.t() + up.bias), rtol=1e-4, atol=1e-4)
    assert values.shape == (6, 3, 24, 1024)


def test_saliency_is_the_change_of_the_loss(relu, texts):
    values, gradients = relu.saliencies(texts[:1])
    expected = 24 * float(theory.sign_statistic(values[-1, 0], gradients[-1, 0]).sum())
    module = relu.blocks[-1].pieces["down"].module  # no ReLU behind it, whose kinks would blur the difference
    losses = []
    for factor in (0.99, 1.01):
        hook = module.register_forward_pre_hook(lambda m, inputs, factor=factor: (inputs[0] * factor,))
        try:
            with torch.no_grad():
                losses.append(float(relu.losses(texts[:1])))
        finally:
            hook.remove()
    slope = (losses[1] - losses[0]) / 0.02 * (24 - 5)
    assert slope == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("architecture", ["llama", "opt-relu", "gpt2", "phi3"])
def test_both_sides_of_the_sign_statistic_agree_in_any_architecture(architecture):
    """Equation 7: a dl/da summed over tokens is w dl/dw, stored as (d, f) or (f, d)."""
    model = tiny_models.build(architecture, torch.float32)
    subject = Subject.of(Loaded(architecture, model, tiny.tokenizer()))
    tokens = tiny_models.tokens(2, 24)
    values, gradients = subject.saliencies(tokens)
    downs = [b.pieces["down"] for b in subject.blocks]
    loss = subject.losses(tokens).sum() * (24 - 5)
    by_weight = torch.autograd.grad(loss, [getattr(d.module, d.parameter) for d in downs])
    for piece, gradient, a, g in zip(downs, by_weight, values, gradients, strict=True):
        gradient = gradient.t() if piece.transposed else gradient
        ours = theory.sign_statistic(a.flatten(0, 1), g.flatten(0, 1))
        torch.testing.assert_close(
            ours, theory.sign_statistic_of_weights(piece.weight.detach(), gradient, 48), rtol=1e-3, atol=1e-7
        )


def test_a_model_of_routed_experts_is_refused():
    with pytest.raises(UserError, match="routed experts"):
        Subject.of(Loaded("mixtral", tiny_models.build("mixtral", torch.float32), tiny.tokenizer()))


def test_keeping_all_neurons_changes_nothing_and_none_everything(relu, texts):
    with torch.no_grad():
        dense = relu.losses(texts).numpy()
    all_kept = masked_losses(relu, texts, lambda layer, scores, rows: torch.ones_like(scores, dtype=torch.bool))
    np.testing.assert_allclose(all_kept, dense, rtol=1e-5)
    none = masked_losses(relu, texts, lambda layer, scores, rows: torch.zeros_like(scores, dtype=torch.bool))
    assert none.mean() > dense.mean() + 0.5


def test_least_kept_fraction_is_where_the_loss_comes_within_reach():
    kept = np.array([0.1, 0.2, 0.4, 1.0])
    losses = np.array([[2.0, 1.5, 1.0, 1.0], [2.0, 1.5, 1.0, 1.0]])
    assert least(losses, kept) == pytest.approx(0.4 - 0.2 * 0.01 / 0.5)
    assert least(np.ones((2, 4)), kept) == 0.1
    bump = np.array([[1.0, 1.0, 3.0, 1.0]])
    assert least(bump, kept) > 0.9  # not monotone: what is needed is needed from the last excess on


def test_attention_received_is_a_mean_of_distributions(relu, texts):
    received = attention_received(relu, texts[0])
    total = float((received * torch.arange(24, 0, -1)).sum())
    assert total == pytest.approx(24, rel=1e-4)  # 24 queries, each of which gives away 1


def test_slopes_of_recall_are_a_doubling():
    assert _slopes(np.array([[0.9, 0.8, 0.7, 0.6]])) == pytest.approx(-0.1)


def test_domains_are_windows_of_documents_of_their_own(relu):
    first, second = domains.windows(relu, "json", 3, 16), domains.windows(relu, "json", 3, 16, skip=3)
    assert first.shape == (3, 16) and (first[:, 0] == relu.bos).all()
    assert not any((a[1:] == b[1:]).all() for a in first for b in second)
    with pytest.raises(UserError, match=r"domain 'json' has \d+ documents"):
        domains.windows(relu, "json", 10_000, 16)


def test_byte_model_knows_its_own_text():
    own, other = ["abcabcabc " * 40], "xyzzy plugh " * 20
    model = domains.ByteModel(own)
    assert model.bits(own[0]) < 0.5 < 5 < model.bits(other)


def test_paraphrases_keep_meaning_and_lose_words():
    for source, renamed in paraphrases.programs(3, 0):
        assert compile(renamed, "renamed", "exec") is not None
        assert set(source.split()) & set(renamed.split()) != set(source.split())
    digits, words = paraphrases.sums(1, 0)[0]
    a, b = digits.splitlines()[0].replace("=", " ").split()[0], words.splitlines()[0].split()[0]
    assert domains.spelled(int(a)).split()[0] == b


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("relu", 0.3e6), ("swiglu", 0.3e6)])
def test_tiny_decoders_are_tiny_and_learn(name, limit):
    model = tiny.build(name, 0)
    assert sum(p.numel() for p in model.parameters()) < limit
    who = tiny.subject(name, tiny.train(name, 0, tiny.Arm(), steps=12))
    still = tiny.subject(name, tiny.train(name, 0, tiny.Arm(rate=0.0), steps=2))
    with torch.no_grad():
        learnt, before = (float(s.losses(tiny.probe(2)).mean()) for s in (who, tiny.subject(name, model)))
        assert learnt < before - 0.5
        assert float(still.losses(tiny.probe(2)).mean()) == pytest.approx(before, abs=1e-6)


def test_frozen_networks_stay_and_the_rest_learns():
    before, after = (
        tiny.build("relu", 0).state_dict(),
        tiny.train("relu", 0, tiny.Arm(freeze=True), steps=2).state_dict(),
    )
    for name, tensor in before.items():
        if tensor.dim() > 1:
            assert torch.equal(tensor, after[name]) == ("fc1" in name or "fc2" in name), name


def test_a_stopped_study_goes_on_behind_its_last_part(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": np.arange(3)}

    setup = Setup("relu", cache=tmp_path)
    assert setup.part("a", make)["x"].tolist() == setup.part("a", make)["x"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    Setup("gelu", cache=tmp_path).part("a", make)
    Setup("relu", quick=True, cache=tmp_path).part("a", make)
    assert len(calls) == 3


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch):
    said = []
    first = running.run(["figure1"], [], tmp_path, quick=True, announce=lambda s, m: said.append(s.name))
    second = running.run(["figure1"], [], tmp_path, quick=True, announce=lambda s, m: said.append(s.name))
    assert said == ["figure1"] and first == second
    running.run(["figure1"], [], tmp_path, quick=True, again=True, announce=lambda s, m: said.append(s.name))
    assert said == ["figure1"] * 2
    assert len(records.read(tmp_path / "studies.jsonl")) == 1


def test_plan_leaves_training_out_unless_it_is_asked_for():
    full = {(s.name, m) for s, m in running.plan([], [], quick=False)}
    assert ("root_cause", None) not in full and ("inertia", "gelu") in full
    assert ("router_diversity", "relu, gelu, swiglu") in full
    assert {s.name for s, _ in running.plan([], [], quick=True)} == set(studies.names())


def test_commands(tmp_path):
    from typer.testing import CliRunner

    listed = CliRunner().invoke(app, ["study", "--list"])
    assert all(f"{name}: " in listed.output for name in studies.names())
    done = CliRunner().invoke(app, ["study", "theorem", "--quick", "--json", "--out", str(tmp_path)])
    row = json.loads(done.stdout.strip().splitlines()[-1])
    assert (row["kind"], row["name"], row["verdict"], row["quick"]) == ("study", "theorem", "HOLDS", True)
    with pytest.raises(UserError, match="did you mean theorem"):
        studies.study("theorm")
