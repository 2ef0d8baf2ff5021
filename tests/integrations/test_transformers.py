"""A plan through from_pretrained: the same tokens and bytes as `moyu.apply`, saved and loaded again."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

import moyu
from moyu import MoyuConfig, kernels, records
from moyu.integrations import transformers as integration
from moyu.model import zoo

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
