"""Attention proved in numbers: which linears are its, which heads it has; columns and heads skip what masking masks."""

from __future__ import annotations

import pytest
import torch

from fixtures_methods import FIXTURES
from moyu import kernels
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.choosers import Recorder, Replayer
from moyu.measure.windows import Windows
from moyu.methods import method
from moyu.model import dissect
from moyu.research.coverage import shrinking
from tiny import build, tokens

# structure -> a type of transformers, the linears, heads, groups that share keys and values, rows of a head that can be skipped.
STRUCTURES = {
    "separate, grouped": ("mistral", "q k v o", 4, 2, 16),
    "fused, one after another": ("phi3", "qkv o", 4, 4, 16),
    "fused, by group": ("gpt_neox", "qkv o", 4, 4, 16),
    "fused, one group": ("falcon", "qkv o", 4, 1, 16),
    "fused, in four parts": ("codegen", "qkv o", 4, 4, 16),
    "fused, stored transposed": ("gpt2", "qkv o", 4, 4, None),
    "over two modules": ("bert", "q k v o", 4, 4, 16),
    "gated within q": ("qwen3_next", "q k v o", 4, 2, 32),
    "gated by a linear": ("afmoe", "q k v g o", 4, 4, 16),
    "latent": ("minicpm3", "q_a q_b kv_a kv_b o", 4, 4, 24),
    "latent, beside an indexer": ("deepseek_v32", "q_a q_b kv_a kv_b o", 4, 4, 24),
    "latent, gate within the query": ("axk2", "q_a q_b kv_a kv_b o", 4, 4, 40),
    "keys and values latent": ("kimi_linear", "q kv_a kv_b o", 4, 4, 24),
    "sinks": ("gpt_oss", "q k v o", 4, 2, 16),
    "norm over all heads": ("olmo2", "q k v o", 4, 4, None),
    "keys of another layer": ("gemma3n_text", "q o", 4, 1, 16),
    "beside a mixer": ("falcon_h1", "q k v o", 4, 2, 16),
}
RUN = ("qwen3_next", "minicpm3", "olmo2", "codegen")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure(structure):
    name, linears, heads, groups, rows = STRUCTURES[structure]
    anatomy = dissect.dissect(shrinking.build(name))
    block = [b for b in anatomy.blocks if "o" in b.pieces][-1]
    assert set(block.pieces) - {"gate", "up", "down"} == set(linears.split())
    assert (block.heads, block.kv_heads) == (heads, groups)
    assert (None if block.head_rows is None else block.head_rows.shape[1]) == rows


@pytest.mark.parametrize("name", ["bamba", "minimax", "kimi_linear"])
def test_mixers_are_left_alone_and_named(name):
    anatomy = dissect.dissect(shrinking.build(name))
    mixers = [b for b in anatomy.blocks if "o" not in b.pieces]
    gaps = [g for g in anatomy.gaps if "none of them weighs earlier tokens as a query does" in g]
    assert mixers and [int(g.split(":")[0].removeprefix("layer ")) for g in gaps] == [b.layer for b in mixers]


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("shape", ["columns", "heads"])
def test_skipped_equals_masked_and_reads_less(name, shape):
    """With replayed masks, so that nothing but the order of sums may differ."""
    model = shrinking.build(name)
    chosen = method("teal") if shape == "columns" else FIXTURES["heads"]
    anatomy = dissect.dissect(model)
    plans = [calibrate(model, chosen, Windows(tokens(4, 24), 4), sparsity=s, anatomy=anatomy) for s in (0.0, 0.5)]
    sites = [s for s in plans[1].sites() if s.linears[-1] not in ("gate", "up", "down")]
    assert len(sites) >= len([b for b in anatomy.blocks if "o" in b.pieces])
    ids, read, logits = tokens(1, 6), [], {}
    recorder = Recorder()
    for plan, engine, chooser in (
        (plans[0], "skip", None),
        (plans[1], "mask", recorder),
        (plans[1], "skip", Replayer(recorder)),
    ):
        with torch.no_grad(), Applied(model, plan, engine=engine, anatomy=anatomy, check=False) as applied:
            with applied.prompt(0), applied.watched(chooser=chooser):
                logits[len(read)] = model(input_ids=ids, use_cache=False).logits
            with applied.prompt(0), kernels.count_bytes() as counted:
                model(input_ids=ids[:, :1], use_cache=False)
        read.append(counted.total)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
    allowed = 1e-5 * float(dense.abs().max())  # float32
    assert (logits[0] - dense).abs().max() < allowed
    assert (logits[1] - logits[2]).abs().max() < allowed < 0.1 * (logits[1] - dense).abs().max()
    assert 0 < read[2] < read[0]


def test_a_head_that_is_not_where_it_should_be_is_not_taken():
    """Two heads' outputs exchanged before o: rows of q no longer belong to the columns of o with their number."""
    model = build("llama", torch.float32)
    order = torch.cat([torch.arange(16, 32), torch.arange(16), torch.arange(32, 64)])

    class Exchanged(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight)[..., order]

    for layer in model.model.layers:
        old = layer.self_attn.q_proj
        layer.self_attn.q_proj = new = Exchanged(64, 64, bias=False)
        new.weight = torch.nn.Parameter(old.weight[order.argsort()])
    blocks = dissect.dissect(model).blocks
    assert all("q" not in b.pieces and b.head_rows is None for b in blocks)
