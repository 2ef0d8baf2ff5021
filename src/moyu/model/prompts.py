"""Between what a user writes and tokens: chat templates, prompts, the context, and text as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moyu.errors import UserError, line_of
from moyu.model.dissect import text_config
from moyu.model.loading import Loaded

Show = Callable[[str], None]  # is given each piece of text as it is written
BROKEN = "\ufffd"  # what a tokenizer writes for a character whose last bytes are still to come


def as_chat(loaded: Loaded, messages: Sequence[Mapping[str, str]], remedy: str) -> str:
    """Messages (`role`, `content`) in the model's chat template, up to where the answer begins.

    remedy: what to do instead, where there is no template. Raises UserError for a model without one, and for one that cannot be
    filled in with these messages.
    """
    if not loaded.tokenizer.chat_template:
        raise UserError(f"{loaded.name!r} has no chat template", remedy)
    try:
        said = [{key: written(text) for key, text in message.items()} for message in messages]
        return str(loaded.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    except UserError:
        raise
    except Exception as error:  # templates are programs: jinja2's errors, and whatever they raise themselves
        raise UserError(f"the chat template of {loaded.name!r} fails ({line_of(error, 200)})", remedy) from error


def written(words: str) -> str:
    """The words as they were written: where the locale is C, Python hands over the bytes of other characters one by one.

    Raises UserError for what is no text in UTF-8.
    """
    try:
        return words.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise UserError("the prompt is not UTF-8 text", "write it in UTF-8") from error


def prompt_ids(loaded: Loaded, prompt: str) -> Tensor:
    """The prompt's tokens (1, T), on the model's device; UserError where it has none.

    A prompt that begins with the model's BOS, as a chat template writes it, gets no second one.
    """
    prompt, bos = written(prompt), loaded.tokenizer.bos_token
    begun = isinstance(bos, str) and prompt.startswith(bos)
    ids: Any = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=not begun)["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("the prompt has no token", "give some text")
    return require_known(loaded, ids).to(loaded.model.device)


def require_known(loaded: Loaded, ids: Tensor) -> Tensor:
    """The ids, if the model has an embedding of each: a tokenizer may have more tokens, and ids come from outside. Else UserError."""
    limit: int = loaded.model.get_input_embeddings().num_embeddings  # pyright: ignore
    strange = ids[(ids < 0) | (ids >= limit)].flatten()
    if strange.numel():
        raise UserError(
            f"token {int(strange[0])} is none of the {limit} that {loaded.name!r} has",
            "is this the tokenizer that the model was trained with?",
        )
    return ids


def context_of(model: nn.Module) -> int | None:
    """Tokens that the model has positions for; None where its config names no limit."""
    return getattr(text_config(model), "max_position_embeddings", None)


def check_length(loaded: Loaded, ids: Tensor, new_tokens: int, option: bool = True) -> None:
    """Refuse more tokens than the model has positions for. option: whether --new-tokens can be given."""
    limit = context_of(loaded.model)
    taken = ids.shape[1]
    if limit is not None and taken + new_tokens > limit:
        room = f"use --new-tokens {limit - taken} or fewer" if option and limit > taken else "give a shorter --prompt"
        raise UserError(
            f"{taken} tokens of prompt and {new_tokens} new ones are more than the {limit} that {loaded.name!r} reads",
            room,
        )


class Pieces:
    """Shows text as its tokens come.

    Some characters span several tokens, and some tokenizers write a token differently at the start of a text. So a token is
    decoded behind the ones before it, and its text is shown once its characters are whole.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], show: Show, *, special: bool = True) -> None:
        """`prompt`: the ids before the text. special: show special tokens, such as the end of a turn, too."""
        self.tokenizer, self.show, self.ids, self.special = tokenizer, show, list(prompt), special
        self.start, self.shown = max(0, len(prompt) - 4), len(prompt)  # text of ids[start:shown] is before new text

    def take(self, token: int) -> None:
        """Show what a token adds, where its characters are whole."""
        self.ids.append(token)
        self._show()

    def _show(self, last: bool = False) -> None:
        before = self._text(self.ids[self.start : self.shown])
        now = self._text(self.ids[self.start :])
        if len(now) > len(before) and (last or not now.endswith(BROKEN)):
            self.show(now[len(before) :])
            self.start, self.shown = self.shown, len(self.ids)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not self.special)

    def end(self) -> None:
        """Show what is left."""
        self._show(last=True)
