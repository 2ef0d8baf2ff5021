"""The tokenizer of a GGUF file: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama"), with the tokens that llama.cpp gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moyu.errors import UserError, line_of, panics_are_errors
from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import File
from moyu.model.gguf.special import ENDS, token
from moyu.model.gguf.splits import PRES

# Entries of `tokenizer.ggml.` that are read, and their types.
READ: dict[str, type] = {
    "model": str, "pre": str, "tokens": list, "scores": np.ndarray, "token_type": np.ndarray, "merges": list,
    "add_space_prefix": bool, "add_bos_token": bool, "add_eos_token": bool,
}  # fmt: skip
# Entries that change no token of these two kinds of tokenizer in llama.cpp either; so does every entry that ends in `_token_id`.
IGNORED = {"add_sep_token", "remove_extra_whitespaces", "precompiled_charsmap", "token_type_count"}
NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4  # types of tokens
SPACE = "▁"  # how SentencePiece writes a space
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ANOTHER = "give the model as a folder in transformers' format, which has its own tokenizer"


def tokenizer_of(file: File) -> PreTrainedTokenizerBase:
    """Make the tokenizer. Raises UserError if the file has none, or one that is not understood."""
    told = Metadata(file)
    entries = {name: _entry(told, name, kind) for name, kind in READ.items()}
    kind, tokens = entries["model"], entries["tokens"]
    if not kind or not tokens or kind in ("none", "no_vocab"):
        raise told.refuse("there is no tokenizer in the file", ANOTHER)
    _check(told, entries)
    tokens = [word or f"[EMPTY_{i}]" for i, word in enumerate(tokens)]
    ids = {name: token(told, entry) for name, entry in SPECIAL.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    pre = PRES.get(entries["pre"] or "default")
    adds_bos = entries["add_bos_token"]
    if adds_bos is None:
        adds_bos = kind == "llama" or (pre is not None and pre.adds_bos)
    for name, asked in (("bos", adds_bos), ("eos", entries["add_eos_token"])):
        if asked and f"{name}_token" not in special:
            raise told.refuse(f"texts get a {name.upper()} token, but the file does not name one", ANOTHER)
    try:
        with panics_are_errors():
            if kind == "llama":
                made = _sentencepiece(
                    tokens, entries["scores"], special.get("unk_token"), entries["add_space_prefix"] is not False
                )
            else:
                made = _byte_level(told, tokens, entries["merges"], entries["pre"] or "default")
            made.add_tokens(_added(told, tokens, entries["token_type"]))
            template = file.metadata.get("tokenizer.chat_template")
            return PreTrainedTokenizerFast(
                tokenizer_object=made,
                add_bos_token=bool(adds_bos),
                add_eos_token=bool(entries["add_eos_token"]),
                chat_template=template if isinstance(template, str) else None,
                model_max_length=told.integer("context_length"),
                clean_up_tokenization_spaces=False,
                **special,
            )
    except UserError:
        raise
    except Exception as error:  # those of tokenizers are plain exceptions
        raise told.refuse(f"its tokenizer {kind!r} cannot be made ({line_of(error, 200)})", ANOTHER) from error


def _entry(told: Metadata, name: str, kind: type) -> Any:
    value = told.file.metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, kind):
        raise told.refuse(f"tokenizer.ggml.{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value.tolist() if isinstance(value, np.ndarray) else value


def _check(told: Metadata, entries: dict[str, Any]) -> None:
    """Refuse what is not understood or does not fit together."""
    for key in told.file.metadata:
        name = key.removeprefix("tokenizer.ggml.")
        if name != key and not (name in READ or name in IGNORED or name.endswith("_token_id")):
            raise told.refuse(f"{key} is not understood", ANOTHER)
    kind, tokens = entries["model"], entries["tokens"]
    if kind not in ("llama", "gpt2"):
        raise told.refuse(f"the tokenizer is of kind {kind!r}; MOYU supports 'llama' and 'gpt2'", ANOTHER)
    if len(tokens) > told.vocabulary:
        raise told.refuse(f"there are {len(tokens)} tokens for an embedding of {told.vocabulary} rows")
    if len(set(tokens)) != len(tokens):
        raise told.refuse("a token comes twice in tokenizer.ggml.tokens")
    for name in ("scores", "token_type"):
        if entries[name] is not None and len(entries[name]) != len(tokens):
            raise told.refuse(f"tokenizer.ggml.{name} has {len(entries[name])} values for {len(tokens)} tokens")
    if kind == "gpt2" and (pre := entries["pre"] or "default") not in PRES:
        raise told.refuse(f"tokenizer.ggml.pre is {pre!r}; MOYU knows {', '.join(PRES)}", ANOTHER)
    needed = "scores" if kind == "llama" else "merges"
    if entries[needed] is None:
        raise told.refuse(f"the tokenizer is of kind {kind!r}, but there is no tokenizer.ggml.{needed}", ANOTHER)


def _byte_level(told: Metadata, tokens: list[str], merges: list[str], kind: str) -> Tokenizer:
    """Words by expressions, bytes written as letters, and merges in the order of the file."""
    pre = PRES[kind]
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)  # the first token is not empty, and may begin with a space
        if cut < 0:
            raise told.refuse(f"tokenizer.ggml.merges has {merge!r}, which is not two tokens", ANOTHER)
        pairs.append((merge[:cut], merge[cut + 1 :]))
    vocabulary = {word: i for i, word in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre.whole_words))
    cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(tokens: list[str], scores: list[float], unknown: str | None, prefix: bool) -> Tokenizer:
    """The pair whose token has the best score merges first, whichever two tokens it is made of; what is no token is bytes.

    prefix: a space comes before each stretch of text between special tokens.
    """
    vocabulary = {word: i for i, word in enumerate(tokens)}
    merges = [
        (-scores[i], word[:cut], word[cut:])
        for word, i in vocabulary.items()
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: merge[0])
    pairs = [(left, right) for _, left, right in merges]
    made = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    written = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), written]) if prefix else written
    spoken = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*spoken, decoders.Strip(" ", 1, 0)] if prefix else spoken)
    return made


def _added(told: Metadata, tokens: list[str], types: list[int] | None) -> list[AddedToken]:
    """The tokens that are found in a text before anything else is."""
    # llama.cpp's rule: special tokens of Phi-3 take the white space behind them, but for three.
    named = told.file.metadata.get("general.name")
    phi3 = isinstance(named, str) and any(part in named.lower() for part in ("phi-3", "phi3"))
    alone = {"<unk>", "<s>", "<|endoftext|>"}
    return [
        AddedToken(word, normalized=False, special=kind != USER, rstrip=phi3 and word not in alone)
        for word, kind in zip(tokens, types or [NORMAL] * len(tokens), strict=True)
        if kind in (UNKNOWN, CONTROL, USER) or word in ENDS
    ]
