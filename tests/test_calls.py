"""Calls that a user would make are taken, or refused in one line; and what a terminal cannot show stops nothing."""

from __future__ import annotations

import io
import sys

import pytest
import torch

import moyu
from gguf_files import little_memory
from moyu import UserError, methods
from moyu.commands import cli
from moyu.measure.windows import Windows
from tiny import build, tokens


def test_a_method_may_be_named():
    windows = Windows(tokens(2, 32), 16)
    by_name, by_value = (
        moyu.calibrate(build("llama", torch.float32), m, windows, sparsity=0.5)
        for m in ("cats", methods.method("cats"))
    )
    assert by_name.hash == by_value.hash
    with pytest.raises(UserError, match="did you mean cats"):
        moyu.calibrate(build("llama", torch.float32), "cat", windows, sparsity=0.5)


def test_what_is_no_plan_is_refused():
    with pytest.raises(UserError, match="'cats' is no plan: make one"):
        moyu.Applied(build("llama", torch.float32), "cats")
    with pytest.raises(UserError, match="no plan in cats"):
        moyu.apply(build("llama", torch.float32), "cats")


def test_types_have_their_short_names():
    assert moyu.load("swiglu", dtype="bf16").model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="no dtype is called 'int3'"):
        moyu.load("swiglu", dtype="int3")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        lambda: torch.empty(10**13),  # what this version of torch says itself
    ],
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def full(**more):
        if isinstance(error, Exception):
            raise error
        with little_memory(1 << 30):
            error()

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("moyu: error: out of memory: use")


def test_a_text_without_bytes_has_no_bits_per_byte():
    model = build("llama", torch.float32)
    windows = Windows(tokens(2, 32), 16)
    found = moyu.evaluate(model, moyu.calibrate(model, "cats", windows, sparsity=0.5), windows, text_bytes=0)
    assert found.bits_per_byte(found.method) is None


def test_a_terminal_without_utf_8_shows_what_it_can(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(cli, "app", lambda **more: print("1 → 2", flush=True))
    cli.main()
    assert raw.getvalue() == b"1 ? 2\n"
