"""Models that people use: MOYU has the numbers, the tokens and the texts of transformers, and counts the bytes of the file."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.nn import functional

from moyu import Applied, calibrate, generate, methods
from moyu.engine.cache import KvCache
from moyu.engine.generate import step
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.model import zoo
from moyu.model.dissect import dissect
from moyu.model.gguf.reader import read

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Of all tokens but the first of each row."""
    return math.exp(functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))


@torch.no_grad()
def test_logits_and_perplexity_are_those_of_transformers(real):
    ours, theirs = real.loaded.model(real.ids).logits, real.reference(real.ids).logits
    got, expected = perplexity(ours, real.ids), perplexity(theirs, real.ids)
    print(
        f"\n{real.name}: perplexity {got:.4f}, transformers {expected:.4f}; largest difference {(ours - theirs).abs().max():.1e}"
    )
    assert got == pytest.approx(expected, rel=1e-3)
    # both compute in float32 with the same values; sums differ in their order
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)


def test_tokens_are_those_of_llama_cpp(real):
    """Transformers' own conversion is no measure: it cuts SmolLM2's numbers and Gemma's long indents in another way."""
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(real.path), vocab_only=True, verbose=False)
    lines = [line for document in zoo.corpus.held_out("test") for line in document.text.splitlines()][:10000]
    lines += [
        "",
        "  two  spaces",
        "I'LL don't 1234567 naïve 中文。 한국어 हिन्दी 👩‍👩‍👧 \r\n\t x",
        "<|im_start|>user\n<end_of_turn>",
    ]
    assert len(lines) > 1000
    ours = real.loaded.tokenizer(lines)["input_ids"]
    assert [
        line for line, ids in zip(lines, ours, strict=True) if theirs.tokenize(line.encode(), special=True) != ids
    ] == []


@torch.no_grad()
def test_greedy_texts_are_equal_until_a_near_tie(real):
    """Decode steps round inputs to 8 bits, so a token may change where two are about as likely."""
    prompt = real.ids[:1, :64]
    expected = real.reference.generate(prompt, max_new_tokens=48, do_sample=False)[0, 64:].tolist()
    with Applied(real.loaded.model, None) as session:
        got = [int(t) for t in generate(session, prompt, max_new_tokens=48, do_sample=False)]
        print(f"\n{real.name}: {session.traces.summary()}")
    first = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    if first is not None:
        text = torch.cat([prompt, torch.tensor([expected[:first]], dtype=torch.int64)], 1)
        scores = real.reference(text).logits[0, -1]
        gap = float(scores[expected[first]] - scores[got[first]])
        print(f"{real.name}: the texts part at token {first}, where the other one is {gap:.3f} less")
        assert gap < 0.1 * float(scores.std())


@torch.no_grad()
def test_steps_lose_little(real):
    """Steps round inputs to 8 bits, as llama.cpp does, and one pass does not."""
    ids = real.ids[:1, :160]
    with Applied(real.loaded.model, None) as session:
        cache = KvCache(real.loaded.model.config)
        session.model(ids[:, :32], past_key_values=cache)
        logits = [step(session, cache, ids[:, t]) for t in range(32, 159)]
    got = torch.stack(logits, 1)[0].float().log_softmax(-1)
    expected = real.reference(ids).logits[0, 32:-1].log_softmax(-1)
    lost = functional.kl_div(got, expected, log_target=True, reduction="none").sum(-1)  # (127,) nats
    ours, theirs = (math.exp(functional.nll_loss(scores, ids[0, 33:])) for scores in (got, expected))
    print(
        f"\n{real.name}: perplexity {ours:.4f} in steps, {theirs:.4f} in one pass; KL {lost.mean():.4f}, at most {lost.max():.3f}"
    )
    assert lost.mean() < 0.02 and lost.max() < 1


def test_a_step_reads_the_bytes_of_the_file(real):
    model = real.loaded.model
    file = read(real.path)
    table = file.tensors["token_embd.weight"]
    expected = sum(entry.nbytes for entry in file.tensors.values())
    if "output.weight" in file.tensors:  # the table is for looking up only
        expected -= table.nbytes
    expected += table.nbytes / table.shape[0]
    # scales of 6 bits have a byte each in memory: 4 bytes more for the 144 of 256 weights in Q4_K
    assert 1 <= accounting.dense_step_bytes(model, dissect(model)) / expected < 1.03


@pytest.mark.parametrize("name", methods.names())
def test_every_method_applies(real, name):
    """On SmolLM2, the smallest: a plan is fitted, a text is written under it, and the model is as before."""
    if not real.name.startswith("SmolLM2"):
        pytest.skip("the others are larger, and their networks are built alike")
    knobs = {"steps": 3} if name == "lte" else {}  # of a training through the whole model, 4 s each
    model, method = real.loaded.model, methods.method(name, **knobs)
    anatomy = dissect(model)
    if not any(method.sites(block) for block in anatomy.places()):
        pytest.skip("there is nothing that it could skip")
    before = model(real.ids[:1, :32]).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits on little text
        plan = calibrate(model, method, Windows(real.ids[:2, :64], 32), sparsity=0.5, anatomy=anatomy)
    with Applied(model, plan, anatomy=anatomy) as session:
        written = [int(t) for t in generate(session, real.ids[:1, :48], max_new_tokens=6, do_sample=False)]
    assert len(written) == 6
    assert torch.equal(model(real.ids[:1, :32]).logits, before)
