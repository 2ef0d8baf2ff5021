"""Skipping whole heads: rows of q and columns of o, grouped-query attention included; k and v stay whole."""

from __future__ import annotations

import pytest
import torch

import moyu
from equality import PROMPT, assert_same_masks, one_pass, padded, plan_for, positions, stepwise
from fixtures_methods import FIXTURES
from moyu import kernels
from moyu.engine.applied import Applied
from moyu.engine.choosers import Counter, Recorder, Replayer
from moyu.engine.rows import MAX_SKIPPING_ROWS
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.model import dissect
from tiny import build, tokens

HEADS = FIXTURES["heads"]
GROUPED = ["llama", "mixtral"]  # 4 query heads on 2 of keys and values
STRUCTURES = [*GROUPED, "opt-relu", "gpt2", "phi3"]  # separate, and fused into one linear


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_masked_equals_skipped(structure, batch):
    model = build(structure)
    plan = plan_for(model, HEADS)
    ids, mask = padded(batch)
    whole, steps = Recorder(), Recorder()
    expected = one_pass(model, plan, ids, mask, recorder=whole)
    actual = stepwise(model, plan, ids, mask, recorder=steps)
    assert_same_masks(whole, steps)
    chosen = torch.stack([m for masks in whole.masks.values() for m in masks.values()])
    assert 0.2 < chosen.float().mean() < 0.8 and len(chosen.unique(dim=0)) > 3
    assert (expected - actual)[mask.bool()].abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", ["llama", "opt-relu", "gpt2", "phi3"])
def test_masked_equals_skipped_on_the_best_back_end(structure, dtype):
    model = build(structure, dtype)
    plan = plan_for(model, HEADS)
    ids, mask = padded(3)
    recorder = Recorder()
    expected = one_pass(model, plan, ids, mask, recorder=recorder)
    actual = stepwise(model, plan, ids, mask, backend="auto", chooser=Replayer(recorder))
    scale = float(expected[mask.bool()].abs().max())
    assert (expected - actual)[mask.bool()].abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * scale


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sparsity_zero_is_dense(structure):
    model = build(structure)
    ids, mask = padded(3)
    with torch.no_grad():
        dense = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    plan = plan_for(model, HEADS, sparsity=0.0)
    for logits in (one_pass(model, plan, ids, mask), stepwise(model, plan, ids, mask)):
        assert (logits - dense)[mask.bool()].abs().max() < 1e-10


@pytest.mark.parametrize("engine", ["mask", "skip"])
@pytest.mark.parametrize("structure", GROUPED)
def test_a_skipped_head_is_as_if_its_columns_of_o_were_zero(structure, engine):
    model = build(structure)
    plan = plan_for(model, HEADS)
    ids = tokens(1, MAX_SKIPPING_ROWS)
    without = {"layer0.attn_in.heads.q+o": [1], "layer2.attn_in.heads.q+o": [0, 3]}

    def chooser(site, chosen, rows, oracle):
        chosen = torch.ones_like(chosen)
        chosen[:, without.get(site.key, [])] = False
        return chosen

    with torch.no_grad(), Applied(model, plan, backend="reference", engine=engine) as applied:
        with applied.prompt(0), applied.watched(chooser=chooser):
            actual = model(ids, use_cache=False).logits
    width = model.config.hidden_size // model.config.num_attention_heads
    for key, heads in without.items():
        weight = model.model.layers[int(key[5])].self_attn.o_proj.weight
        for head in heads:
            weight.data[:, head * width : (head + 1) * width] = 0
    with torch.no_grad():
        assert (actual - model(ids).logits).abs().max() < 1e-10


@pytest.mark.parametrize("structure", ["llama", "opt-relu", "phi3"])
def test_skipped_bytes_are_not_read(structure):
    """What the kernels count less than in a dense step is what the formula says; biases of q come on top of it."""
    model = build(structure, torch.float32)
    read, counters = [], []
    for sparsity in (0.0, 0.5):
        plan = plan_for(model, HEADS, sparsity=sparsity)
        with torch.no_grad(), Applied(model, plan) as applied, applied.prompt(PROMPT):
            cache = model(tokens(1, PROMPT), use_cache=True).past_key_values
            counters.append(Counter(1, PROMPT + 1))
            with applied.watched(chooser=counters[-1]), kernels.count_bytes() as counted:
                model(tokens(1, 1), past_key_values=cache)
        read.append(counted.total)
    biases = 0.0
    if structure == "opt-relu":
        blocks = dissect.dissect(model).blocks
        biases = counters[1].sparsity * sum(b.pieces["q"].bias.nbytes for b in blocks)
    assert read[0] - read[1] == counters[1].skipped_bytes + biases > 0 == counters[0].skipped_bytes
    assert 0 < accounting.floor(model, dissect.dissect(model), HEADS) < 1


def test_many_rows_run_masked():
    """More rows than the kernels serve: the same masks, as dense products."""
    model = build("llama")
    plan = plan_for(model, HEADS)
    ids, mask = padded(MAX_SKIPPING_ROWS + 1)
    mask[:], ids = 1, tokens(MAX_SKIPPING_ROWS + 1, ids.shape[1])
    assert (one_pass(model, plan, ids, mask) - stepwise(model, plan, ids, mask)).abs().max() < 1e-10


def test_the_matched_oracle_knows_what_a_head_adds():
    model = build("llama")
    quality = moyu.evaluate(model, plan_for(model, HEADS), Windows(tokens(8, 40, seed=5), 20))
    assert quality.oracle.kl.mean() < quality.method.kl.mean()
    assert quality.oracle.kl.mean() < quality.random.kl.mean()


def test_generate_skips_heads():
    model = build("llama", torch.float32)
    plan = plan_for(model, HEADS)
    written = {}
    for engine in ("mask", "skip"):
        with moyu.apply(model, plan, engine=engine):
            written[engine] = model.generate(tokens(2, PROMPT), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(written["mask"], written["skip"])
