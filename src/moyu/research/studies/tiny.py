"""Small byte-level decoders, trained from scratch and equal in everything but the activation function.

Plain networks (OPT) and gated ones (Llama) with the same number of parameters, at most 0.3 million; one text, and for each
seed one order of batches and one initial draw. Weights start with variance 1 / fan-in, so that the force at initialisation
can be measured: at the usual 0.02 it is some thousand times smaller than the noise of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from moyu.model import zoo
from moyu.model.loading import Loaded
from moyu.research.studies.subject import Subject

PLAIN = ("relu", "relu2", "gelu", "silu")
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
NAMES = (*PLAIN, *GATED)
EXACT = ("relu", "relu2", "reglu")  # those with exact zeros
WIDTH, LAYERS, HEADS, PLAIN_NEURONS, GATED_NEURONS = 64, 3, 4, 256, 171
LENGTH, BATCH, STEPS = 128, 16, 400
RATE, DECAY, WARM_UP = 3e-3, 0.1, 20
TEXT_BYTES = 1_500_000

Labels = Literal["true", "permuted", "uniform"]


@dataclass(frozen=True)
class Arm:
    """One way to train, or not to train."""

    labels: Labels = "true"
    decay: float = DECAY
    freeze: bool = False  # the feed-forward networks stay as they were
    noise: bool = False  # their gradients get random signs
    rate: float = RATE

    @property
    def name(self) -> str:
        """Short and unique."""
        extra = ("-frozen" if self.freeze else "") + ("-noise" if self.noise else "")
        return f"{self.labels}-decay{self.decay:g}-rate{self.rate:g}{extra}"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the three special tokens of the zoo."""
    special = ("<pad>", "<bos>", "<eos>")
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(BPE({s: i for i, s in enumerate(symbols)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    pad, bos, eos = special
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos)


def build(name: str, seed: int) -> PreTrainedModel:
    """A decoder before training: `name` is one of `NAMES`."""
    common = {
        "vocab_size": len(tokenizer()), "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    if name in GATED:
        config = LlamaConfig(**common, intermediate_size=GATED_NEURONS, hidden_act=GATED[name])
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        config = OPTConfig(
            **common, ffn_dim=PLAIN_NEURONS, word_embed_proj_dim=WIDTH, dropout=0.0, activation_function=name
        )
        model = OPTForCausalLM(config)
    initialise(model, seed)
    return model.eval()


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Every matrix from a normal distribution of variance 1 / fan-in; embeddings as the readout they are tied to."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)


def without_final_norm(model: PreTrainedModel) -> PreTrainedModel:
    """Make the decoder's logits affine in the last layer's neurons, as the theorem assumes. In place."""
    if isinstance(model, LlamaForCausalLM):
        model.model.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(model, OPTForCausalLM):
        model.model.decoder.final_layer_norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def subject(name: str, model: PreTrainedModel) -> Subject:
    """A tiny model under study."""
    return Subject.of(Loaded(name, model.eval(), tokenizer()))


@cache
def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes to measure on, as tokens."""
    parts = (zoo.corpus.train_documents(TEXT_BYTES), zoo.corpus.held_out("test", 60_000))
    ids = [
        tokenizer()("\n".join(d.text for d in p), add_special_tokens=False, verbose=False)["input_ids"] for p in parts
    ]
    return torch.tensor(ids[0]), torch.tensor(ids[1])


def probe(count: int = 8) -> Tensor:
    """The windows every measurement is made on: (count, LENGTH), BOS first."""
    held = text()[1][: count * (LENGTH - 1)].view(count, -1)
    return torch.cat([torch.ones(count, 1, dtype=torch.long), held], dim=1)


def relabelled(tokens: Tensor, labels: Labels, seed: int) -> Tensor:
    """The targets: the text, the same targets in random order, or uniform ones."""
    generator = torch.Generator().manual_seed(seed)
    if labels == "permuted":
        return tokens.flatten()[torch.randperm(tokens.numel(), generator=generator)].view(tokens.shape)
    if labels == "uniform":
        return torch.randint(3, len(tokenizer()), tokens.shape, generator=generator)
    return tokens


def train(
    name: str,
    seed: int,
    arm: Arm,
    *,
    steps: int = STEPS,
    watch: Callable[[int, PreTrainedModel], None] = lambda step, model: None,
) -> PreTrainedModel:
    """Train a decoder; `watch(step, model)` is called before step 0, at powers of two, and at the end."""
    model = build(name, seed)
    data = text()[0]
    networks = [p for n, p in model.named_parameters() if p.dim() > 1 and any(k in n for k in ("mlp", "fc1", "fc2"))]
    for parameter in networks:
        parameter.requires_grad_(not arm.freeze)
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() > 1], "weight_decay": arm.decay},
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arm.rate, betas=(0.9, 0.95))
    signs = torch.Generator().manual_seed(seed)
    watch(0, model)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=generator)
        tokens = data[starts + torch.arange(LENGTH)]
        targets = relabelled(tokens, arm.labels, seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = arm.rate * min(1.0, (step + 1) / WARM_UP)
        model.train()
        with torch.enable_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if arm.noise:
            for parameter in networks:
                if parameter.grad is not None:
                    parameter.grad *= torch.randint(0, 2, parameter.shape, generator=signs) * 2 - 1
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.eval()
        if step + 1 == steps or (step + 1) & step == 0:
            watch(step + 1, model)
    return model


def checkpoint(folder: Path | None, name: str, seed: int, steps: int = STEPS) -> Subject:
    """A trained decoder of the usual arm, loaded from `folder` if it has been trained before."""
    place = None if folder is None else folder / f"{name}-seed{seed}-steps{steps}"
    if place is not None and (place / "config.json").exists():
        return Subject.open(str(place))
    model = train(name, seed, Arm(), steps=steps)
    keep(place, model)
    return subject(f"tiny {name}, seed {seed}", model)


def keep(place: Path | None, model: PreTrainedModel) -> None:
    """Save a decoder so that any command can load it."""
    if place is not None:
        logging.disable_progress_bar()
        model.save_pretrained(place)
        tokenizer().save_pretrained(place)
