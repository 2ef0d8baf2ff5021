"""`moyu.apply` on a model and its tokenizer finds the plan itself; texts, paths and plans are taken as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moyu
from moyu import UserError
from moyu.calibration.context import Context
from moyu.calibration.largest import Allowed, largest
from moyu.calibration.settings import Settings
from moyu.measure.evaluation import evaluate
from moyu.measure.text import windows_for
from moyu.model.loading import quantise_model
from moyu.model.zoo import corpus
from tiny import lettered

DOCUMENTS = [d.text[:1200] for d in corpus.held_out("validation", max_bytes=30_000)][:8]
SMALL = {"window": 64, "prompt": 24}
MOST = 0.004


@pytest.fixture(scope="module")
def loaded():
    found = lettered()
    quantise_model(found.model, "q8_0")
    return found


@pytest.fixture(scope="module")
def plan(loaded):
    """What `moyu.apply` finds for a budget, and that the model is as before once it is over."""
    ids = torch.tensor([loaded.tokenizer("def main():\n")["input_ids"]])
    before = loaded.model(ids).logits
    with moyu.apply(loaded.model, loaded.tokenizer, text=DOCUMENTS, max_kl=MOST, **SMALL) as applied:
        assert (
            loaded.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] == ids.shape[1] + 4
        )
        found = applied.plan
    assert torch.equal(loaded.model(ids).logits, before)
    return found


def test_the_plan_is_the_one_that_moyu_calibrate_finds(loaded, plan):
    assert plan.method.name == "levels", "the recommended method of quantised weights"
    context = Context.of(loaded, Settings(methods=("levels",), text=DOCUMENTS, window=64, boundary=24))
    assert plan.hash == largest(context, "levels", Allowed("kl", MOST)).hash


def test_it_keeps_to_the_budget_and_skips(loaded, plan):
    text = windows_for(loaded, DOCUMENTS, length=64, prompt=24, calibration=16, test=32)
    found = evaluate(loaded.model, plan, text.validation, matched=False)
    assert MOST / 3 < float(found.method.kl.mean()) <= MOST
    assert found.byte_fraction < 0.95


def test_a_saved_plan_is_applied_by_its_folder(loaded, plan, tmp_path):
    for folder in (plan.save(tmp_path / "plan"), str(tmp_path / "plan")):
        with moyu.apply(loaded.model, folder) as applied:
            assert applied.plan.hash == plan.hash


def test_a_method_may_be_named_and_weights_in_16_bits_have_one_of_their_own():
    loaded = lettered(torch.bfloat16)
    stages = []
    asked = {"text": DOCUMENTS, "max_kl": 0.1, **SMALL, "progress": lambda *stage: stages.append(stage)}
    with moyu.apply(loaded.model, loaded.tokenizer, method="teal", **asked) as applied:
        assert applied.plan.method.name == "teal"
    assert stages[-1][1] == stages[-1][2]
    with moyu.apply(loaded.model, loaded.tokenizer, **asked) as applied:
        assert applied.plan.method.name == "estimate"


def test_what_cannot_be_meant_is_refused(loaded, plan):
    apply, model, tokenizer = moyu.apply, loaded.model, loaded.tokenizer
    with pytest.raises(UserError, match="text and max_kl say how to make a plan"):
        apply(model, plan, text="words", max_kl=0.1)
    with pytest.raises(UserError, match="max_kl must be positive, not 0"):
        apply(model, tokenizer, max_kl=0.0)
    with pytest.raises(UserError, match="did you mean levels"):
        apply(model, tokenizer, method="level")
    with pytest.raises(UserError, match="is no model of transformers"):
        apply(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(UserError, match="no plan in nowhere"):
        apply(model, Path("nowhere"))


def test_a_text_is_a_file_itself_or_its_documents(loaded, tmp_path):
    asked = {"length": 32, "prompt": 8, "calibration": 4, "test": 4}
    whole = "\n".join(DOCUMENTS)
    file = tmp_path / "mine.txt"
    file.write_text(whole)
    found = [windows_for(loaded, text, **asked) for text in (file, str(file), whole, [whole])]
    assert len({(s.calibration.digest, s.validation.digest, s.test.digest) for s in found}) == 1
    assert found[0].test.source["file"] == "mine.txt" and "file" not in found[2].test.source
    with pytest.raises(UserError, match=r"cannot read text 'mien\.txt'"):
        windows_for(loaded, "mien.txt", **asked)
    with pytest.raises(UserError, match="the text is empty"):
        windows_for(loaded, [" ", "\n"], **asked)
    with pytest.raises(UserError, match="a document is 3, not a string"):
        windows_for(loaded, ["words", 3], **asked)  # pyright: ignore[reportArgumentType]


def test_documents_are_parted_where_their_characters_are_and_windows_stay_within_them(loaded):
    """Every document is one token again and again, so that a window of two documents would have two."""
    tokenizer = loaded.tokenizer
    texts = [tokenizer.decode([n]) * 400 for n in (40, 41, 42, 43)]
    found = windows_for(loaded, texts, length=16, prompt=4, calibration=99, test=99)
    parts = (found.calibration, found.validation, found.test)
    kinds = [{tuple(sorted(set(row.tolist()) - {tokenizer.bos_token_id})) for row in part.tokens} for part in parts]
    alone = [tuple(sorted(set(tokenizer(t, add_special_tokens=False)["input_ids"]))) for t in texts]
    assert kinds == [{*alone[:2]}, {alone[2]}, {alone[3]}]
