"""What stands for a model's own `forward`, `generate` and `train` while a plan is applied."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache

from moyu.engine import steps
from moyu.engine.cache import KvCache
from moyu.engine.memory import SequenceMemory, cache_of, given_cache, memory_of, remember
from moyu.engine.rows import rows_at, rows_of
from moyu.engine.session import Pass, PromptEnd, Session
from moyu.engine.trace import Trace
from moyu.errors import UserError
from moyu.methods.control import Keep, Refresh, Step


class ForwardCall:
    """Stands for a model's `forward`: says what each row is, then runs the model. Copies with the model."""

    def __init__(self, session: Session, inner: Callable) -> None:
        """`inner` is the bound forward that was there before."""
        self.session, self.inner = session, inner
        self.__signature__ = inspect.signature(inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with the applied plan."""
        session = self.session
        output, because = steps.whole_step(session, args, kwargs)
        if output is not None:
            return output
        call = self.__signature__.bind_partial(*args, **kwargs).arguments
        call = {**call, **call.get("kwargs", {})}
        given = [t for n in ("inputs_embeds", "input_ids") if isinstance(t := call.get(n), Tensor)]
        if not given:
            return self.inner(*args, **kwargs)
        ids = given[0]  # the embeddings where both are given: they are what the layers see
        cache = cache_of(call)
        memory = memory_of(cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        boundary = session.begin(memory, past, ids.shape[1], plain=call.get("inputs_embeds") is None)
        if boundary is None:
            if session.granularity == "sequence":
                raise UserError(
                    f"method {session.method_name!r} decides from the prompt, and nothing says where the prompt ends",
                    "call generate(), or wrap direct calls in `with applied.prompt(columns):`",
                )
            boundary = memory.prompt = 0
        if session.controller is not None:
            self._refresh(memory, cache, call)
        unseen = memory.seen < past or (past > 0 and memory.owner != session.owner)
        memory.owner = session.owner
        if unseen and session.granularity == "sequence":
            raise UserError(
                "the cache holds a prompt that this plan's memory has not seen (cropped, or filled under no plan or another one)",
                "run the prompt again with an empty cache",
            )
        known = memory.columns.get(VALID)
        if isinstance(cache, KvCache) and cache.ragged:
            rows = rows_at(cache.lengths, boundary, ids.device)
        else:
            shape = (ids.shape[0], ids.shape[1])
            rows = rows_of(shape, call.get("attention_mask"), past, boundary, ids.device, known)
        state = session.new_pass(rows, memory)
        state.past = past
        with session.entered(state):
            output = self.inner(*args, **kwargs)
        memory.seen = past + ids.shape[1]
        if not bool(rows.valid.all()) or known is not None:
            memory.append(VALID, past, rows.valid.unflatten(0, (len(ids), -1)), True)
        if state.any_dense:
            until = int(boundary.max()) if isinstance(boundary, Tensor) else boundary
            memory.dense_until = max(memory.dense_until, min(memory.seen, until))
        elif state.any_sparse:
            general = Trace("general", state.because or because)
            session.traces.note(Trace("native", f"the layers alone: {because}") if state.native else general)
        session.traces.sparse_rows += int(rows.sparse.sum()) if state.any_sparse else 0
        made = cache_of(output)
        if cache is None and made is not None:
            remember(made, memory)
        if session.controller is not None:
            self._consult(memory, state, output, ids)
        return output

    def _consult(self, memory: SequenceMemory, state: Pass, output: Any, ids: Tensor) -> None:
        """Keep the tokens and ask the controller after a sparse step."""
        memory.tokens = ids if memory.tokens is None else torch.cat([memory.tokens, ids], dim=1)
        if state.any_sparse and self.session.controller is not None:
            told = isinstance(output, tuple)  # as `return_dict=False` asks for it, behind a loss if there is one
            memory.steps += 1
            logits = next(t for t in output if isinstance(t, Tensor) and t.dim() == 3) if told else output.logits
            step = Step(memory.steps, logits[:, -1], memory.tokens, memory.control)
            memory.decision = self.session.controller.after(step)

    def _refresh(self, memory: SequenceMemory, cache: Cache | None, call: Mapping[str, Any]) -> None:
        """Carry out a Refresh: the last tokens again through the dense model, cache and memory included."""
        decision, memory.decision = memory.decision, Keep()
        if not isinstance(decision, Refresh) or cache is None or memory.tokens is None:
            return
        length = int(cache.get_seq_length())
        start = max(0, length - decision.tokens)
        tokens, boundary, control = memory.tokens, memory.prompt, memory.control
        mask = call.get("attention_mask")
        mask = None if mask is None else mask[:, :length]
        memory.sites, memory.masks = {}, {}
        cache.crop(start - length)
        name = next(n for n, value in call.items() if value is cache)
        kwargs: dict[str, Any] = {"input_ids": tokens[:, start:length], name: cache, "use_cache": True}
        if mask is not None:
            kwargs["attention_mask"] = mask
            if "position_ids" in self.__signature__.parameters:
                kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        rows = rows_of((len(tokens), length - start), mask, start, length, tokens.device)  # all dense
        state = self.session.new_pass(rows, memory)
        state.past = start
        with self.session.entered(state):
            self.inner(**kwargs)
        memory.tokens, memory.prompt, memory.dense_until, memory.seen = tokens, boundary, length, length
        memory.control = control


VALID = "no padding"  # among a memory's columns: (B, T) bool


class GenerateCall:
    """Stands for a model's `generate`: what comes before the first drawn token is the prompt."""

    def __init__(self, session: Session, inner: Callable) -> None:
        """`inner` is the bound generate that was there before."""
        self.session, self.inner = session, inner
        self.__signature__ = inspect.signature(inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """generate() with the applied plan.

        Raises UserError where tokens were drawn after the prompt and no step ran under the plan.
        """
        call = self.__signature__.bind(*args, **kwargs).arguments
        extra = next((n for n, p in self.__signature__.parameters.items() if p.kind is p.VAR_KEYWORD), None)
        given = {**call, **({} if extra is None else call.get(extra, {}))}
        ids = next((given[n] for n in ("inputs", "input_ids") if isinstance(given.get(n), Tensor)), None)
        end, session = PromptEnd(ids.shape[1] if ids is not None and self._drafts(given) else None), self.session
        kwargs["logits_processor"] = LogitsProcessorList([*(given.get("logits_processor") or ()), end])
        if session.native is not None and session.native.waits_for_nobody and not self._drafts(given):
            kwargs |= self._own_cache(given)
        before = session.traces.sparse_rows
        with session.prompt(end):
            output = self.inner(*args, **kwargs)
        if session.plan is not None and end.draws > 1 and session.traces.sparse_rows == before:
            raise UserError(
                f"{end.draws} tokens were drawn and the plan was used for none of them: this version of transformers, or a "
                "wrapper around the model, calls it in a way that MOYU does not see",
                "call `moyu.generate`, and report the model and the version of transformers",
            )
        return output

    def _own_cache(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """MOYU's cache, which a compiled step appends to, where the call does not name one."""
        if cache_of(given) is not None or "cache_implementation" in given or given.get("use_cache") is False:
            return {}
        core: Any = self.session.model
        return given_cache(core, KvCache(core.config.get_text_config(decoder=True)))

    def _drafts(self, given: Mapping[str, Any]) -> bool:
        """Whether tokens that another model has drafted may come into one call with the prompt's."""
        config = given.get("generation_config") or getattr(self.session.model, "generation_config", None)
        return any(given.get(name) is not None or getattr(config, name, None) is not None for name in _DRAFTING)


_DRAFTING = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")

# Ways of generating that call the model's forward from a scheduler of their own, which never says where a prompt ends.
BATCHED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class RefusedCall:
    """Stands for a way of generating that an applied plan cannot follow."""

    def __init__(self, name: str) -> None:
        """`name` is the method's."""
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError."""
        raise UserError(
            f"{self.name}() puts pieces of several prompts into one call, and an applied plan would take them for new text",
            "call generate(), or `moyu.generate(model, prompts)`, which takes prompts of different lengths",
        )


class TrainCall:
    """Stands for a model's `train`: masks and laid-out weights are for inference."""

    def __init__(self, session: Session, inner: Callable) -> None:
        """`inner` is the bound train that was there before."""
        self.session, self.inner = session, inner

    def __call__(self, mode: bool = True) -> Any:
        """train(False) passes; train(True) is refused."""
        if mode:
            raise UserError("a plan is applied, and training under it would train a masked model", "restore() first")
        return self.inner(False)
