"""Commands that are killed at random moments: what they leave is whole, and a run after it ends as one that nobody disturbed.

Not in CI: `make kill N=3 SEED=1` kills each command N times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moyu import UserError, records
from moyu.plan import Plan

N = int(os.environ.get("KILL_N", "2"))
SEED = int(os.environ.get("KILL_SEED", "0"))
HERE = Path(__file__).parent
CLI = [sys.executable, "-m", "moyu.commands.cli"]
FEW = ["--window", "32", "--prompt-tokens", "16"]
COMMANDS = {
    "calibrate": lambda out: [*CLI, "calibrate", "relu", "-m", "cett", "-m", "teal", "-m", "griffin", *FEW, "--out", out],
    "fit": lambda out: [*CLI, "fit", "deja-vu", "relu", "--knob", "rank=4", "--windows", "8", *FEW, "--out", out],
    "run": lambda out: [*CLI, "run", "relu", "-m", "teal", "-m", "griffin", "--shape", "none", *FEW, "--out", out],
    "trinity": lambda out: [*CLI, "trinity", "--quick", "--models", "relu", "--methods", "griffin,teal", "--bytes", "0.75",
                            "--no-speed", "--out", out],
    "study": lambda out: [*CLI, "study", "dominance", "--quick", "--model", "relu", "--out", out],
    "coverage": lambda out: [*CLI, "coverage", *(w for t in ("llama", "opt", "gpt2") for w in ("--only", t)), "--out", out],
    "zoo train": lambda out: [sys.executable, str(HERE / "train.py"), out],
}  # fmt: skip
# What a clock, a path or a machine's load says, which no two runs have alike.
TIMES = {
    "date", "seconds", "fit_s", "command", "commit", "dirty", "tok_s", "tok_s_dense", "tok_s_kernels", "speedup", "gb_s", "gb_s_dense",
    "read_ceiling_gb_s", "ceiling_share", "p20", "p50", "p80", "first_token_s", "first_token_s_dense", "peak_bytes",
}  # fmt: skip


def start(words):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def finished(words):
    began, process = time.monotonic(), start(words)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()[-800:]
    return time.monotonic() - began


def plain(value):
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in TIMES}
    return [plain(v) for v in value] if isinstance(value, list) else value


def contents(out: Path):
    """What a run left, by the name of the file: records without times, JSON, and the bytes of tensors."""
    found = {}
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.is_dir() or any(part.startswith(".") for part in Path(name).parts):
            continue  # locks, and what was written beside when the process died
        match file.suffix:
            case ".jsonl":
                found[name] = [plain(json.loads(line)) for line in file.read_text().splitlines()]
            case ".json":
                found[name] = plain(json.loads(file.read_text()))
            case ".safetensors" | ".bin" | ".npz":
                found[name] = file.read_bytes()
            case _:
                found[name] = None
    return found


def assert_whole(out: Path):
    for file in out.rglob("*.jsonl"):
        if not file.name.startswith("."):
            records.read(file)
    for file in out.rglob("plan.json"):
        Plan.load(file.parent)
    for file in out.rglob("*.json"):
        if not any(part.startswith(".") for part in file.parts[len(out.parts) :]):
            json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(sys.platform != "linux", reason="kills a group of processes")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_leaves_what_is_whole_and_ends_the_same(name, tmp_path):
    rng, killed = random.Random(f"{SEED} {name}"), 0
    seconds = finished(COMMANDS[name](str(tmp_path / "whole")))
    broken = tmp_path / "killed"
    for _ in range(3 * N):
        if killed == N:
            break
        began, process = time.monotonic(), start(COMMANDS[name](str(broken)))
        try:  # the first part is imports
            process.communicate(timeout=seconds * rng.uniform(0.4, 1.0))
            seconds = time.monotonic() - began  # it was faster than the first run, and there is nothing left to kill
            shutil.rmtree(broken)
        except subprocess.TimeoutExpired:
            killed += 1
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if broken.exists():
            try:
                assert_whole(broken)
            except (UserError, ValueError) as error:
                pytest.fail(f"{name} left what is not whole: {error}")
    finished(COMMANDS[name](str(broken)))
    print(f"{name}: seed {SEED}, {killed} of {N} kills in runs of {seconds:.0f} s")
    expected, found = contents(tmp_path / "whole"), contents(broken)
    assert expected.keys() == found.keys()
    for file, value in expected.items():
        if isinstance(value, bytes):
            assert found[file] == value, f"{file} differs"
            continue
        here, there = (
            json.dumps(v).replace(str(o), "") for v, o in ((found[file], broken), (value, tmp_path / "whole"))
        )
        assert here == there, f"{file} differs"
