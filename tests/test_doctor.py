"""`moyu doctor`: what is slow on machines that are made up, and this one as it is."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moyu.commands import doctor
from moyu.commands.doctor import Machine, findings, lines
from moyu.kernels import cpu

GOOD = Machine(
    processor="A processor",
    platform="Linux x86_64",
    cores=8,
    quota=None,
    load=0.5,
    memory=32e9,
    free=24e9,
    huge_pages=True,
    threads=8,
    kernels="avx512bf16",
    sets=("avx512bf16", "avx2", "portable"),
    no_kernels=None,
    reads=40.0,
    gpus=(),
    no_gpu="no GPU is visible to torch; pip install 'moyu-llm[gpu]', on a machine with an NVIDIA GPU",
    versions={"moyu": "0.1.0", "python": "3.11.7"},
    extras={"serve": True, "eval": False},
)


def test_nothing_is_slow_on_a_good_machine():
    assert findings(GOOD) == []
    said = lines(GOOD)
    assert "40.0 GB/s with 8 threads" in said["reads"] and "40 tokens a second" in said["reads"]
    assert said["kernels"] == "avx512bf16 (of avx2, portable too)"
    assert said["extras"] == "serve; not installed: eval (pip install 'moyu-llm[eval]')"
    assert said["memory"] == "32.0 GB, 24.0 GB free"


@pytest.mark.parametrize(
    ("other", "what", "says"),
    [
        ({"kernels": None, "sets": (), "no_kernels": "no file; run `make setup`"}, "Everything", "Remedy: run `make setup`."),
        ({"kernels": "avx2"}, "Everything", "unset MOYU_ISA"),
        ({"kernels": "portable", "sets": ("portable",)}, "Everything", "another processor"),
        ({"kernels": "avx2", "sets": ("avx2", "portable")}, "GGUF files", "VNNI"),
        ({"threads": 16}, "Everything", "OMP_NUM_THREADS=8"),
        ({"quota": 2.0}, "Everything", "OMP_NUM_THREADS=2"),
        ({"quota": 1.5, "threads": 4}, "Everything", "OMP_NUM_THREADS=2"),
        ({"threads": 2}, "Everything", "OMP_NUM_THREADS=8"),
        ({"load": 20.0}, "Every measurement", "20.0 processes run on 8 cores"),
        ({"free": 1e9}, "Models that do not fit", "1.0 GB of memory are free"),
        ({"huge_pages": False}, "Scattered reads", "echo madvise"),
        ({"gpus": ("A GPU",), "no_gpu": "Triton is missing; pip install it"}, "--device cuda", "do not compile there (Triton is missing)"),
    ],
)  # fmt: skip
def test_what_is_slow_has_a_reason_and_a_remedy(other, what, says):
    (found,) = findings(dataclasses.replace(GOOD, **other))
    assert found.what.startswith(what)
    assert says in f"{found.why}. {found.remedy}"
    assert found.remedy.endswith(".")


def test_a_gpu_whose_steps_compile_is_not_slow():
    found = dataclasses.replace(GOOD, gpus=("A GPU", "Another"), no_gpu=None)
    assert findings(found) == []
    assert lines(found)["GPU"] == "A GPU, Another; decode steps compile"


def test_limits_of_a_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "GROUP", tmp_path)
    assert doctor._quota() is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor._quota() is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor._quota() == 1.5
    memory, free = doctor._memory()
    assert memory and free and free <= memory
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("40000000\n")
    assert doctor._memory() == (1e8, 6e7)


def test_this_machine(capsys):
    doctor.doctor(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["threads"] == torch.get_num_threads()
    assert told["kernels"] == (None if cpu.unavailable() else cpu.extension().isa())
    assert told["versions"]["torch"] == torch.__version__
    assert 0.5 < told["reads"] < 2000  # GB/s
    assert all(f["what"] and f["why"] and f["remedy"] for f in told["slow"])
    doctor.doctor()
    said = capsys.readouterr().out
    assert "GB/s with" in said and "slow" in said
