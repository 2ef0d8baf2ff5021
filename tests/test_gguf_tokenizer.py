"""The tokenizer of a GGUF file gives the tokens that llama.cpp gives: on small vocabularies, whose tokens are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

import gguf_files as parts
from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import read
from moyu.model.gguf.special import ends
from moyu.model.gguf.splits import PRES
from moyu.model.gguf.tokenizer import tokenizer_of

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LEVEL = [*ALPHABET, "ab", "Ġa", "abc", "<|im_end|>", "<think>", "<s>"]
LEVEL_TYPES = [NORMAL] * (len(ALPHABET) + 3) + [CONTROL, USER, CONTROL]
BYTE_LEVEL = {
    "model": "gpt2", "pre": "qwen2", "tokens": LEVEL, "token_type": np.array(LEVEL_TYPES, "<i4"), "merges": ["a b", "Ġ a"],
    "bos_token_id": LEVEL.index("<s>"), "eos_token_id": LEVEL.index("<s>"),
}  # fmt: skip
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "▁",
    "a",
    "b",
    "c",
    "▁a",
    "ab",
    "bc",
    "\t",
    "  ",
]
SCORES = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -1.0, -9.0, -9.0]
SENTENCE = {
    "model": "llama", "tokens": PIECES, "scores": np.array(SCORES, "<f4"),
    "token_type": np.array([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 8 + [USER], "<i4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """One file, written again and again."""
    return tmp_path_factory.mktemp("tokenizer") / "model.gguf"


def opened(place: Path, entries: dict[str, Any], more: dict[str, Any] | None = None):
    """A file with these entries of `tokenizer.ggml.` and an embedding of 512 rows."""
    said = {"general.architecture": "llama", "llama.context_length": 64}
    said |= {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None} | (more or {})
    place.unlink(missing_ok=True)
    place.write_bytes(parts.file_of(said, {"token_embd.weight": ("F32", (512, 1), bytes(2048))}))
    return read(place)


def tokenizer(place: Path, entries: dict[str, Any], more: dict[str, Any] | None = None) -> Any:
    """Its tokenizer."""
    return tokenizer_of(opened(place, entries, more))


def said(made: Any, text: str) -> list[str]:
    """The tokens of a text."""
    return made.convert_ids_to_tokens(made(text)["input_ids"])


@pytest.mark.parametrize(("pre", "asked", "expected"), [
    ("qwen2", None, False), ("qwen2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False), ("tekken", None, True),
    ("gpt-2", None, False), (None, None, False),
])  # fmt: skip
def test_byte_level_vocabularies_have_a_bos_by_their_kind(place, pre, asked, expected):
    made = tokenizer(place, BYTE_LEVEL | {"pre": pre, "add_bos_token": asked})
    assert said(made, "a") == (["<s>"] if expected else []) + ["a"]


def test_a_sentencepiece_vocabulary_has_a_bos_and_names_for_nobody_s_tokens(place):
    made = tokenizer(place, SENTENCE)
    assert said(made, "a") == ["<s>", "▁a"]
    assert (made.bos_token, made.eos_token, made.unk_token) == ("<s>", "</s>", "<unk>")
    assert said(tokenizer(place, SENTENCE | {"add_bos_token": False, "add_eos_token": True}), "a") == ["▁a", "</s>"]


def test_a_word_that_is_a_token_is_whole_in_some_kinds(place):
    assert said(tokenizer(place, BYTE_LEVEL), "abc") == ["ab", "c"]  # no merge leads to "abc"
    assert said(tokenizer(place, BYTE_LEVEL | {"pre": "llama-bpe", "add_bos_token": False}), "abc") == ["abc"]
    assert said(tokenizer(place, BYTE_LEVEL | {"pre": "tekken", "add_bos_token": False}), "abc c") == ["abc", "Ġ", "c"]


def test_special_tokens_are_found_before_anything_else(place):
    made = tokenizer(place, BYTE_LEVEL)
    assert said(made, "ab<|im_end|>ab<think>") == ["ab", "<|im_end|>", "ab", "<think>"]
    ids = made("ab<|im_end|>ab<think>")["input_ids"]
    assert made.decode(ids, skip_special_tokens=True) == "abab<think>"


def test_the_best_score_merges_first(place):
    bare = SENTENCE | {"add_bos_token": False, "add_space_prefix": False}
    assert said(tokenizer(place, bare), "abc") == ["a", "bc"]
    scores = np.array(SCORES, "<f4")
    scores[PIECES.index("ab")] = -0.5
    assert said(tokenizer(place, bare | {"scores": scores}), "abc") == ["ab", "c"]


def test_a_space_comes_before_each_stretch_of_text(place):
    made = tokenizer(place, SENTENCE)
    assert said(made, " a<s>a") == ["<s>", "▁", "▁a", "<s>", "▁a"]
    assert said(made, "a  b") == ["<s>", "▁a", "  ", "▁", "b"]  # the user's token of two spaces cuts the text
    assert made.decode(made("a b")["input_ids"], skip_special_tokens=True) == "a b"
    assert said(tokenizer(place, SENTENCE | {"add_space_prefix": False}), " a<s>a") == ["<s>", "▁a", "<s>", "a"]


@given(st.text(max_size=20))
def test_any_text_comes_back(place, text):
    """Of characters outside the vocabulary there are bytes."""
    for entries in (SENTENCE | {"add_space_prefix": False}, BYTE_LEVEL):
        made = tokenizer(place, entries | {"add_bos_token": False})
        assert made.decode(made(text)["input_ids"]) == (text if entries is BYTE_LEVEL else text.replace("▁", " "))


def test_phi_3_s_special_tokens_take_the_white_space_behind_them(place):
    tokens = [*PIECES, "<|end|>"]
    entries = SENTENCE | {
        "tokens": tokens, "scores": np.array([*SCORES, 0.0], "<f4"), "add_space_prefix": False,
        "token_type": np.append(SENTENCE["token_type"], np.int32(CONTROL)),
    }  # fmt: skip
    assert said(tokenizer(place, entries), "<|end|> \na")[1:] == ["<|end|>", "▁", "<0x0A>", "a"]
    made = tokenizer(place, entries, {"general.name": "Phi-3 Mini"})
    assert said(made, "<|end|> \na<s> a")[1:] == ["<|end|>", "a", "<s>", "▁a"]


def test_tokens_without_a_name_get_one(place):
    tokens = [*LEVEL[:-1], "", "x y"]
    entries = BYTE_LEVEL | {"tokens": tokens, "token_type": np.array([*LEVEL_TYPES, NORMAL], "<i4"), "bos_token_id": 0}
    assert tokenizer(place, entries | {"eos_token_id": 0}).convert_ids_to_tokens([len(tokens) - 2]) == [
        f"[EMPTY_{len(tokens) - 2}]"
    ]


TEXT = "I'LL don't  naïve été\n\n  x 12345 !?/\r\nÀB aB  "
CUT = {
    "gpt-2": ["I", "'", "LL", " don", "'t", " ", " naïve", " été", "\n\n ", " x", " 12345", " !?/", "\r", "\n", "ÀB", " aB", "  "],
    "llama-bpe": ["I", "'LL", " don", "'t", " ", " naïve", " été", "\n\n", " ", " x", " ", "123", "45", " !?/\r\n", "ÀB", " aB", "  "],
    "qwen2": ["I", "'LL", " don", "'t", " ", " naïve", " été", "\n\n", " ", " x", " ", *"12345", " !?/\r\n", "ÀB", " aB", "  "],
    "smollm": ["I", "'", "LL", " don", "'t", " ", " naïve", " été", "\n\n ", " x", " ", *"12345", " !?/", "\r", "\n", "ÀB", " aB", "  "],
    "tekken": ["I", "'LL", " don", "'t", " ", " naïve", " été", "\n\n", " ", " x", " ", *"12345", " !?/\r\n", "À", "B", " a", "B", "  "],
    "gpt-4o": ["I'LL", " don't", " ", " naïve", " été", "\n\n", " ", " x", " ", "123", "45", " !?/\r\n", "À", "B", " a", "B", "  "],
    "default": [
        "I", "'", "LL", " don", "'", "t", " ", " naïve", " été", "\n\n ", " x", " ", "123", "45", " ", "!?/", "\r", "\n", "ÀB", " aB", "  ",
    ],
    "deepseek-coder": [
        "I", "'", "LL", " don", "'", "t", " ", " naïve", " été", "\n", "\n", " ", " x", " ", *"12345", " !?/", "\r", "\n", "ÀB", " aB",
        "  ",
    ],
}  # fmt: skip


@pytest.mark.parametrize("pre", CUT)
def test_text_is_cut_into_words(place, pre):
    cut = tokenizer(place, BYTE_LEVEL | {"pre": pre}).backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in cut] == CUT[pre]


@pytest.mark.parametrize("pre", PRES)
def test_every_kind_of_cut_keeps_the_text(place, pre):
    made = tokenizer(place, BYTE_LEVEL | {"pre": pre, "add_bos_token": False})
    assert made.decode(made(TEXT + "中文。 한국 हि")["input_ids"]) == TEXT + "中文。 한국 हि"


def test_a_text_ends_where_llama_cpp_ends_it(place):
    named = {"eos_token_id": LEVEL.index("<s>"), "eot_token_id": LEVEL.index("<think>")}
    expected = sorted(LEVEL.index(word) for word in ("<s>", "<think>", "<|im_end|>"))
    assert ends(Metadata(opened(place, BYTE_LEVEL | named))) == expected
    harmony = ["<|return|>", "<|call|>", "<|end|>"]
    entries = BYTE_LEVEL | {"tokens": [*LEVEL, *harmony], "token_type": None}
    found = ends(Metadata(opened(place, entries)))
    assert {len(LEVEL), len(LEVEL) + 1} < set(found) and len(LEVEL) + 2 not in found
    assert ends(Metadata(opened(place, SENTENCE))) == [2]


def test_the_chat_template_is_the_file_s(place):
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    made = tokenizer(place, BYTE_LEVEL, {"tokenizer.chat_template": template})
    assert made.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|im_end|>"
