"""Weights spread over two processes: a plan gives the tokens of one process, or is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moyu
from moyu import methods
from moyu.measure.windows import Windows
from tiny import build, tokens

pytestmark = pytest.mark.slow  # two more processes that import torch and transformers

# Decided from each site: thresholds on channels, joint norms with top-k, gate, up, the prompt's statistic, a router.
TAKEN = ("teal", "wina", "cats", "countdown", "griffin", "deja-vu")
REFUSED = {"larosa": "basis", "r-sparse": "low_rank", "deja-vu-heads": "heads"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What one process says of each plan, and what two say."""
    folder = tmp_path_factory.mktemp("parallel")
    model = build("llama")
    model.save_pretrained(folder / "model")
    single = {}
    for name in (*TAKEN, *REFUSED):
        plan = moyu.calibrate(model, methods.method(name), Windows(tokens(4, 32), 16), sparsity=0.5, name="tiny")
        plan.save(folder / "plans" / name)
        with moyu.apply(model, plan, engine="mask") as applied:
            out = model.generate(tokens(2, 8), max_new_tokens=8, do_sample=False, pad_token_id=0)
            with torch.no_grad(), applied.prompt(8):
                single[name] = out, model(out).logits
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run(
        [*command, str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return model, single, [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


def test_every_block_is_taken(run):
    _, _, (found, _) = run
    assert found["pieces"] == [sorted(("q", "k", "v", "o", "gate", "up", "down"))] * 3
    assert found["spread"] == [True] * 3


@pytest.mark.parametrize("name", TAKEN)
def test_two_processes_give_what_one_gives(run, name):
    model, single, found = run
    ids, logits = single[name]
    with torch.no_grad():
        dense = model(ids).logits
    assert (dense - logits)[:, 8:].abs().max() > 1e-2  # a run that was silently dense would not pass below
    for each in found:
        assert torch.equal(each[name][0], ids)
        assert (each[name][1] - logits).abs().max() < 1e-9  # float64: one sum more


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_right_is_refused_by_name(run, name):
    for each in run[2]:
        assert name in each[name] and REFUSED[name] in each[name] and "DTensor" in each[name]


def test_kernels_and_calibration_are_refused(run):
    for each in run[2]:
        assert "engine='mask'" in each["skip"]
        assert "calibrate on one process" in each["calibrate"]


def test_afterwards_the_model_is_dense_again(run):
    model, _, found = run
    with torch.no_grad():
        assert all((each["dense"] - model(tokens(2, 16)).logits).abs().max() < 1e-9 for each in found)
