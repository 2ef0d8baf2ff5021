"""Pretrained models as `scripts/real.py` fetches them. A test of a model that is not there is skipped."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moyu
from moyu.model import zoo


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real", Path(__file__).parents[2] / "scripts" / "real.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["real"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def files() -> dict[str, Path]:
    """All models by a short name."""
    return {model.file.split("-Q4")[0]: SCRIPT.place(model) for model in SCRIPT.ALL}


@dataclass
class Real:
    """A model by MOYU, the same with transformers' own loader, which dequantises it to float32, and tokens of Python code."""

    name: str
    path: Path
    loaded: Any
    reference: Any
    ids: Tensor  # (4, 256)


@pytest.fixture(scope="module", params=files())
def real(request) -> Real:
    """One model after the other."""
    path = files()[request.param]
    if not path.exists():
        pytest.skip(f"{path} is not there: make real{' REAL=all' if path == SCRIPT.place(SCRIPT.QWEN) else ''}")
    loaded = moyu.load(str(path))
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    code = "\n".join(document.text for document in zoo.corpus.held_out("test", max_bytes=20000))
    ids = loaded.tokenizer(code, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return Real(request.param, path, loaded, reference, ids[:, :1024].view(4, 256))
