"""New text after a prompt: dense, under a plan, or drafted by a plan and corrected by dense. Imports torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moyu import records
from moyu.engine.applied import Applied
from moyu.engine.generate import generate
from moyu.engine.speculation import Correction, Speculation, speculate
from moyu.kernels import BackendName
from moyu.model.anatomy import Anatomy
from moyu.model.loading import Loaded
from moyu.model.prompts import Pieces, Show
from moyu.plan import Plan
from moyu.records.about import AboutModel, about_plan


@dataclass(frozen=True)
class Written:
    """New text after a prompt, and how long it took."""

    ids: list[int]
    tokens: list[str]  # one string an id
    text: str
    first_token_s: float  # seconds to the first new token: prefill
    tok_s: float | None  # new tokens a second after the first; None for a single token
    drafted: Speculation | None = None  # where dense corrected what a plan drafted
    step: str | None = None  # which implementation of a decode step ran, and why not a faster one


@torch.no_grad()
def write(
    loaded: Loaded,
    anatomy: Anatomy,
    plan: Plan | None,
    ids: Tensor,
    new_tokens: int,
    *,
    backend: BackendName = "auto",
    strict: bool = False,
    correction: Correction | None = None,
    margins: bool = False,
    seed: int = 0,
    show: Show | None = None,
) -> Written:
    """Text after `ids` (1, T); dense where there is no plan. correction: dense checks what the plan or the text itself drafts; else it is
    greedy. margins: keep how far the two largest dense scores of each token are apart.

    strict: UserError where a step is not the fastest there is.
    """
    pieces = None if show is None else Pieces(loaded.tokenizer, ids[0].tolist(), show)
    drafted = None if correction is None else Speculation(keep_margins=margins)
    fresh, times = list[int](), list[float]()
    first_bits = correction is not None and correction.rule == "lossless"
    with Applied(loaded.model, plan, backend=backend, anatomy=anatomy, first_bits=first_bits) as session:
        start = time.perf_counter()
        if drafted is None or correction is None:
            stream = generate(session, ids, strict=strict, max_new_tokens=new_tokens, do_sample=False)
        else:
            stream = speculate(
                session,
                ids,
                drafts=correction.drafts,
                source=correction.source,
                rule=correction.decide,
                strict=strict,
                seed=seed,
                out=drafted,
                max_new_tokens=new_tokens,
                **correction.sampling,
            )
        for tokens in stream:
            times.append(time.perf_counter())
            fresh.append(int(tokens[0]))
            if pieces is not None:
                pieces.take(fresh[-1])
    if pieces is not None:
        pieces.end()
    return Written(
        fresh,
        *_decoded(loaded, fresh),
        first_token_s=times[0] - start,
        tok_s=(len(fresh) - 1) / (times[-1] - times[0]) if len(fresh) > 1 else None,
        drafted=drafted,
        step=session.traces.summary() if len(fresh) > 1 else None,
    )


def _decoded(loaded: Loaded, ids: Sequence[int]) -> tuple[list[str], str]:
    """One string a token, and their text."""
    decode = loaded.tokenizer.decode
    return [str(decode([i])) for i in ids], str(decode(list(ids)))


def generation_record(
    about: AboutModel,
    plan: Plan | None,
    prompt: str,
    sparse: Written,
    dense: Written | None = None,
    correction: Correction | None = None,
) -> records.Generation:
    """A text under a plan, and dense text beside it where there is one; without a plan the text itself is the dense one."""
    if plan is None and correction is None:
        dense = sparse
    first = None if dense is None else _first_difference(dense.ids, sparse.ids)
    drafted, part = sparse.drafted, None
    if drafted is not None and correction is not None:
        part = records.Correction(
            rule=correction.rule,
            drafts=correction.drafts,
            temperature=correction.temperature,
            from_text=drafted.found,
            from_plan=drafted.drafted,
            acceptance=drafted.acceptance,
            tokens_per_pass=drafted.tokens_per_pass,
            margin=None if first is None or first >= len(drafted.margins) else drafted.margins[first],
        )
    return records.Generation(
        kind="generation",
        **about,
        **about_plan(plan),
        simulated=False,
        prompt=prompt,
        dense_text=None if dense is None else dense.text,
        dense_tokens=None if dense is None else dense.tokens,
        first_token_s_dense=None if dense is None else dense.first_token_s,
        tok_s_dense=None if dense is None else dense.tok_s,
        sparse_text=sparse.text,
        sparse_tokens=sparse.tokens,
        first_token_s=sparse.first_token_s,
        tok_s=sparse.tok_s,
        new_tokens=len(sparse.ids),
        first_difference=first,
        step=sparse.step,
        correction=part,
    )


def _first_difference(dense: Sequence[int], sparse: Sequence[int]) -> int | None:
    """The index of the first token that differs; the shorter length where one goes on; None where they are the same."""
    pairs = zip(dense, sparse, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return min(len(dense), len(sparse)) if first is None and len(dense) != len(sparse) else first
