"""The shipped models: complete, matched, and really trained."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moyu.errors import UserError
from moyu.model import zoo
from moyu.model.zoo import corpus

FILES = {"config.json", "generation_config.json", "model.safetensors"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "training.json"}
WINDOWS, LENGTH = 8, 256


def bits_per_byte(model, tokenizer, text):
    """Bits a byte of `text`, over exactly the bytes of the scored tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids[i * (LENGTH - 1) : (i + 1) * (LENGTH - 1)]] for i in range(WINDOWS)]
    tokens = torch.tensor(rows)
    size = len(tokenizer.decode(tokens[:, 1:].flatten()).encode())
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return float(loss) / math.log(2) / size


@pytest.fixture(scope="module")
def text():
    return "".join(d.text for d in corpus.held_out("test", max_bytes=60_000))


@pytest.mark.parametrize("name", zoo.names())
def test_folder_is_complete(name):
    assert {file.name for file in zoo.path(name).iterdir()} == FILES
    assert zoo.describe(name)["name"] == name


@pytest.mark.parametrize("name", zoo.names())
def test_tokenizer_puts_bos_first_and_returns_every_byte(name):
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    source = 'def f(x):\n\treturn x  # é ☃ 中文\r\n  "\\n"\n\n'
    ids = tokenizer(source)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == source
    assert len(tokenizer) == AutoConfig.from_pretrained(zoo.path(name)).vocab_size == 4096


@pytest.mark.parametrize("name", zoo.names())
def test_model_is_trained(name, text):
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
    untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(zoo.path(name)), dtype=torch.float32).eval()
    trained = bits_per_byte(model, tokenizer, text)
    assert trained < 1.4
    assert trained < 0.5 * bits_per_byte(untrained, tokenizer, text)
    assert trained < 0.5 * bits_per_byte(model, tokenizer, corpus.shuffled(text))


def test_models_are_matched():
    facts = [zoo.describe(name) for name in zoo.names()]
    for key in ("tokens", "seed", "batch", "length", "corpus", "versions"):
        assert all(f[key] == facts[0][key] for f in facts), key
    sizes = [f["parameters"] for f in facts]
    assert max(sizes) < 1.03 * min(sizes) and sizes[1] == sizes[2]
    tokenizers = {(zoo.path(name) / "tokenizer.json").read_bytes() for name in zoo.names()}
    assert len(tokenizers) == 1


@pytest.mark.parametrize("name", zoo.names())
def test_recorded_evidence_is_of_a_trained_model(name):
    bits = zoo.describe(name)["bits_per_byte"]
    assert bits["held_out"] < 0.5 * bits["random_initialisation"]
    assert bits["held_out"] < 0.5 * bits["shuffled_text"]


def test_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'swiglu'"):
        zoo.path("swiglo")
