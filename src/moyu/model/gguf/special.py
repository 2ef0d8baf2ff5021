"""The special tokens of a GGUF file, with llama.cpp's defaults for what a file does not say."""

from __future__ import annotations

from moyu.model.gguf.metadata import Metadata

# Entries of `tokenizer.ggml.` that name a token which ends a text.
_NAMED = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Tokens that end a text by what they are called, because many files name one of several.
ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
# Of the three that gpt-oss has, the first two end a text and the third ends a part of it.
_HARMONY = ("<|return|>", "<|call|>", "<|end|>")
# The ids in SentencePiece's vocabularies; of byte-level ones nothing is known.
_DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}


def token(told: Metadata, name: str) -> int | None:
    """The id of a special token ("bos", "eos", "padding", ...); None if there is none. Raises UserError for an id out of range."""
    named = told.token(name)
    kind = told.file.metadata.get("tokenizer.ggml.model")
    default = _DEFAULTS.get(kind, {}).get(name) if isinstance(kind, str) else None
    return default if named is None and default is not None and default < told.vocabulary else named


def ends(told: Metadata) -> list[int]:
    """The ids of all tokens that end a text, in order."""
    found = {token(told, name) for name in _NAMED} - {None}
    words = told.file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(words, list):
        at = {word: i for i, word in enumerate(words) if word in ENDS and i < told.vocabulary}
        found |= set(at.values())
        if all(word in at for word in _HARMONY):
            found.discard(at[_HARMONY[-1]])
    return sorted(i for i in found if i is not None)
