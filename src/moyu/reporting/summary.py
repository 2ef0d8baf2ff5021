"""The records in sentences, which claim no more than the records show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moyu.records import Generation, Quality, Record, Speed
from moyu.reporting.columns import fixed, gain, label, number, percent, times
from moyu.reporting.groups import Group, quality_groups, speed_groups, without_prompt

KL_CLOSE = 0.1  # nats per token; below it the sparse model is called close to the dense one
FEW_TOKENS = 1000  # scored; with fewer the mean KL of a plan changes by some 10 % from text to text
KL_LOST = 0.5  # above it the sparse model counts as another model
BEYOND = 1.05  # a speed-up above its limit by bytes times this is not from skipping alone
NOISY = 1.5  # p80 / p20 of the seconds per token
ALIKE = 0.9  # of the fastest plan's speed: such plans count as equally fast
SMALL_STEP = 256e6  # bytes of a dense step; below it caches and Python's overhead dominate the timing


def headline(records: Sequence[Record]) -> list[str]:
    """One sentence per quality table and per speed table, then what to take. Speed is that of the plans chosen by quality."""
    sentences, chosen = [], []
    for group in quality_groups(records):
        sentence, best = _quality_sentence(group)
        sentences.append(sentence)
        chosen += [best] if best and not without_prompt(best) else []
    return sentences + [_speed_sentence(g, chosen) for g in speed_groups(records)] + _recommended(records)


def _quality_sentence(group: Group) -> tuple[str, Quality | None]:
    rows = [r for r in group.rows if r.kl is not None and r.family != "reference"]
    first: Quality = group.rows[0]
    how = "simulated by masking" if first.simulated else "really skipped"
    on = _place(first)
    if not rows:
        return f"On {on} no method could meet the target.", None
    close = [r for r in rows if r.kl < KL_CLOSE and r.byte_fraction is not None and r.byte_fraction < 1]
    if not close:
        r = min(rows, key=lambda r: r.kl)
        return (
            f"On {on} no method here saves bytes and stays below {KL_CLOSE} nats of KL per token ({how}); the "
            f"closest is {label(r)} with {number(r.kl)} nats at {percent(r.realized_sparsity)} of its units skipped.",
            r,
        )
    r = min(close, key=lambda r: (r.byte_fraction, r.kl))
    among = f"Of {len(rows)} plans on {on}" if len(rows) > 1 else f"On {on}"
    most = "reads the fewest bytes while staying" if len(rows) > 1 else "stays"
    return (
        f"{among}, {label(r)} {most} below {KL_CLOSE} nats of KL per token: it reads "
        f"{fixed(r.byte_fraction)} of the dense model's, with {percent(r.realized_sparsity)} of its units skipped and "
        f"perplexity {number(r.ppl)} where dense has {number(r.ppl_dense)} ({how}).",
        r,
    )


def _speed_sentence(group: Group, chosen: Sequence[Quality]) -> str:
    rows: list[Speed] = [r for r in group.rows if r.method != "dense"]
    first: Speed = group.rows[0]
    where = f"{first.model}" + (" with random weights" if first.weights == "random" else "")
    if not rows:
        return f"Measured on {where}: dense decodes {number(first.tok_s_dense)} tokens per second."
    featured = [(_apart(r, q), r) for q in chosen for r in rows if r.method == q.method]
    r = min(featured, key=lambda f: f[0])[1] if featured else max(rows, key=gain)
    skipped = "" if r.realized_sparsity is None else f" with {percent(r.realized_sparsity)} of its units skipped"
    lead = "" if featured else "the fastest, "
    slower = "" if gain(r) >= 1 else ", which is slower"
    if r.tok_s_kernels is None:
        limit = f"its limit by bytes is {times(r.speedup_limit)}"
        if r.speedup > r.speedup_limit * BEYOND:
            limit = f"its bytes allow {times(r.speedup_limit)}, so the rest is not from skipping"
        return f"Measured on {where}: {lead}{r.method}{skipped} decodes at {times(r.speedup)} the speed of dense{slower}; {limit}."
    return (
        f"Measured on {where}: {lead}{r.method}{skipped} decodes at {times(gain(r))} the speed of MOYU's own dense loop{slower}; its "
        f"bytes allow {times(r.speedup_limit)}. That loop has {times(r.tok_s_kernels / r.tok_s_dense)} the speed of the baseline "
        f"({r.dense_baseline}), which is not from skipping."
    )


def _recommended(records: Sequence[Record]) -> list[str]:
    """Which of its plans to take, for each model whose quality was measured."""
    plans = [r for r in records if isinstance(r, Quality) and r.family != "reference" and not without_prompt(r)]
    models = dict.fromkeys(r.model for r in plans)
    return [f"Recommended for {m}: {_choice([r for r in plans if r.model == m], records)}" for m in models]


def _choice(plans: Sequence[Quality], records: Sequence[Record]) -> str:
    """Of the plans that stay close and are about as fast as the fastest, the closest; untimed, the one of fewest bytes."""
    close = [r for r in plans if r.kl is not None and r.kl < KL_CLOSE and (r.byte_fraction or 1) < 1]
    if not close:
        return "none of these plans. Run it dense, or let `moyu calibrate --max-kl 0.02` find how much may be skipped."
    timed = [(speed, r) for r in close if (speed := _timing(r, records)) is not None]
    of = f"of the plans below {KL_CLOSE} nats"
    if not timed:
        r = min(close, key=lambda r: (r.byte_fraction, r.kl))
        return f"{label(r)}, which reads the fewest bytes {of}. Its speed was not timed."
    fastest = max(gain(speed) for speed, _ in timed)
    speed, r = min((pair for pair in timed if gain(pair[0]) >= ALIKE * fastest), key=lambda pair: pair[1].kl or 0.0)
    random = " with random weights" if speed.weights == "random" else ""
    where = "" if speed.model == r.model else f", timed on {speed.model}{random}"
    if fastest < 1:
        return f"dense. The fastest {of} has {times(fastest)} its speed{where}."
    return f"{label(r)}, the closest of the fast plans: {number(r.kl)} nats at {times(gain(speed))} the speed of dense{where}."


def _timing(quality: Quality, records: Sequence[Record]) -> Speed | None:
    """How fast a plan is: on its own model, or on a shape where that is too small to show it."""
    own = [r for r in records if isinstance(r, Speed) and r.method == quality.method]
    large = [r for r in own if r.weights == "random" or _step_bytes(r) >= SMALL_STEP]
    return min(large or own, key=lambda r: (r.model != quality.model, _apart(r, quality)), default=None)


def _apart(speed: Speed, quality: Quality) -> tuple[bool, float]:
    """The distance of a timed plan from a scored one: whether they differ, then the difference in sparsity."""
    return speed.plan != quality.plan, abs((speed.realized_sparsity or 0.0) - (quality.realized_sparsity or 0.0))


def warnings(records: Sequence[Record]) -> list[str]:
    """Warnings to read before using the numbers."""
    quality = [r for r in records if isinstance(r, Quality) and r.kl is not None]
    speed = [r for r in records if isinstance(r, Speed) and r.method != "dense"]
    trained = [r for r in speed if r.weights == "trained"]
    few = [r for r in quality if r.tokens is not None and r.tokens < FEW_TOKENS]
    lost = [r for r in quality if (r.kl or 0) > KL_LOST]
    vain = [r for r in quality if r.kl_random is not None and (r.kl or 0) >= r.kl_random and r.family != "reference"]
    fast = [r for r in speed if gain(r) > r.speedup_limit * BEYOND]
    out = [
        _warn(lost, quality, f"KL above {KL_LOST} nats per token. The model is no longer itself."),
        _warn(vain, quality, "no better than its matched random, so the ranking adds nothing here."),
        _warn(few, quality, f"fewer than {FEW_TOKENS:,} tokens were scored: small differences are chance."),
        _warn([r for r in speed if gain(r) < 1], speed, "skipping is slower than dense on the same kernels."),
        _warn(
            fast, speed, "faster than its bytes allow: its loop is faster than the baseline's, or the timing is noisy."
        ),
        _warn([r for r in speed if r.ceiling_share > 1], speed, "above the read ceiling: weights came from a cache."),
        _warn([r for r in speed if r.p80 > NOISY * r.p20], speed, f"noisy, p80 is over {NOISY} times p20."),
    ]
    small = {r.model: s for r in trained if (s := _step_bytes(r)) < SMALL_STEP}
    out += [
        f"{m} reads {s / 1e6:.0f} MB per token: so small that its timings show overhead, not skipping."
        for m, s in small.items()
    ]
    if any(r.weights == "random" for r in speed):
        out.append("Random weights show what skipping saves at a given sparsity. They say nothing about quality.")
    commits = {(r.commit, r.dirty) for r in records}
    if any(dirty for _, dirty in commits):
        out.append("The code had uncommitted changes: its commit does not name it fully.")
    if len(commits) > 1:
        out.append("The records come from more than one state of the code.")
    return [w for w in out if w]


def _step_bytes(r: Speed) -> float:
    """Bytes that a dense step reads."""
    return (r.gb_s_dense / r.tok_s_dense if r.gb_s_dense else r.gb_s / r.tok_s * r.speedup_limit) * 1e9


def _warn(rows: Sequence[Quality | Speed], every: Sequence[Quality | Speed], text: str) -> str:
    """The rows by model, then the warning. A row of a sweep is named with its sparsity."""
    found: dict[str, dict[str, None]] = {}
    for r in rows:
        swept = sum(_place(o) == _place(r) and label(o) == label(r) for o in every) > 1
        at = f" at {percent(r.realized_sparsity)}" if swept and r.realized_sparsity is not None else ""
        found.setdefault(_place(r), {})[label(r) + at] = None
    return "; ".join(f"{', '.join(names)} on {place}" for place, names in found.items()) + f": {text}" if found else ""


def _place(r: Quality | Speed) -> str:
    """The model, and the protocol if it is not the usual one."""
    return r.model + (" without a dense prompt" if isinstance(r, Quality) and without_prompt(r) else "")


def generated(record: Generation) -> list[str]:
    """The speed of a generation: a line for the plan, and one for dense where dense ran too; and where they differ."""
    own = record.method if record.correction is None else f"{record.method}, {record.correction.rule}"
    rates = [(own, record.first_token_s, record.tok_s)]
    if (record.method != "dense" or record.correction is not None) and record.dense_text is not None:
        rates.append(("dense", record.first_token_s_dense, record.tok_s_dense))
    lines = [
        f"{name}: first token after {number(first)} s"
        + ("" if rate is None else f", then {number(rate)} tokens per second (prefill excluded)")
        for name, first, rate in rates
    ]
    if record.step is not None:
        lines.append(f"decode step: {record.step}")
    if record.correction is not None:
        own = record.correction
        lines.append(
            f"{own.rule}, {own.drafts or 'as many'} drafts{'' if own.drafts else ' as pay'}: {percent(own.acceptance)} accepted, "
            f"{number(own.tokens_per_pass)} tokens per dense pass"
        )
        if own.temperature > 0:
            return lines
    if record.first_difference is not None:
        margin = None if record.correction is None else record.correction.margin
        lines.append(
            f"first difference from dense at token {record.first_difference}"
            + ("" if margin is None else f", dense scores {number(margin)} apart")
        )
    elif (record.method != "dense" or record.correction is not None) and record.dense_text is not None:
        lines.append("the same text as dense")
    return lines


def steps(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Which implementation of a decode step ran, and why not a faster one, each once with the methods that it ran for."""
    found: dict[str, dict[str, None]] = {}
    for r in records:
        if isinstance(r, Speed | Generation) and r.step is not None:
            found.setdefault(r.step, {})[r.method] = None
    return [(", ".join(who), step) for step, who in found.items()]


def notes(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Each note once, with the methods (or kinds of records) that carry it."""
    found: dict[str, dict[str, None]] = {}
    for r in records:
        who = getattr(r, "method", None) or r.kind
        for note in r.notes:
            found.setdefault(note, {})[who] = None
    return [(", ".join(who), note) for note, who in found.items()]
