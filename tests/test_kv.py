"""KV policies of skipped heads: each means the same in one masked pass and in steps, and what it says it means."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import moyu
from equality import LENGTH, PROMPT, assert_same_masks, one_pass, padded, plan_for, stepwise
from moyu import kernels, methods
from moyu.engine.applied import Applied
from moyu.engine.choosers import Counter, Recorder, Replayer
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.methods.heads import KV_POLICIES
from moyu.model import dissect
from moyu.plan import Plan
from tiny import build, tokens

OTHERS = [policy for policy in KV_POLICIES if policy != "full"]
STRUCTURES = ["llama", "opt-relu"]  # grouped keys and rotary angles; biases and learned positions


def heads(policy):
    return methods.method("deja-vu-heads", kv=policy)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("policy", OTHERS)
def test_masked_equals_steps(policy, structure):
    model = build(structure)
    plan = plan_for(model, heads(policy))
    ids, mask = padded(3)
    whole, steps = Recorder(), Recorder()
    expected = one_pass(model, plan, ids, mask, recorder=whole)
    actual = stepwise(model, plan, ids, mask, recorder=steps, chunks=2)
    assert_same_masks(whole, steps)
    chosen = torch.stack([m for masks in whole.masks.values() for m in masks.values()])
    assert 0.2 < chosen.float().mean() < 0.8 and len(chosen.unique(dim=0)) > 1
    assert (expected - actual)[mask.bool()].abs().max() < 1e-10
    full = one_pass(model, plan_for(model, heads("full")), ids, mask)
    if structure == "opt-relu":  # heads are not grouped, so the routers are the same
        assert ((expected - full)[mask.bool()].abs().max() < 1e-10) == (policy == "recompute")


@pytest.mark.parametrize("policy", OTHERS)
def test_the_best_back_end_says_the_same(policy):
    model = build("llama", torch.float32)
    plan = plan_for(model, heads(policy))
    ids, mask = padded(3)
    recorder = Recorder()
    expected = one_pass(model, plan, ids, mask, recorder=recorder)
    actual = stepwise(model, plan, ids, mask, backend="auto", chooser=Replayer(recorder))
    scale = float(expected[mask.bool()].abs().max())
    assert (expected - actual)[mask.bool()].abs().max() <= 1e-5 * scale


@torch.no_grad()
def with_attention(model, policy, mask, cut):
    """Logits of (1, T) ids where `mask` (T, 2) says which groups of layer 1 are kept, written out by hand for llama."""
    layer = model.model.layers[1].self_attn
    width, before = layer.head_dim, layer.forward

    def by_hand(hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        length = hidden_states.shape[1]
        split = lambda x: x.view(1, length, -1, width).transpose(1, 2)  # noqa: E731
        q, k, v = (split(m(hidden_states)) for m in (layer.q_proj, layer.k_proj, layer.v_proj))
        kept = mask.t()[None, :, :, None]  # (1, groups, T, 1)
        if policy == "zero":
            k, v = k * kept, v * kept
        if policy == "carry":
            for t in range(1, length):
                v[:, :, t] = torch.where(kept[:, :, t], v[:, :, t], v[:, :, t - 1])
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * layer.scaling
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        if policy == "hole":
            gone = ~mask.t().repeat_interleave(2, 0)[None, :, None, :] & ~torch.eye(length, dtype=torch.bool)
            hidden = hidden | gone
        out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        out = out * kept.repeat_interleave(2, 1)
        return layer.o_proj(out.transpose(1, 2).reshape(1, length, -1)), None

    layer.forward = by_hand
    try:
        return model(cut, use_cache=False).logits
    finally:
        layer.forward = before


@pytest.mark.parametrize("policy", list(KV_POLICIES))
def test_each_policy_is_what_it_says(policy):
    """Against attention written out: which keys and values later queries meet."""
    model = build("llama")
    plan = plan_for(model, heads(policy))
    ids = tokens(1, LENGTH)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(LENGTH, 2, generator=generator) < 0.5
    kept[:3] = True

    def chooser(site, mask, rows, oracle):
        if site.layer != 1:
            return torch.ones_like(mask)
        return kept if mask.shape[1] == 2 else kept.repeat_interleave(2, 1)

    with torch.no_grad(), Applied(model, plan, engine="mask") as applied, applied.prompt(0):
        with applied.watched(chooser=chooser):
            actual = model(ids, use_cache=False).logits
    expected = with_attention(model, "full" if policy == "recompute" else policy, kept, ids)
    assert (actual - expected).abs().max() < 1e-10


def test_a_plan_says_its_policy_and_what_is_left_to_read(tmp_path):
    model = build("llama", torch.float32)
    full = {k["context"]: k["bytes"] for k in accounting.kv_bytes(model)}
    read = {}
    for policy in OTHERS:
        plan = plan_for(model, heads(policy))
        assert plan.kv_policy == policy == Plan.load(plan.save(tmp_path / policy)).kv_policy
        assert Plan.load(tmp_path / policy).hash == plan.hash
        read[policy] = {k["context"]: k["bytes"] for k in plan.calibration["kv_bytes"]}
        assert list(read[policy]) == list(full) and read[policy][0] == 0
    assert "kv_bytes" not in plan_for(model, heads("full")).calibration
    half = {context: size / 2 for context, size in full.items()}  # one of two groups at every token
    assert read["zero"] == read["carry"] == pytest.approx(half)
    assert read["hole"][8192] < read["zero"][8192] < read["recompute"][8192] < full[8192]
    with pytest.raises(moyu.UserError, match="full, hole, zero, recompute, carry"):
        heads("dropped")


@pytest.mark.parametrize("policy", OTHERS)
def test_what_is_left_out_is_not_read(policy):
    """Rows of k and v that the policy leaves out are in the kernels' count, as in the formula's."""
    model = build("llama", torch.float32)
    read, skipped = [], []
    for sparsity in (0.0, 0.5):
        plan = plan_for(model, heads(policy), sparsity=sparsity)
        with torch.no_grad(), Applied(model, plan) as applied, applied.prompt(PROMPT):
            cache = model(tokens(1, PROMPT), use_cache=True).past_key_values
            counter = Counter(1, PROMPT + 1)
            with applied.watched(chooser=counter), kernels.count_bytes() as counted:
                model(tokens(1, 1), past_key_values=cache)
        read.append(counted.total)
        skipped.append(counter.skipped_bytes)
    assert read[0] - read[1] == skipped[1] > 0 == skipped[0]
    linears = {"carry": "qvo"}.get(policy, "qkvo")
    pieces = dissect.dissect(model).blocks[0].pieces
    assert skipped[1] == 3 * sum(pieces[n].weight.nbytes for n in linears) / 2


def test_matched_oracle_and_random_run_under_a_policy():
    model = build("llama")
    quality = moyu.evaluate(model, plan_for(model, heads("hole")), Windows(tokens(8, 40, seed=5), 20))
    assert quality.oracle.kl.mean() < quality.method.kl.mean()
    assert not torch.equal(quality.random.kl, quality.method.kl)


@pytest.mark.parametrize("policy", OTHERS)
def test_memory_follows_the_cache(policy):
    """Beams, rolling back and copies: what is missing is missed in the right sequence, at the right place."""
    model = build("llama")
    plan = plan_for(model, heads(policy))
    ids, _ = padded(2)
    ids = tokens(2, LENGTH)
    with torch.no_grad(), Applied(model, plan, backend="reference") as applied, applied.prompt(PROMPT):
        cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
        for t in range(PROMPT, PROMPT + 3):
            model(ids[:, t : t + 1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-1)
        logits = [model(ids.flip(0)[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT + 2, LENGTH)]
    expected = stepwise(model, plan, ids.flip(0), torch.ones_like(ids))
    assert (torch.cat(logits, 1) - expected[:, PROMPT + 2 :]).abs().max() < 1e-10


def test_fused_keys_and_values_have_no_policy_but_full():
    model = build("phi3")
    with pytest.raises(moyu.UserError, match="nothing to skip"):
        plan_for(model, heads("hole"))
    assert dataclasses.replace(heads("hole"), kv="full").sites(dissect.dissect(model).blocks[0])
