"""Files that are not what a tool wrote: each is right, finite and equal in every engine, or refused in one line.

500 inputs here; `make hostile N=10000 SEED=1` gives as many others as one likes. An input that fails names its number: run it alone with
`HOSTILE_SEED=... HOSTILE_ONLY=kind:number pytest tests/hostile`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import random
import signal
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import safetensors.torch
import torch

import gguf_files as parts
from equality import UNIT, assert_near, off, plan_for, rounding
from hostile.mutators import bytes_changed, json_changed, text_changed
from moyu import UserError, methods, records
from moyu.calibration.profiling import Profile, profile
from moyu.engine.applied import Applied
from moyu.engine.cache import KvCache
from moyu.engine.generate import generate, read, step
from moyu.measure.windows import Windows
from moyu.model import loading
from moyu.plan import Plan
from test_gguf import build as build_for_gguf
from test_gguf import tensors_of
from tiny import build, tokens

N = int(os.environ.get("HOSTILE_N", "500"))
SEED = int(os.environ.get("HOSTILE_SEED", "0"))
ONLY = os.environ.get("HOSTILE_ONLY", "")
SECONDS, BYTES = 5, 1 << 30  # the most that one input may take
SHARES = {"plan": 0.44, "records": 0.2, "profile": 0.12, "gguf": 0.12, "checkpoint": 0.1, "task": 0.02}
METHODS = ("teal", "was", "estimate", "griffin", "popularity", "deja-vu", "moefication", "larosa", "r-sparse")


class TooLong(BaseException):
    """An input took longer than SECONDS; no handler of the product's takes it for an error of a file."""


@contextlib.contextmanager
def at_most(seconds):
    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def logits_of(session):
    """Of a prompt and three steps under a plan, whatever the engine."""
    cache = KvCache(session.model.config)
    found = [read(session, cache, tokens(1, 6))[:, -1]]
    with torch.no_grad():
        found += [step(session, cache, tokens(1, 1, seed=n)[0]) for n in range(3)]
    return torch.cat(found)


def assert_equal(own, reference, model, plan):
    """Raises AssertionError where logits are further from the reference's than rounding explains.

    Four times what the additions of fp32 explain, as for native steps. Beyond it, twice what the reference's own logits change by
    when its embeddings are one rounding off: a score on its threshold, or a value between two of the 8-bit integers that products
    with a copy in blocks take, then goes the other way. Where there is such an edge, about every second change crosses it, so that
    32 changes are enough.
    """
    most = 4 * rounding(model, "fp32")
    if off(own, reference) <= most:
        return
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    embeddings = twin.get_input_embeddings().weight.data
    with Applied(twin, plan, backend="reference", check=False) as session:
        for _ in range(32):
            change = UNIT["fp32"] * torch.randn(embeddings.shape, generator=generator)
            embeddings.copy_(model.get_input_embeddings().weight.detach() * (1 + change))
            most = max(most, 2 * off(logits_of(session), reference))
            if off(own, reference) <= most:
                return
    assert_near(own, reference, most, "engines")


class Plans:
    """Header, tensors, and bytes of plans; where a reader could see the difference, the checksum is right."""

    def __init__(self, folder):
        self.folder, self.model = folder, build("llama", torch.float32)
        self.sound = []
        for name in METHODS:
            plan_for(self.model, methods.method(name), windows=Windows(tokens(2, 24), 12)).save(folder)
            self.sound.append([(folder / f"plan.{end}").read_bytes() for end in ("json", "safetensors")])

    def write(self, rng):
        header, tensors = rng.choice(self.sound)
        match rng.randrange(4):
            case 0:
                header = text_changed(header, rng)
            case 1:
                tensors = bytes_changed(tensors, rng)
            case 2:
                header = json.dumps(json_changed(json.loads(header), rng)).encode()
            case 3:
                found = safetensors.torch.load(tensors)
                if not found:
                    header = text_changed(header, rng)
                else:
                    name = rng.choice(sorted(found))
                    found[name] = self.other(found[name], rng)
                    tensors = safetensors.torch.save(found)
        if rng.random() < 0.8:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                parsed = json.loads(header)
                parsed["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
                header = json.dumps(parsed).encode()
        (self.folder / "plan.json").write_bytes(header)
        (self.folder / "plan.safetensors").write_bytes(tensors)

    @staticmethod
    def other(tensor, rng):
        match rng.randrange(5):
            case 0:
                return tensor[: max(1, len(tensor) // 2)].clone()
            case 1:
                return torch.zeros(rng.choice(((1, 100_000), (0,), (3, 3, 3), ())), dtype=tensor.dtype)
            case 2:
                return tensor.t().contiguous() if tensor.dim() == 2 else tensor[None].contiguous()
            case 3:
                return tensor.to(rng.choice((torch.float16, torch.int8, torch.int64, torch.bool)))
        flat = tensor.clone().view(-1)
        flat[rng.randrange(len(flat))] = (
            rng.choice((float("nan"), float("inf"), 1e30)) if flat.is_floating_point() else -1
        )
        return flat.view(tensor.shape)

    def use(self):
        plan = Plan.load(self.folder)
        found = []
        for backend in ("auto", "reference"):
            with Applied(self.model, plan, backend=backend) as session:
                found.append(logits_of(session))
        if not torch.isfinite(found[0]).all():  # numbers that are finite and too large: drawing from them is refused
            raise UserError("logits are not finite", "as Draw says")
        assert_equal(*found, self.model, plan)


class Records:
    def __init__(self, folder):
        self.file = folder / "records.jsonl"
        rows = [
            records.stamp(kind="environment", command="x"),
            records.stamp(kind="study", name="s", verdict="HOLDS", conditions=[], details={"a": [1, {"b": 2.5}]}),
            records.stamp(kind="coverage", architecture="llama", taken=True, checks=["a"]),
        ]
        records.write(self.file, rows)
        self.lines = self.file.read_bytes().splitlines()

    def write(self, rng):
        lines = list(self.lines)
        chosen = rng.randrange(len(lines))
        lines[chosen] = text_changed(lines[chosen], rng)
        data = b"\n".join(lines) + b"\n"
        self.file.write_bytes(bytes_changed(data, rng) if rng.random() < 0.2 else data)

    def use(self):
        records.read(self.file)


class Profiles:
    def __init__(self, folder):
        self.folder = folder
        profile(build("llama", torch.float32), Windows(tokens(2, 24), 12)).save(folder)
        self.sound = [(folder / f"profile.{end}").read_bytes() for end in ("json", "safetensors")]

    def write(self, rng):
        header, tensors = self.sound
        if rng.random() < 0.7:
            header = text_changed(header, rng)
        else:
            tensors = bytes_changed(tensors, rng)
        (self.folder / "profile.json").write_bytes(header)
        (self.folder / "profile.safetensors").write_bytes(tensors)

    def use(self):
        found = Profile.load(self.folder)
        found.needed_by_position()


def forward(model):
    """A few tokens, drawn by MOYU, which refuses to draw from what is no number."""
    assert len(list(generate(model, tokens(1, 6), max_new_tokens=3, do_sample=False))) > 0


class Gguf:
    def __init__(self, folder):
        self.file, self.sound = folder / "model.gguf", []
        tokenizer = loading.load("swiglu").tokenizer
        model = build_for_gguf("llama")
        words = parts.metadata_of(model, tokenizer)
        for key in ("tokens", "token_type"):
            words[f"tokenizer.ggml.{key}"] = words[f"tokenizer.ggml.{key}"][:128]
        words["tokenizer.ggml.merges"] = []
        self.sound = [parts.file_of(words, tensors_of(model, kind)) for kind in ("F32", "Q8_0", "Q4_0", "BF16")]

    def write(self, rng):
        self.file.unlink(missing_ok=True)
        self.file.write_bytes(bytes_changed(rng.choice(self.sound), rng))

    def use(self):
        forward(loading.load(self.file).model)


class Checkpoint:
    NAMES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")

    def __init__(self, folder):
        self.folder = folder
        build("llama", torch.float32).save_pretrained(folder)
        loading.load("swiglu").tokenizer.save_pretrained(folder)
        self.sound = {name: (folder / name).read_bytes() for name in self.NAMES if (folder / name).exists()}

    def write(self, rng):
        for name, data in self.sound.items():
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).write_bytes(data)
        name = rng.choice(sorted(self.sound))
        change = bytes_changed if name.endswith("safetensors") else text_changed
        (self.folder / name).unlink()
        if rng.random() > 0.03:
            (self.folder / name).write_bytes(change(self.sound[name], rng))

    def use(self):
        forward(loading.load(self.folder).model)


class Tasks:
    TEXT = b"""task: hostile
dataset_path: json
dataset_kwargs:
  data_files: documents.json
test_split: train
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list:
  - metric: acc
"""

    def __init__(self, folder, patch):
        pytest.importorskip("lm_eval")
        from moyu.integrations import lm_eval

        patch.chdir(folder)
        (folder / "documents.json").write_text('{"text": "a word"}')
        self.file, self.lm_eval, own = folder / "hostile.yaml", lm_eval, lm_eval.TaskManager
        # where a name is unknown, the harness' own thousands of files are read for the nearest ones, in many seconds
        patch.setattr(
            lm_eval,
            "TaskManager",
            lambda include_path, include_defaults=False: own(include_path=include_path, include_defaults=False),
        )

    def write(self, rng):
        self.file.write_bytes(bytes_changed(self.TEXT, rng) if rng.random() > 0.03 else self.TEXT)

    def use(self):
        self.lm_eval.find_tasks(["hostile"], self.file.parent)


KINDS = {"plan": Plans, "records": Records, "profile": Profiles, "gguf": Gguf, "checkpoint": Checkpoint, "task": Tasks}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of time and memory are Linux'")
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_right_or_refused_in_one_line(kind, tmp_path, monkeypatch):
    subject = KINDS[kind](tmp_path, monkeypatch) if kind == "task" else KINDS[kind](tmp_path)
    outcomes, wrong = Counter(), []
    count = max(1, round(N * SHARES[kind]))
    only = int(ONLY.partition(":")[2]) if ONLY.startswith(f"{kind}:") else None
    if ONLY and only is None:
        pytest.skip("another kind was asked for")
    logging.disable(logging.CRITICAL)
    np.seterr(all="ignore")
    try:
        with warnings.catch_warnings(), parts.little_memory(BYTES):
            warnings.simplefilter("ignore")
            for number in range(count) if only is None else [only]:
                subject.write(random.Random(f"{SEED} {kind} {number}"))
                try:
                    with at_most(SECONDS):
                        subject.use()
                    outcomes["taken"] += 1
                except UserError as error:
                    outcomes["refused"] += 1
                    if "\n" in str(error) or len(str(error)) > 2000:
                        wrong.append(f"{kind}:{number} has a long message: {str(error)[:300]!r}")
                except (Exception, TooLong) as error:
                    outcomes["wrong"] += 1
                    wrong.append(f"{kind}:{number} {type(error).__name__}: {str(error)[:200]!r}")
    finally:
        logging.disable(logging.NOTSET)
    print(f"{kind}: seed {SEED}, {count} inputs, {dict(outcomes)}")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:40])
