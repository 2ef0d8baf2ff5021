"""The shortlist: exact logits for the words that may come next, those of the first bits for the others, on one copy of the head."""

import copy

import pytest
import torch

import moyu
from equality import built, plan_for
from moyu import kernels, methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.choosers import Counter, Recorder
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.model import dissect
from moyu.model.loading import load, quantise_model
from tiny import tokens

PROMPT = 8


@pytest.fixture(scope="module")
def model():
    """An embedded model, whose logits are those of text, in Q8_0; its head is tied to the embedding."""
    model = load("swiglu").model
    quantise_model(model, "q8_0")
    return model


@pytest.fixture(scope="module")
def text(model):
    words = load("swiglu").tokenizer(
        "def main():\n    for name in sorted(names):\n        print(name, len(name))\n" * 30
    )
    return torch.tensor(words.input_ids[:480]).view(10, 48)


def plan_of(model, text, sparsity=0.95):
    return calibrate(model, methods.method("shortlist"), Windows(text, PROMPT), sparsity=sparsity, name="swiglu")


@torch.no_grad()
def test_kept_words_have_their_logits_and_the_others_those_of_the_first_bits(model, text):
    plan, seen, head = plan_of(model, text), Recorder(), dissect.dissect(model).head.pieces["head"]
    dense, inputs = model(text[:2], use_cache=False).logits, []
    hook = head.module.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with Applied(model, plan, engine="mask") as applied, applied.prompt(PROMPT), applied.watched(chooser=seen):
        logits = applied.model(text[:2], use_cache=False).logits
    hook.remove()
    first = inputs[-1] @ head.first_values.T
    ((_, masks),) = seen.masks.items()
    for (row, place), mask in masks.items():
        assert torch.allclose(logits[row, place][mask], dense[row, place][mask], atol=1e-4)
        assert torch.allclose(logits[row, place][~mask], first[row, place][~mask], atol=1e-4)
        assert mask[first[row, place].argmax()], "the likeliest word is always on the list"
    assert torch.equal(logits[:, :PROMPT], dense[:, :PROMPT]), "a prompt is dense"
    share = torch.stack(list(masks.values())).float().mean()
    assert 0.02 < float(share) < 0.12, "about a twentieth"


@torch.no_grad()
def test_the_step_is_native_up_to_the_logits_and_counts_what_it_reads(model, text):
    plan = plan_of(model, text)
    site, _ = plan.parts[next(iter(plan.parts))]
    with Applied(model, plan) as applied:
        assert applied.native.ends.words is not None
        counter = Counter(1, 48)
        with applied.prompt(PROMPT):
            past = applied.model(text[:1, :PROMPT]).past_key_values
            with kernels.count_bytes() as counted, applied.watched(chooser=counter):
                applied.model(text[:1, PROMPT : PROMPT + 1], past_key_values=past)
        assert applied.traces.summary() == "native", "layers that are native around a head that is not say so"
    kept = int(counter.kept[site.key].max())
    # A dense step reads a row of the embedding and the norms as well, which kernels do not count.
    beside = model.get_input_embeddings().blocks.row_bytes + sum(p.nbytes for p in model.parameters())
    whole = accounting.dense_step_bytes(model, dissect.dissect(model)) - beside
    assert whole - counted.total == (site.units - kept) * site.unit_bytes
    assert 0 < kept < 0.3 * site.units


def test_greedy_text_is_that_of_masked_products(model, text):
    plan, found = plan_of(model, text, 0.9), []
    for engine in ("skip", "mask"):
        with Applied(model, plan, engine=engine) as applied:
            found.append(applied.model.generate(text[:1, :24], max_new_tokens=16, do_sample=False)[0])
    assert torch.equal(*found)


@torch.no_grad()
def test_a_tied_embedding_shares_the_memory_and_everything_is_put_back(model, text):
    own = copy.deepcopy(model)
    head, table = own.get_output_embeddings(), own.get_input_embeddings()
    before, rows = head.blocks.values(), table(text[:1])
    with Applied(own, plan_of(model, text)):
        assert head.blocks.order == table.blocks.order == "parted"
        assert [t.data_ptr() for t in head.blocks.tensors] == [t.data_ptr() for t in table.blocks.tensors]
        assert torch.equal(table(text[:1]), rows)
        assert torch.equal(own.state_dict()["lm_head.part_0"], model.state_dict()["lm_head.part_0"])
    assert head.blocks.order == table.blocks.order == "rows"
    assert torch.equal(head.blocks.values(), before) and torch.equal(table(text[:1]), rows)
    assert model.get_output_embeddings().blocks.order == "rows", "a copy is another model"


@torch.no_grad()
def test_logits_of_the_last_position_alone_are_the_same(model, text):
    with Applied(model, plan_of(model, text), engine="mask") as applied, applied.prompt(PROMPT):
        every = applied.model(text[:3], use_cache=False).logits
        last = applied.model(text[:3], use_cache=False, logits_to_keep=1).logits
    assert torch.allclose(every[:, -1:], last, atol=1e-5)


def test_a_head_of_plain_numbers_has_no_shortlist():
    with pytest.raises(moyu.UserError, match=r"GGUF file.*q8_0"):
        plan_for(built("llama", "fp32"), methods.method("shortlist"))


def test_levels_have_it_at_the_head():
    model = built("llama", "q8_0")
    plan = calibrate(model, methods.method("levels"), Windows(tokens(4, 24), 4), sparsity=0.5, name="tiny")
    (site,) = (site for site in plan.sites() if site.skips == "words")
    assert plan.method_of(site) == methods.method("shortlist", share=0.1)
