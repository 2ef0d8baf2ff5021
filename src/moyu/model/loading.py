"""Load a model and its tokenizer: a zoo name, a local folder, a GGUF file or a hub id; or a random model of a known shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from moyu.errors import UserError, check_one_of, line_of, panics_are_errors
from moyu.model import zoo
from moyu.model.dissect import DEPTHS, setting
from moyu.model.finite import require_finite
from moyu.model.gguf import loading as gguf
from moyu.model.machine import device_of
from moyu.model.named import check_name, gguf_file
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.weights import Stored, mapped, named

PLAN_FOLDER = "moyu-plan"  # of a saved checkpoint
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # what else people write


def dtype_of(name: str) -> torch.dtype:
    """The type of this name. Raises UserError that gives the legal ones."""
    known = SHORT.get(name, name)
    if known not in DTYPES:
        raise UserError(f"no dtype is called {name!r}", f"it is one of auto, {', '.join(DTYPES)}")
    return DTYPES[known]


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference, its tokenizer, and what to call it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str | None = None
    embedded: bool = False  # from the zoo
    plan: Path | None = None  # the folder of the plan that a saved checkpoint carries; it is not applied


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    device: str = "cpu",
    finite: bool = True,
) -> Loaded:
    """Load a causal LM for inference, onto `device`.

    name: a zoo name (`moyu zoo`), a local folder, a GGUF file, or a hub id. Raises UserError if there is no such model.
    finite: refuse weights that are NaN or infinite, by the name of the tensor (UserError).
    dtype: the type to compute in, "float32", "bfloat16", "float16" or "auto", which is float32 for the small embedded models
    and for quantised GGUF files, else the checkpoint's own. Quantised weights of a GGUF file stay as they are.
    """
    name = str(name)
    embedded = name in zoo.names()
    if isinstance(dtype, str) and dtype != "auto":
        dtype = dtype_of(dtype)
    elif dtype == "auto" and embedded:
        dtype = torch.float32
    logging.disable_progress_bar()
    if (file := gguf_file(name)) is not None:
        model, tokenizer = gguf.load(file, dtype if isinstance(dtype, torch.dtype) else None)
        if finite:
            require_finite(model, repr(name))
        return Loaded(name, model.to(device_of(device)), tokenizer)  # pyright: ignore[reportArgumentType]
    source = str(zoo.path(name)) if embedded else name
    check_name(name)
    try:
        asked: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        with panics_are_errors():
            tokenizer = AutoTokenizer.from_pretrained(source, **asked)
        config = AutoConfig.from_pretrained(source, **asked)
        _check_depth(config, Path(source))
        plan = None
        if carries_plan(config):  # its weights are plain ones: commands apply the plan where they need it
            plan = plan_folder(source, revision)
            del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        made: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **asked
        )
        model, info = made
    except (MemoryError, UserError):
        raise
    except Exception as error:  # readers of damaged files raise many classes, tokenizers the bare one
        raise UserError(
            f"cannot load {name!r}: {line_of(error)}",
            "check the folder or the hub id, and that this machine reaches the hub",
        ) from error
    if missing := info["missing_keys"]:
        raise UserError(
            f"{name!r} has no weights for {min(missing)!r} ({len(missing)} tensors are missing)",
            "they would be random numbers: download or save the model again",
        )
    if finite and not embedded:
        require_finite(model, repr(name))
    return Loaded(name, model.eval().to(device_of(device)), tokenizer, revision, embedded, plan)  # pyright: ignore


def _check_depth(config: Any, folder: Path) -> None:
    """Refuse a configuration of more layers than its weights are tensors, which would be built one by one before they are missed."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        return
    tensors = 0
    for file in files:
        with safe_open(file, "pt") as held:
            tensors += len(held.keys())
    for part in (config, config.get_text_config(decoder=True)):
        for name in DEPTHS:
            depth = setting(part, name)
            if isinstance(depth, int) and depth > tensors:
                raise UserError(
                    f"{str(folder / 'config.json')!r} says {name} {depth:.4g}, and its weights are {tensors} tensors",
                    "they do not belong together: download or save the model again",
                )


def carries_plan(config: Any) -> bool:
    """Whether a configuration is of a checkpoint that was saved with its plan (`MoyuConfig`)."""
    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and found.get("quant_method") == "moyu"


def plan_folder(source: str, revision: str | None = None) -> Path:
    """The folder of the plan inside a saved checkpoint; from the hub it is downloaded."""
    if Path(source).is_dir():
        return Path(source) / PLAN_FOLDER
    return Path(snapshot_download(source, revision=revision, allow_patterns=[f"{PLAN_FOLDER}/*"])) / PLAN_FOLDER


@torch.no_grad()
def quantise_model(model: PreTrainedModel, kind: str) -> None:
    """Quantise every linear and the token embedding in place. Weights go one at a time, so no second copy is held.

    kind: of `weights.QUANTISED`. A tied head shares the embedding's weight.
    """
    done: dict[Tensor, Stored] = {}  # by parameter, so that a tied one is quantised once
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear and not (child is table and type(child) is nn.Embedding):
                continue
            weight = child.weight
            blocks = done.get(weight) or named(kind).store(weight)
            done[weight] = blocks
            new = QuantisedLinear(blocks, child.bias, weight.dtype) if isinstance(child, nn.Linear) else None
            setattr(parent, name, (new or QuantisedEmbedding(blocks, weight.dtype)).eval())
            mapped.let_go(weight.data)
            if not getattr(model.config, "tie_word_embeddings", False):
                del done[weight]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, QuantisedLinear) and isinstance(embedding, QuantisedEmbedding) and len(done):
        head.tie(embedding)


@dataclass(frozen=True)
class Shape:
    """Widths of a published model, for random weights: they measure speed, never quality."""

    config: Any
    layers: int


def _llama(**widths: Any) -> LlamaConfig:
    return LlamaConfig(**widths, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)


SHAPES = {
    "llama-3.2-1b": lambda: _llama(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    ),
    "llama-3.2-3b": lambda: _llama(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, tie_word_embeddings=True,
    ),
    "llama-3-8b": lambda: _llama(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    ),
    "qwen2.5-0.5b": lambda: Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "tiny": lambda: _llama(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=True,
    ),
}  # fmt: skip


def random_model(
    shape: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cpu",
) -> PreTrainedModel:
    """A random-weight model with the widths of `shape`; `layers` cuts its depth. Raises UserError for an unknown shape."""
    check_one_of("shape is", shape, SHAPES)
    config = SHAPES[shape]()
    if layers is not None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    kind = Qwen2ForCausalLM if isinstance(config, Qwen2Config) else LlamaForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = kind(config).to(dtype)  # pyright: ignore
    model = model.to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    # Each tensor reads one table of normal numbers from its own offset, because drawing billions takes minutes.
    noise = (torch.randn(2**22, generator=generator) * 0.02).to(device, dtype)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            parameter.data.fill_(1.0)
            continue
        flat = parameter.data.view(-1)
        rolled = noise.roll(index * 7919)
        for start in range(0, flat.numel(), noise.numel()):
            part = flat[start : start + noise.numel()]
            part.copy_(rolled[: part.numel()])
    model.tie_weights()
    # to_empty() leaves the rotary buffers unset. They follow from the configuration alone.
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            with torch.device(device):
                module.__init__(config)  # pyright: ignore
    return model.eval()
