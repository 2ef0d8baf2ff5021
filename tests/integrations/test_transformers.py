"""A plan through from_pretrained: the same tokens and bytes as `moyu.apply`, saved and loaded again."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline
from transformers.quantizers import auto

import moyu
from moyu import MoyuConfig, kernels, records
from moyu.commands import cli
from moyu.integrations import transformers as integration
from moyu.model import loading, zoo

PROMPT = "def read_config(path):\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plan's folder for `swiglu`, and the tokens and bytes that `moyu.apply` gives."""
    loaded = moyu.load("swiglu")
    ids = loaded.tokenizer(PROMPT * 6, return_tensors="pt")["input_ids"]
    plan = moyu.calibrate(loaded.model, moyu.method("teal"), moyu.Windows(ids, 4), sparsity=0.5, name="swiglu")
    folder = plan.save(tmp_path_factory.mktemp("plans") / "teal")
    with moyu.apply(loaded.model, plan):
        return folder, *generated(loaded.model, loaded.tokenizer)


def generated(model, tokenizer):
    """Greedy tokens, and bytes of weights read."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with kernels.count_bytes() as counted:
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return out[0].tolist(), counted.total


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo.path("swiglu"))


def test_a_plan_at_loading_is_the_plan_applied(made, tokenizer):
    plan, tokens, read = made
    model = load(zoo.path("swiglu"), quantization_config=MoyuConfig(plan=plan))
    assert generated(model, tokenizer) == (tokens, read)
    dense = load(zoo.path("swiglu"))
    assert generated(dense, tokenizer)[0] != tokens, "the plan changes nothing: the comparison would pass without it"


def test_a_saved_checkpoint_carries_its_plan(made, tokenizer, tmp_path):
    plan, tokens, read = made
    model = load(zoo.path("swiglu"), quantization_config=MoyuConfig(plan=plan))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert generated(model, tokenizer) == (tokens, read), "saving leaves the model as it was"
    again = load(tmp_path)
    assert generated(again, tokenizer) == (tokens, read)
    card = (tmp_path / "README.md").read_text()
    assert "teal" in card and "swiglu" in card and "from moyu import MoyuConfig" in card
    dense = load_file(zoo.path("swiglu") / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == dense.keys() and all(torch.equal(saved[k], dense[k].float()) for k in dense)
    write = pipeline("text-generation", model=again, tokenizer=tokenizer)
    text = write(PROMPT, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_card_carries_what_was_measured(made, tmp_path):
    plan = moyu.Plan.load(made[0])
    plan.save(tmp_path / "plan")
    quality = {
        "kind": "quality", "model": "swiglu", "weights": "trained", "method": "teal", "simulated": True,
        "realized_sparsity": 0.49, "byte_fraction": 0.61, "tokens": 4064, "ppl_dense": 7.5, "ppl": 9.13, "kl": 0.242,
        "top1_agreement": 0.8, "corpus": {"corpus": "python", "split": "test"},
    }  # fmt: skip
    rows = [records.stamp(**quality, plan=plan.hash), records.stamp(**quality | {"ppl": 99.0}, plan="another")]
    records.write(tmp_path / "plan" / records.FILE, rows)
    load(zoo.path("swiglu"), quantization_config=MoyuConfig(plan=tmp_path / "plan")).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| 4064 | 49.0% | 0.61 | 7.50 | 9.13 | 0.242 | 80.0% |" in card and "split test" in card
    assert card.count("| 4064 |") == 1, "of another plan too"
    load(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
    assert "was not measured" in integration.card(plan)


def test_streaming_gives_the_same_text(made, tokenizer):
    plan, tokens, _ = made
    model = load(zoo.path("swiglu"), quantization_config=MoyuConfig(plan=plan))
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_method_that_needs_no_calibration_goes_without_a_plan(tokenizer, tmp_path):
    model = load(zoo.path("relu"), quantization_config=MoyuConfig(method="griffin", sparsity=0.5))
    tokens, read = generated(model, tokenizer)
    with moyu.apply(load(zoo.path("relu")), None) as dense:
        assert read < 0.9 * generated(dense.model, tokenizer)[1]
    model.save_pretrained(tmp_path)
    assert generated(load(tmp_path), tokenizer) == (tokens, read)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"method": "teal"}, "moyu calibrate"),
        ({}, "give MoyuConfig a plan or a method"),
        ({"plan": "x", "method": "griffin"}, "not both"),
        ({"method": "grifin"}, "griffin"),
        ({"method": "griffin", "engine": "skim"}, "engine must be one of skip, mask"),
    ],
)
def test_what_cannot_be_applied_is_refused_with_the_next_step(asked, says):
    with pytest.raises(moyu.UserError, match=says):
        MoyuConfig(**asked)


def test_a_missing_plan_and_a_plan_of_another_model_are_refused(made, tmp_path):
    with pytest.raises(moyu.UserError, match="no plan in"):
        load(zoo.path("swiglu"), quantization_config=MoyuConfig(plan=tmp_path / "none"))
    with pytest.raises(moyu.UserError, match="calibrate this model"):
        load(zoo.path("relu"), quantization_config=MoyuConfig(plan=made[0]))


def test_the_card_names_what_is_skipped(made):
    card = integration.card(moyu.Plan.load(made[0]))
    assert "columns of q" in card and "target sparsity | 0.5" in card


@pytest.fixture(scope="module")
def checkpoint(made, tokenizer, tmp_path_factory):
    """A saved checkpoint with its plan."""
    folder = tmp_path_factory.mktemp("saved")
    load(zoo.path("swiglu"), quantization_config=MoyuConfig(plan=made[0])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(capsys, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["moyu", *map(str, words)])
    capsys.readouterr()
    cli.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_saved_checkpoint_is_sparse_in_moyu_s_own_commands(made, checkpoint, capsys, monkeypatch):
    plan = moyu.Plan.load(made[0])
    loaded = moyu.load(checkpoint)
    assert loaded.plan == checkpoint / "moyu-plan" and "moyu_applied" not in vars(loaded.model)
    (row,) = run(capsys, monkeypatch, "generate", checkpoint, "--prompt", PROMPT, "--new-tokens", 12, "--json")
    assert row["plan"] == plan.hash and row["sparse_tokens"] == [loaded.tokenizer.decode([t]) for t in made[1][-12:]]
    (facts,) = run(capsys, monkeypatch, "info", checkpoint, "--json")
    assert facts["plan"].startswith(f"teal ({plan.hash})")
    rows = run(capsys, monkeypatch, "bench", checkpoint, "--tokens", 2, "--rounds", 1, "--json")
    assert [r["plan"] for r in rows] == [None, plan.hash]
    few = ("--window", 32, "--prompt-tokens", 16)
    assert [r["plan"] for r in run(capsys, monkeypatch, "eval", checkpoint, *few, "--json")] == [plan.hash]


def test_lm_eval_on_a_saved_checkpoint(made, checkpoint, capsys, monkeypatch):
    """The card and docs/use/transformers.md say what its own command does; MOYU's own command runs its tasks."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    few = ("--window", 32, "--prompt-tokens", 16, "--limit", 2)
    (row, _) = run(capsys, monkeypatch, "eval", checkpoint, "--tasks", "python_next_line", *few, "--json")
    assert row["plan"] == moyu.Plan.load(made[0]).hash
    says = "Unknown quantization type, got moyu"
    assert says in (checkpoint / "README.md").read_text()
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "moyu")  # as in a process without MoyuConfig
    with pytest.raises(ValueError, match=says):
        huggingface.HFLM(pretrained=str(checkpoint), device="cpu")


def test_a_checkpoint_of_the_hub_brings_its_plan(made, checkpoint, tokenizer, monkeypatch):
    """The hub is a folder here: what is asked of it is the plan alone, at the commit of the weights."""
    asked = []
    monkeypatch.setattr(
        loading, "snapshot_download", lambda *a, **k: (asked.append((a, k["allow_patterns"])), checkpoint)[1]
    )
    model = load(checkpoint)
    config = model.config.quantization_config
    model.moyu_applied.restore()
    object.__setattr__(model, "name_or_path", "somebody/model")
    model.config._name_or_path = "somebody/model"
    folder = integration.MoyuQuantizer(config, pre_quantized=True)._folder(model)
    assert folder == checkpoint / "moyu-plan" and asked == [(("somebody/model",), ["moyu-plan/*"])]


def test_a_checkpoint_is_whole_before_it_is_uploaded(made, tmp_path, monkeypatch):
    model, seen = load(zoo.path("swiglu"), quantization_config=MoyuConfig(plan=made[0])), []

    class Hub:
        def create_repo(self, repo_id, **more):
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *a, **k: Card())

    class Card:
        def save(self, path):
            pass

    monkeypatch.setattr(
        type(model),
        "_upload_modified_files",
        lambda self, folder, *a, **k: seen.extend(str(p.relative_to(folder)) for p in Path(folder).rglob("*")),
    )
    model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert {"moyu-plan/plan.json", "moyu-plan/plan.safetensors", "README.md", "config.json"} <= set(seen)


def test_a_card_names_no_path_of_this_machine(made, tmp_path):
    plan = moyu.Plan.load(made[0])
    for name, base in (("org/model", True), (str(tmp_path), False), ("./here", False), ("swiglu", False)):
        text = integration.card(dataclasses.replace(plan, model={**plan.model, "name": name}))
        assert (f"base_model: {name}" in text) is base and str(tmp_path.parent) not in text
