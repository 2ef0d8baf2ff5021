"""Tasks of lm-evaluation-harness under a plan: every scored position sparse, dense beside it.

The harness scores a continuation in one pass over context and continuation. That would be dense prefill, or nothing at all
where only single steps skip. Here the context is dense up to its last token, and from that token on, whose
prediction is the first that counts, positions are sparse: the protocol of `moyu.evaluate` with P = context - 1. Generation is
`generate` with the plan applied: the prompt dense, every step sparse.
"""

from __future__ import annotations

import difflib
import logging
import math
import pkgutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moyu.calibration.context import Context
from moyu.calibration.settings import Stage
from moyu.engine.applied import Applied
from moyu.engine.choosers import Counter
from moyu.errors import UserError, line_of
from moyu.measure import accounting
from moyu.model import zoo
from moyu.plan import Plan
from moyu.records import Record, Task
from moyu.records.about import about_plan

try:
    import datasets
    import datasets.packaged_modules
    import lm_eval
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f"tasks need lm-eval ({error})", "pip install 'moyu-llm[eval]', or 'lm-eval>=0.4.13'") from error

HFLM: Any = huggingface.HFLM  # its type is lost behind the harness' decorator
BATCH = 16  # rows of a call
BOOTSTRAP = 1000  # resamples for the standard error of what is no mean over documents


class SparseLM(HFLM):
    """A model that the harness can question, dense or, within `under(applied)`, sparse where it is scored."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = BATCH) -> None:
        """`model` without a plan: `under` says which one is applied."""
        with _quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.applied: Applied | None = None
        self.counters: list[tuple[Counter, int]] = []  # what calls skipped, and their sparse positions

    @contextmanager
    def under(self, applied: Applied) -> Iterator[list[tuple[Counter, int]]]:
        """Answer with the plan that is applied to the model; gives a list that fills with what is skipped."""
        self.applied, self.counters = applied, []
        try:
            yield self.counters
        finally:
            self.applied = None

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As HFLM's, without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """As HFLM's, without a progress bar."""
        return super().generate_until(requests, disable_tqdm)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) of (key, context ids, continuation ids), and whether it is the greedy one.

        Rows that run together have one boundary and padding on the right only: no row's mask or logits depend on another.
        """
        answers: list[Any] = [None] * len(requests)
        rows = [((context + asked)[-(self.max_length + 1) :], len(asked)) for _, context, asked in requests]
        prompts = [len(ids) - 1 - asked for ids, asked in rows]  # P
        order = sorted(range(len(rows)), key=lambda i: (prompts[i], -len(rows[i][0])))
        for prompt, members in groupby(order, key=prompts.__getitem__):
            group, size = list(members), override_bs or int(self.batch_size)
            for part in (group[i : i + size] for i in range(0, len(group), size)):
                log_probs = self._log_probs([rows[i][0][:-1] for i in part], prompt)  # (B, T - P, V)
                for i, own in zip(part, log_probs, strict=True):
                    ids, asked = rows[i]
                    target = torch.tensor(ids[-asked:], device=own.device)
                    own = own[:asked]
                    score = float(own.gather(1, target[:, None]).double().sum())
                    answers[i] = (score, bool((own.argmax(1) == target).all()))
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def _log_probs(self, rows: Sequence[Sequence[int]], prompt: int) -> Tensor:
        """Log-probabilities (B, T - P, V) that positions from P on give to their next token, rows padded to T."""
        width = max(len(ids) for ids in rows)
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows], device=self.device)
        there = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=self.device)
        if self.applied is None:
            logits = self.model(input_ids=tokens, attention_mask=there, use_cache=False).logits
        else:
            if prompt < 1 and self.applied.granularity == "sequence":
                raise UserError(
                    f"method {self.applied.method_name!r} decides from the prompt, and this task scores text without one",
                    "choose a task with contexts, or a method that decides by token",
                )
            counter = Counter(len(rows), self.max_length)
            with self.applied.prompt(prompt), self.applied.watched(chooser=counter):
                logits = self.model(input_ids=tokens, attention_mask=there, use_cache=False).logits
            self.counters.append((counter, int(there[:, prompt:].sum())))
        return logits[:, prompt:].float().log_softmax(-1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """`generate` after `context` (B, T), padded on the left; counted where a plan is applied."""
        if self.applied is None:
            return super()._model_generate(context, max_length, stop, **options)
        counter = Counter(len(context), max_length)
        with self.applied.watched(chooser=counter):
            out = super()._model_generate(context, max_length, stop, **options)
        steps = out.shape[1] - context.shape[1] - 1  # the prompt gives the first new token
        self.counters.append((counter, len(context) * steps))
        return out


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' remarks on models that are handed over and on the data of tasks."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _named_files() -> Iterator[None]:
    """A task that names a kind of file and no files is refused: `datasets` would read all that lies below this folder."""
    load, kinds = (
        datasets.load_dataset,
        {kind.name for kind in pkgutil.iter_modules(datasets.packaged_modules.__path__)},
    )

    def of_files(path: str, *args: Any, **options: Any) -> Any:
        if path in kinds and not (options.get("data_files") or options.get("data_dir")):
            raise UserError(f"it reads {path!r} files and names none", "give `dataset_kwargs: {data_files: FILE}`")
        return load(path, *args, **options)

    with mock.patch.object(datasets, "load_dataset", of_files):
        yield


def find_tasks(names: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """Tasks, groups and tags by name: those of the zoo, of YAML files in `folder`, and the harness' own.

    Raises UserError for an unknown name, with the nearest known ones, and for data that cannot be read.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r} with tasks", "give one with YAML files to --task-folder")
    own: list[str | Path] = [Path(zoo.__file__).parent / "tasks", *([folder] if folder else [])]
    found = {}
    with _quiet():
        try:
            manager = TaskManager(include_path=own, include_defaults=False)
            known = manager.all_tasks
            if not set(names) <= set(known):
                manager = TaskManager(include_path=own)  # reads thousands of files
                known = manager.all_tasks
        except Exception as error:  # of the harness, which believes what a file says
            raise UserError(
                f"the tasks in {str(folder or own[0])!r} cannot be read ({line_of(error)})",
                "is the `task` of every YAML file there a name?",
            ) from error
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or TASKS
                raise UserError(f"no task {name!r}", f"did you mean {' or '.join(near)}?")
            try:
                with _named_files():
                    found[name] = manager.load([name])
            except UserError as error:
                raise UserError(f"task {name!r}: {error.problem}", error.next_step) from error
            except Exception as error:  # of datasets, of its network, of what a task imports, of what its file says
                raise UserError(
                    f"task {name!r} or its data cannot be read ({line_of(error)})",
                    f"is its file right, and does this machine reach the hub? {' and '.join(TASKS)} need none",
                ) from error
    return found


TASKS = ("python_next_line", "python_assignment")  # of the zoo


def evaluate(lm: SparseLM, task: Mapping[str, Any], *, limit: int | None = None, seed: int = 0) -> Mapping[str, Any]:
    """The harness' results for tasks of `find_tasks`; at most `limit` documents of each."""
    for each in task["tasks"].values():
        each.set_fewshot_seed(seed)
    return lm_eval.evaluate(lm, task, limit=limit, bootstrap_iters=BOOTSTRAP)  # pyright: ignore


def compare(
    context: Context,
    plans: Sequence[Plan],
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    stage: Stage,
) -> list[Record]:
    """Records of every metric of tasks (as `find_tasks` gives them) under each plan, dense beside it."""
    model, anatomy = context.loaded.model, context.anatomy
    lm, rows = SparseLM(model, context.loaded.tokenizer), []
    total, done = len(tasks) * (len(plans) + 1), 0
    for name, task in tasks.items():
        stage("tasks", done, total)
        dense = evaluate(lm, task, limit=limit, seed=context.settings.seed)
        done += 1
        for plan in plans:
            stage("tasks", done, total)
            with Applied(model, plan, engine="mask", anatomy=anatomy) as applied, lm.under(applied) as counted:
                sparse = evaluate(lm, task, limit=limit, seed=context.settings.seed)
            rows += _records(context, plan, name, dense, sparse, counted)
            done += 1
    stage("tasks", total, total)
    return rows


def _records(
    context: Context, plan: Plan, name: str, dense: Any, sparse: Any, counted: list[tuple[Counter, int]]
) -> Iterator[Record]:
    units = [pair for counter, _ in counted for pair in counter.layers.values()]
    skipped, positions = sum(s for s, _ in units), sum(n for _, n in counted)
    read = accounting.dense_step_bytes(context.loaded.model, context.anatomy)
    added = accounting.added_bytes(plan, context.anatomy)
    fraction = (read + added - sum(c.skipped_bytes for c, _ in counted) / max(positions, 1)) / read
    for task, values in sparse["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            error = f"{metric}_stderr,{chosen}"
            samples = sparse["n-samples"].get(task) or sparse["n-samples"]
            count = samples["effective"] if "effective" in samples else sum(s["effective"] for s in samples.values())
            yield Task(
                kind="task",
                **context.about(plan),
                **about_plan(plan),
                simulated=True,
                realized_sparsity=skipped / sum(u for _, u in units) if units else 0.0,
                byte_fraction=None if context.anatomy.foreign else fraction,
                ideal_byte_fraction=fraction if context.anatomy.foreign else None,
                asked=name,
                task=task,
                metric=metric if chosen == "none" else f"{metric}, {chosen}",
                higher_is_better=sparse["higher_is_better"].get(task, {}).get(metric),
                samples=count,
                shots=sparse["n-shot"].get(task),
                sparse_positions=positions,
                value=value,
                stderr=_number(values.get(error)),
                value_dense=float(dense["results"][task][key]),
                stderr_dense=_number(dense["results"][task].get(error)),
                difference_stderr=_paired(dense["samples"].get(task), sparse["samples"].get(task), metric, chosen),
                harness=f"lm-eval {version('lm-eval')}",
            )


def _number(value: Any) -> float | None:
    """A standard error; the harness writes N/A where it has none."""
    return float(value) if isinstance(value, float) and math.isfinite(value) else None


def _paired(dense: Any, sparse: Any, metric: str, chosen: str) -> float | None:
    """Standard error of the mean difference over the same documents; None where the metric is no number a document."""
    if not dense or not sparse:
        return None
    first, second = ([s[metric] for s in each if s["filter"] == chosen and metric in s] for each in (dense, sparse))
    both = list(zip(first, second, strict=True))
    if len(both) < 2 or not all(isinstance(v, float | int) for pair in both for v in pair):
        return None
    return statistics.stdev(float(b) - float(a) for a, b in both) / math.sqrt(len(both))
