"""The trainer: token files, the schedule, and that stopping and going on changes nothing."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moyu import UserError
from moyu.model import zoo
from moyu.model.zoo import corpus
from moyu.model.zoo.corpus import Document
from moyu.research import training
from moyu.research.studies import root_cause

STEPS, BATCH, LENGTH = 3, 2, 32


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A prepared folder of a corpus of a few functions, windows of 32 tokens, and a model of two small layers."""
    texts = [f"def function_{i}(x, y):\n    return x * {i} + y\n\n" * 8 for i in range(60)]
    documents = [Document(f"stdlib/f{i}.py", text) for i, text in enumerate(texts)]
    splits = {"train": documents[:40], "validation": documents[40:50], "test": documents[50:]}
    monkeypatch.setattr(corpus, "collect", lambda: splits)
    monkeypatch.setattr(training, "LENGTH", LENGTH)
    whole = training.config_of

    def small(name, size=training.SHIPPED):
        config = whole(name, size)
        config.num_hidden_layers, config.hidden_size = 2, 64
        if name != "swiglu":
            config.word_embed_proj_dim = 64
        else:
            config.head_dim = 16
        return config

    monkeypatch.setattr(training, "config_of", small)
    training.prepare(tmp_path / "data")
    return tmp_path / "data"


def _train(name, data, out, **options):
    tokens = STEPS * BATCH * LENGTH
    return training.train(name, data, out, tokens=tokens, batch=BATCH, device="cpu", **options)


def test_models_are_matched_in_size():
    sizes = {name: sum(p.numel() for p in training.build(name, 0).parameters()) for name in zoo.names()}
    assert sizes["relu"] == sizes["gelu"]
    assert sizes["swiglu"] == pytest.approx(sizes["relu"], rel=0.03)
    assert all(5.5e6 < size < 6.5e6 for size in sizes.values())


def test_the_larger_size_is_matched_too():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in training.build(name, 0, "100m").parameters()) for name in zoo.names()}
    assert sizes["relu"] == sizes["gelu"] and sizes["swiglu"] == pytest.approx(sizes["relu"], rel=0.01)
    assert all(95e6 < size < 110e6 for size in sizes.values())


@pytest.mark.parametrize("name", ["relu", "swiglu"])
def test_a_watched_training_logs_the_series_of_root_cause_and_trains_the_same_model(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "WATCHED", 2)
    _train(name, data, tmp_path / "watched", watched=True)
    _train(name, data, tmp_path / "alone")
    seen = json.loads((tmp_path / "watched" / "training.json").read_text())["on_the_way"]
    assert [step for step, _ in seen] == [0, 1, STEPS]
    zeros, loss = ([values[root_cause.SERIES.index(s)] for _, values in seen] for s in ("exact zeros", "loss"))
    assert all(len(layers) == 2 for layers in zeros) and loss[-1] < loss[0]
    assert (min(zeros[0]) > 0.2) is (name == "relu")
    both = [load_file(tmp_path / run / "model.safetensors") for run in ("watched", "alone")]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_relu_and_gelu_differ_in_the_activation_only():
    relu, gelu = (training.config_of(name).to_dict() for name in ("relu", "gelu"))
    assert {key for key in relu if relu[key] != gelu[key]} == {"activation_function"}
    for a, b in zip(training.build("relu", 3).parameters(), training.build("gelu", 3).parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule_warms_up_and_falls_to_a_tenth():
    rates = [training.rate(step, 1000, 1.5e-3) for step in range(1000)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.5e-3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * 1.5e-3, rel=0.01)


def test_token_files_hold_the_documents_each_after_bos(data):
    meta = json.loads((data / "meta.json").read_text())["splits"]
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    for split, documents in corpus.collect().items():
        ids = np.fromfile(data / f"{split}.bin", dtype=np.uint16)
        assert len(ids) == meta[split]["tokens"]
        assert ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == len(documents)
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == "".join(d.text for d in documents)


@pytest.mark.parametrize("name", zoo.names())
def test_stopped_and_resumed_training_ends_in_the_same_weights(name, data, tmp_path):
    assert _train(name, data, tmp_path / "whole")
    stops = 0
    while not _train(name, data, tmp_path / "parts", minutes=0.0):
        stops += 1
    assert stops == STEPS - 1
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    facts = [json.loads((tmp_path / run / "training.json").read_text()) for run in ("whole", "parts")]
    assert facts[0] == facts[1]
    assert (facts[0]["tokens"], facts[0]["batch"], facts[0]["length"]) == (STEPS * BATCH * LENGTH, BATCH, LENGTH)


def test_export_is_a_model_that_transformers_loads(data, tmp_path):
    _train("relu", data, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    assert tokenizer("def")["input_ids"][0] == tokenizer.bos_token_id == model.config.bos_token_id


@pytest.mark.parametrize(
    "other", [{"seed": 5}, {"name": "gelu"}, {"batch": BATCH * 2}, {"tokens": 64 * LENGTH}, {"data": 1}]
)
def test_a_checkpoint_of_another_training_is_refused(other, data, tmp_path):
    asked = {"name": "relu", "tokens": STEPS * BATCH * LENGTH, "batch": BATCH, "data": data}
    assert not training.train(**asked, out=tmp_path / "out", device="cpu", minutes=0.0)
    if "data" in other:
        ids = np.fromfile(data / "train.bin", dtype=np.uint16)
        ids[5] += 1
        ids.tofile(data / "train.bin")
    with pytest.raises(UserError, match="another network, text, length, batch or seed"):
        training.train(**asked | {k: v for k, v in other.items() if k != "data"}, out=tmp_path / "out", device="cpu")


def test_a_damaged_checkpoint_and_a_full_disk_leave_one_line_and_no_file(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert not _train("relu", data, out, minutes=0.0)
    whole = (out / "checkpoint.pt").read_bytes()
    for damaged in (b"", whole[:1000], b"\x80\x04.", bytes(100)):
        (out / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="no checkpoint of a training"):
            _train("relu", data, out)
    (out / "checkpoint.pt").unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _train("relu", data, out, minutes=0.0)
    assert list(out.iterdir()) == []


def test_token_files_of_another_size_are_refused(data):
    assert training.prepared(data)
    with pytest.raises(UserError, match="of another size than 100m"):
        training.prepared(data, "100m")


def test_another_seed_trains_another_model(data, tmp_path):
    _train("gelu", data, tmp_path / "a", seed=1)
    _train("gelu", data, tmp_path / "b", seed=2)
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in "ab")
    assert any(not torch.equal(a[key], b[key]) for key in a)
