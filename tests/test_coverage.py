"""Surgery by structure: one type of each, built tiny, with every check of `moyu coverage`."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

import moyu
from moyu.calibration import streams
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.measure.windows import Windows
from moyu.methods import method
from moyu.model import dissect
from moyu.research import coverage
from moyu.research.coverage import checks, shrinking
from tiny import build, tokens

# structure -> a type of transformers that has it. What is proved is asserted below, by the kinds of networks found.
STRUCTURES = {
    "gated": ("qwen3", "4 × gated silu"),
    "fused, halves": ("phi3", "4 × gated silu"),
    "fused, by an own name": ("moshi", "gated silu"),
    "Conv1D": ("gpt2", "4 × plain gelu_tanh"),
    "a subclass of Linear": ("falcon", "4 × plain gelu"),
    "inline in the layer": ("opt", "4 × plain relu"),
    "split over two modules": ("bert", "4 × plain gelu"),
    "norm inside": ("bitnet", "4 × gated by its own module"),
    "learned activation": ("apertus", "4 × plain by its own module"),
    "clamped, fused": ("minimax_m3_vl_text", "gated by its own module"),
    "experts, clamped, interleaved, biased, (E, in, out)": ("gpt_oss", "16 × routed gated by its own module"),
    "experts beside a shared one": ("deepseek_v3", "routed gated silu"),
    "experts in the order of their rows": ("llama4_text", "routed gated silu"),
    "experts without a gate": ("nemotron_h", "routed plain relu2"),
    "experts and the row itself; two networks a layer": ("longcat_flash", "8 × gated silu, 16 × routed gated silu"),
    "softcapped experts": ("inkling2_text", "routed gated by its own module"),
    "cut-off of its own": ("gemma3n_text", "gated by its own module"),
    "layers of several stacks, run in cycles": ("hrm_text", "4 × gated silu"),
    "attention and networks in lists apart": ("xlm", "4 × plain gelu"),
    "networks beside recurrent mixers": ("jamba", "gated silu"),
}


@pytest.mark.parametrize(
    "structure",
    [pytest.param(s, marks=pytest.mark.slow if s.startswith(("experts in", "experts,")) else ()) for s in STRUCTURES],
)
def test_structure_is_taken(structure):
    name, networks = STRUCTURES[structure]
    found = checks.examine(name)
    assert found["status"] == "taken", found["reason"]
    assert networks in found["networks"]
    assert {"columns", "neurons"} <= set(found["checks"])


@pytest.mark.parametrize(("name", "status"), [("mamba", "no network"), ("xlnet", "dense"), ("dbrx", "does not build")])
def test_what_is_not_taken_says_why(name, status):
    found = checks.examine(name)
    assert found["status"] == status and not found["taken"] and found["reason"]


class _Clamped(nn.Module):
    """Llama's network, clamped where six tokens do not reach; `broken` mixes rows as well."""

    def __init__(self, inner: nn.Module, broken: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj
        self.broken = broken

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x).clamp(-7.0, 7.0)
        mid = nn.functional.silu(gate) * up
        return self.down_proj(mid.cumsum(1) if self.broken else mid)


def _clamped(broken: bool) -> LlamaForCausalLM:
    model = build("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp = _Clamped(layer.mlp, broken)
    return model.eval()


def test_a_clamp_that_the_probe_does_not_reach_is_kept():
    model = _clamped(broken=False)
    anatomy = dissect.dissect(model)
    assert all(b.act is None and b.middle is not None for b in anatomy.blocks)
    plan = calibrate(model, method("teal"), Windows(tokens(4, 24), 4), sparsity=0.0, anatomy=anatomy)
    with torch.no_grad():
        layer = model.model.layers[0].mlp
        layer.gate_proj.weight *= 100
        expected = model(tokens(1, 4), use_cache=False).logits
        with Applied(model, plan, anatomy=anatomy, check=False) as applied, applied.prompt(0):
            assert torch.allclose(model(tokens(1, 4), use_cache=False).logits, expected, atol=1e-4)


@pytest.mark.parametrize("engine", ["mask", "skip"])
def test_a_plan_means_the_same_where_the_module_makes_the_middle(engine):
    models = build("llama", torch.float32), _clamped(broken=False)
    ids = tokens(1, 5)
    plan = calibrate(models[0], method("estimate", way="svd", rest=2), Windows(tokens(4, 24), 4), sparsity=0.5)
    logits = []
    for model in models:
        with torch.no_grad(), Applied(model, plan, engine=engine, check=False) as applied, applied.prompt(4):
            cache = model(ids[:, :4], use_cache=True).past_key_values
            logits.append(model(ids[:, 4:], past_key_values=cache).logits)
    assert torch.allclose(*logits, atol=1e-4)


def test_rows_that_mix_are_refused_with_the_reason():
    with pytest.raises(moyu.UserError, match="layer 2: no linear takes"):
        dissect.dissect(_clamped(broken=True))


def test_layers_can_be_left_dense_by_hand():
    model = build("llama", torch.float32)
    anatomy = dissect.dissect(model, (0, -1))
    assert [b.has_ffn for b in anatomy.blocks] == [False, True, False]
    assert anatomy.gaps == ["layer 0: left dense as asked", "layer 2: left dense as asked"]
    plan = calibrate(model, method("teal"), Windows(tokens(4, 24), 4), sparsity=0.5, anatomy=anatomy)
    assert {s.layer for s in plan.sites()} == {1} and plan.calibration["dense_layers"] == [0, 2]
    with pytest.raises(moyu.UserError, match="layers 0 to 2"):
        dissect.dissect(model, (3,))


def test_calibration_where_layers_are_no_chain_is_that_of_the_chain(monkeypatch):
    """The whole model at every step gives the plan that single layers give."""
    model, windows = build("llama"), Windows(tokens(4, 24), 4)
    chain = calibrate(model, method("teal"), windows, sparsity=0.5)
    monkeypatch.setattr(streams.Chain, "remove", _broken(streams.Chain.remove))
    whole = calibrate(model, method("teal"), windows, sparsity=0.5)
    assert chain.parts.keys() == whole.parts.keys()
    for key, (_, params) in chain.parts.items():
        assert params.rule.value == pytest.approx(whole.parts[key][1].rule.value, rel=1e-9)


def _broken(remove):
    def replacement(self):
        remove(self)
        self.holds = False

    return replacement


def test_survey_is_isolated_and_resumable(tmp_path):
    from moyu.commands.cli import app

    arguments = ["coverage", "--only", "llama", "--only", "mamba", "--out", str(tmp_path), "--json"]
    first = CliRunner().invoke(app, arguments)
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert {r["architecture"]: r["status"] for r in rows} == {"llama": "taken", "mamba": "no network"}
    before = (tmp_path / "coverage.jsonl").read_bytes()
    CliRunner().invoke(app, arguments)
    assert (tmp_path / "coverage.jsonl").read_bytes() == before
    assert "1 of 1" in (tmp_path / "coverage.md").read_text()
    with pytest.raises(moyu.UserError, match="llama"):
        coverage.run(["lama"], tmp_path / "other.jsonl")


def test_committed_table_is_the_records():
    from moyu import records
    from moyu.research.coverage.page import page, share

    docs = Path(__file__).parents[1] / "docs"
    rows = records.read(docs / "results" / "coverage.jsonl")
    assert (docs / "coverage.md").read_text(encoding="utf-8") == page(rows)
    taken, networks = share(rows)
    assert taken / networks >= 0.95
    assert {r.architecture for r in rows} == set(shrinking.names())


# Where models are made, or told by what a file format calls them; and model types that are everyday words.
MAKERS = ("model/loading.py", "model/gguf/", "model/architectures/", "research/training/", "research/studies/tiny.py")
EVERYDAY = {"git", "beam"}


def test_no_architecture_is_known_by_name():
    """Outside what makes models, no type or class of transformers' causal LMs is in the code."""
    source = Path(moyu.__file__).parent
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()} - EVERYDAY
    found = []
    for path in source.rglob("*.py"):
        place = path.relative_to(source).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Constant(value=str(text)):
                    words = re.findall(r"[\w.-]+", text)
                case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word):
                    words = [word]
                case _:
                    continue
            found += [f"{place}: {word}" for word in words if word in names and not place.startswith(MAKERS)]
    assert not found


def test_time_limit_ends_a_type():
    fields = next(iter(coverage.survey(["llama"], seconds=0.0)))
    assert fields["status"] == "fails" and "took more than" in fields["reason"]
