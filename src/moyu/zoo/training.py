"""The trainer that made the zoo: a tokenizer, token files, and resumable training of a small decoder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moyu import models, zoo
from moyu.evaluation import bits_per_byte
from moyu.files import atomic_write_text
from moyu.text import scored_bytes
from moyu.zoo import corpus

VOCABULARY = 4096
LENGTH = 512
BATCH = 64  # sequences a step
TOKENS = 120_000_000  # what the shipped models saw
TRAIN_FILE_TOKENS = 26_000_000  # of the corpus' 54 million: 52 MB of token files travel to another machine easily
PEAK_RATE, WARM_UP, DECAY = 1.5e-3, 200, 0.1
EVIDENCE_WINDOWS, SHUFFLED_FILES = 256, 40  # held-out windows scored; held-out files whose words are shuffled
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL = ("<pad>", "<bos>", "<eos>")


def config_of(name: str) -> LlamaConfig | OPTConfig:
    """The configuration of a zoo model."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
        "max_position_embeddings": LENGTH, "tie_word_embeddings": True, **IDS,
    }  # fmt: skip
    if name == "swiglu":
        return LlamaConfig(**common, intermediate_size=688)
    return OPTConfig(**common, ffn_dim=1024, word_embed_proj_dim=256, dropout=0.0, activation_function=name)


def build(name: str, seed: int) -> PreTrainedModel:
    """A zoo model before training."""
    torch.manual_seed(seed)
    config = config_of(name)
    return LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else OPTForCausalLM(config)


def prepare(folder: Path) -> dict[str, Any]:
    """Read the corpus, train the tokenizer, write token files and `listing.json` into `folder`; returns the counts."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = corpus.collect()
    tokenizer = train_tokenizer(d.text for d in splits["train"][:4000])
    tokenizer.save_pretrained(folder / "tokenizer")
    counts: dict[str, Any] = {}
    for split, documents in splits.items():
        ids: list[int] = []
        for start in range(0, len(documents), 256):
            for encoding in tokenizer([d.text for d in documents[start : start + 256]], verbose=False)["input_ids"]:  # pyright: ignore
                ids += encoding  # every document begins with <bos>
            if split == "train" and len(ids) >= TRAIN_FILE_TOKENS:
                ids = ids[:TRAIN_FILE_TOKENS]
                break
        np.asarray(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
        size = sum(len(d.text.encode()) for d in documents)
        counts[split] = {"documents": len(documents), "bytes": size, "tokens": len(ids)}
    test = "".join(d.text for d in splits["test"][:SHUFFLED_FILES])
    mixed = tokenizer(corpus.shuffled(test), verbose=False)["input_ids"]
    np.asarray(mixed, dtype=np.uint16).tofile(folder / "shuffled.bin")
    counts["shuffled"] = {"bytes": len(test.encode())}
    digest = hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()[:16]
    (folder / "listing.json").write_text(json.dumps(corpus.listing(splits), indent=0))
    (folder / "meta.json").write_text(json.dumps({"splits": counts, "train_sha256": digest}, indent=1))
    return counts


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens that puts <bos> first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet)  # pyright: ignore
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", IDS["bos_token_id"])]
    )
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=LENGTH
    )


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then a cosine to a tenth."""
    warm = min(WARM_UP, max(1, steps // 10))
    if step < warm:
        return PEAK_RATE * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return PEAK_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def train(
    name: str,
    data: Path,
    out: Path,
    *,
    tokens: int = TOKENS,
    batch: int = BATCH,
    device: str | None = None,
    seed: int = 0,
    minutes: float | None = None,
    checkpoint_every: int = 500,
) -> bool:
    """Train a zoo model on prepared token files; True when finished, False when `minutes` ran out (call to go on).

    Deterministic in the data order: step i sees the windows that (seed, i) draws, so a resumed run sees the same text.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    model = build(name, seed).to(device)  # pyright: ignore[reportArgumentType]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=device == "cuda")
    data_ids = torch.from_numpy(np.fromfile(data / "train.bin", dtype=np.uint16).astype(np.int32)).to(device)
    steps = max(1, tokens // (batch * LENGTH))
    state_file = out / "checkpoint.pt"
    first, curve = 0, []
    out.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        if state["steps"] == steps:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, curve = state["step"], state["curve"]
    offsets = torch.arange(LENGTH, device=device)
    model.train()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, len(data_ids) - LENGTH, (batch, 1), generator=generator).to(device)
        ids = data_ids[starts + offsets].long()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 200) == 0 or step == steps - 1:
            curve.append([step, round(loss.item(), 4)])
            seconds = time.monotonic() - started
            speed = (step - first + 1) * batch * LENGTH / seconds
            print(f"{name}: step {step}/{steps} loss {loss.item():.3f} {speed:,.0f} tokens/s", flush=True)
        over = minutes is not None and time.monotonic() - started > minutes * 60
        if over or (step + 1) % checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            _save(state_file, state | {"step": step + 1, "steps": steps, "curve": curve})
        if over and step + 1 < steps:
            return False
    facts = {"tokens": steps * batch * LENGTH, "batch": batch, "seed": seed, "loss": curve}
    export(name, model.eval(), data, out, facts)
    state_file.unlink(missing_ok=True)
    return True


def _save(path: Path, state: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(state, file)
    os.replace(file.name, path)


def export(name: str, model: PreTrainedModel, data: Path, out: Path, facts: dict[str, Any]) -> None:
    """Write bf16 safetensors, tokenizer and training.json with the evidence that the model is trained."""
    meta = json.loads((data / "meta.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    bits = evidence(name, model, facts["seed"], tokenizer, _ids(data / "test.bin"), _ids(data / "shuffled.bin"))
    model.to(torch.bfloat16).save_pretrained(out)  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(
        json.dumps(
            {
                "name": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                **facts,
                "length": LENGTH,
                "corpus": meta,
                "bits_per_byte": bits,
                "versions": {
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                },
            },
            indent=1,
        )
    )


def _ids(file: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(file, dtype=np.uint16).astype(np.int64))


def evidence(
    name: str, model: PreTrainedModel, seed: int, tokenizer: PreTrainedTokenizerBase, test: Tensor, shuffled: Tensor
) -> dict[str, float]:
    """Bits a byte of a trained model on held-out ids, beside what it was before training and on shuffled words."""
    untrained = build(name, seed).to(model.device).eval()  # pyright: ignore[reportArgumentType]
    return {
        "held_out": measure(model, tokenizer, test),
        "random_initialisation": measure(untrained, tokenizer, test),
        "shuffled_text": measure(model, tokenizer, shuffled),
    }


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, windows: int = EVIDENCE_WINDOWS
) -> float:
    """Bits a byte on the first `windows` windows of ids (n,), over the scored tokens and their bytes.

    A document's <bos> has no bytes and is not scored.
    """
    nats, size = 0.0, 0
    for part in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:windows].split(16):
        logits = model(input_ids=part.to(model.device), use_cache=False).logits[:, :-1].float().cpu()
        nats += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), ignore_index=IDS["bos_token_id"], reduction="sum"
            )
        )
        size += scored_bytes(tokenizer, part, 0)
    return bits_per_byte(nats, size)


def measure_shipped(name: str) -> dict[str, Any]:
    """Measure a shipped model on the held-out files of this machine, and write what was found into its training.json."""
    loaded, folder = models.load(name), zoo.path(name)
    documents = corpus.held_out("test")
    texts = [d.text for d in documents]
    test, shuffled = (
        torch.tensor([i for ids in loaded.tokenizer(part, verbose=False)["input_ids"] for i in ids])  # pyright: ignore
        for part in (texts, [corpus.shuffled("".join(texts[:SHUFFLED_FILES]))])
    )
    facts = zoo.describe(name)
    found = evidence(name, loaded.model, facts["seed"], loaded.tokenizer, test, shuffled)
    facts |= {"bits_per_byte": found, "measured_on": corpus.fingerprint(documents)}
    atomic_write_text(folder / "training.json", json.dumps(facts, indent=1))
    return found
