"""The trainer of the zoo: tokenizer, token files, and resumable training of small decoders of matched sizes."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import platform
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
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

from moyu.errors import UserError
from moyu.files import atomic_write_bytes, atomic_write_text, key_of, parse_json
from moyu.measure.evaluation import bits_per_byte
from moyu.measure.text import scored_bytes
from moyu.model import loading, zoo
from moyu.model.zoo import corpus
from moyu.research.studies import root_cause
from moyu.research.studies.subject import Subject

DEFINITION = 1  # of a training: one more wherever a resumed one would go on differently
VOCABULARY = 4096
LENGTH = 512
WARM_UP, DECAY = 200, 0.1
EVIDENCE_WINDOWS, SHUFFLED_FILES = 256, 40  # held-out windows scored; held-out files whose words are shuffled
WATCHED = 4  # held-out windows for measurements during training
LOOKS = tuple(4**i for i in range(16))  # steps after which these are made, besides the first and the last
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL = ("<pad>", "<bos>", "<eos>")


@dataclass(frozen=True)
class Size:
    """Widths, depth and training of a size. Gated and plain networks have equal numbers of parameters."""

    layers: int
    width: int
    heads: int
    plain: int  # neurons of a plain network
    gated: int  # of a gated one
    tokens: int
    batch: int  # sequences per step
    file_tokens: int  # the most tokens of the training file
    peak_rate: float


SIZES = {
    # the shipped models: 26 of the corpus' 54 million tokens, which make token files of 52 MB
    "6m": Size(6, 256, 4, 1024, 688, 120_000_000, 64, 26_000_000, 1.5e-3),
    "100m": Size(14, 768, 12, 3072, 2048, 1_000_000_000, 256, 1_000_000_000, 6e-4),
}
SHIPPED = "6m"


def config_of(name: str, size: str = SHIPPED) -> LlamaConfig | OPTConfig:
    """The configuration of a zoo model, or of its larger sibling."""
    own = SIZES[size]
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": own.width, "num_hidden_layers": own.layers, "num_attention_heads": own.heads,
        "max_position_embeddings": LENGTH, "tie_word_embeddings": True, **IDS,
    }  # fmt: skip
    if name == "swiglu":
        return LlamaConfig(**common, intermediate_size=own.gated)
    return OPTConfig(**common, ffn_dim=own.plain, word_embed_proj_dim=own.width, dropout=0.0, activation_function=name)


def build(name: str, seed: int, size: str = SHIPPED) -> PreTrainedModel:
    """A zoo model before training."""
    torch.manual_seed(seed)
    config = config_of(name, size)
    return LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else OPTForCausalLM(config)


def prepare(folder: Path, size: str = SHIPPED) -> dict[str, Any]:
    """Read the corpus, train the tokenizer, write token files and `listing.json` into `folder`. Returns the counts."""
    most = SIZES[size].file_tokens
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
            if split == "train" and len(ids) >= most:
                ids = ids[:most]
                break
        np.asarray(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
        weight = sum(len(d.text.encode()) for d in documents)
        counts[split] = {"documents": len(documents), "bytes": weight, "tokens": len(ids)}
    test = "".join(d.text for d in splits["test"][:SHUFFLED_FILES])
    mixed = tokenizer(corpus.shuffled(test), verbose=False)["input_ids"]
    np.asarray(mixed, dtype=np.uint16).tofile(folder / "shuffled.bin")
    counts["shuffled"] = {"bytes": len(test.encode())}
    digest = hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()[:16]
    atomic_write_text(folder / "listing.json", json.dumps(corpus.listing(splits), indent=0))
    facts = {"splits": counts, "train_sha256": digest, "most": most}
    atomic_write_text(folder / "meta.json", json.dumps(facts, indent=1))  # last: where it is, all is there
    return counts


def prepared(folder: Path, size: str = SHIPPED) -> bool:
    """Whether `prepare` has made the token files of this size there. Raises UserError for those of another size."""
    try:
        most = parse_json((folder / "meta.json").read_bytes()).get("most", SIZES[SHIPPED].file_tokens)
    except OSError:
        return False
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{str(folder / 'meta.json')!r} is damaged", "choose another --data, or delete that file"
        ) from error
    if most != SIZES[size].file_tokens:
        raise UserError(f"the token files in {str(folder)!r} are of another size than {size}", "choose another --data")
    return True


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


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up to `peak`, then a cosine to a tenth."""
    warm = min(WARM_UP, max(1, steps // 10))
    if step < warm:
        return peak * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def watch(model: PreTrainedModel, data: Path) -> list[list[float]]:
    """The series of `studies.root_cause` (SERIES) of every layer, on the first held-out windows: (series, layers).

    Measured on a copy in float32, so that training is not affected.
    """
    twin = copy.deepcopy(model).float().eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    windows = _ids(data / "test.bin")[: WATCHED * LENGTH].view(-1, LENGTH)
    return root_cause.measure(Subject.of(loading.Loaded("in training", twin, tokenizer)), windows).round(6).tolist()


def train(
    name: str,
    data: Path,
    out: Path,
    *,
    size: str = SHIPPED,
    tokens: int | None = None,
    batch: int | None = None,
    device: str | None = None,
    seed: int = 0,
    minutes: float | None = None,
    checkpoint_every: int = 500,
    watched: bool = False,
) -> bool:
    """Train a zoo model on prepared token files. Returns True when finished, False when `minutes` ran out (call again).

    Raises UserError where `out` holds the checkpoint of another training.

    The data order is deterministic: (seed, i) draws the windows of step i, so that a resumed run sees the same text.
    watched: store the results of `watch` before training, after the steps of LOOKS and at the end in training.json.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    own = SIZES[size]
    tokens, batch = tokens or own.tokens, batch or own.batch
    started = time.monotonic()
    model = build(name, seed, size).to(device)  # pyright: ignore[reportArgumentType]

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if device == "cuda" else loss_of
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=own.peak_rate, betas=(0.9, 0.95), fused=device == "cuda")
    data_ids = torch.from_numpy(np.fromfile(data / "train.bin", dtype=np.uint16).astype(np.int32)).to(device)
    steps = max(1, tokens // (batch * LENGTH))
    state_file = out / "checkpoint.pt"
    text = hashlib.sha256((data / "train.bin").read_bytes()).hexdigest()
    key = key_of(
        weights=config_of(name, size).to_dict(), text=text, settings=[steps, batch, seed], definition=DEFINITION
    )
    first, curve, seen = 0, [], []
    out.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = _checkpoint(state_file, key, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve, seen = state["step"], state["curve"], state["seen"]
    offsets = torch.arange(LENGTH, device=device)
    if watched and not seen:
        seen.append([0, watch(model, data)])
    model.train()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, len(data_ids) - LENGTH, (batch, 1), generator=generator).to(device)
        ids = data_ids[starts + offsets].long()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, own.peak_rate)
        loss = step_loss(ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 200) == 0 or step == steps - 1:
            curve.append([step, round(loss.item(), 4)])
            seconds = time.monotonic() - started
            speed = (step - first + 1) * batch * LENGTH / seconds
            print(f"{name}: step {step}/{steps} loss {loss.item():.3f} {speed:,.0f} tokens/s", flush=True)
        if watched and (step + 1 == steps or step + 1 in LOOKS):
            seen.append([step + 1, watch(model, data)])
        over = minutes is not None and time.monotonic() - started > minutes * 60
        if over or (step + 1) % checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            _save(state_file, state | {"step": step + 1, "made_from": key, "curve": curve, "seen": seen})
        if over and step + 1 < steps:
            return False
    facts = {"tokens": steps * batch * LENGTH, "batch": batch, "seed": seed, "loss": curve}
    facts |= {"size": size} if size != SHIPPED else {}
    facts |= {"on_the_way": seen} if watched else {}
    export(name, model.eval(), data, out, facts, size)
    state_file.unlink(missing_ok=True)
    return True


def _checkpoint(path: Path, key: str, device: str) -> dict[str, Any]:
    """Where a training stopped. Raises UserError for one of another network, text, length or seed, and for a damaged file."""
    remedy = "choose another --out, or delete that file"
    try:
        if not zipfile.is_zipfile(path):  # what torch writes is one; it reads older forms too, and warns
            raise ValueError("not what torch writes")
        state = torch.load(path, map_location=device, weights_only=True)
        found = state.get("made_from")
    except Exception as error:  # the reader of a damaged file raises many classes
        raise UserError(f"{str(path)!r} is no checkpoint of a training", remedy) from error
    if found != key:
        raise UserError(f"{str(path)!r} is of a training with another network, text, length, batch or seed", remedy)
    return state


def _save(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint, whole or not there."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write_bytes(path, buffer.getvalue())


def export(
    name: str, model: PreTrainedModel, data: Path, out: Path, facts: dict[str, Any], size: str = SHIPPED
) -> None:
    """Write bf16 safetensors, tokenizer, and training.json with measurements that show that the model is trained."""
    meta = json.loads((data / "meta.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    untrained = build(name, facts["seed"], size).to(model.device).eval()  # pyright: ignore[reportArgumentType]
    bits = evidence(model, untrained, tokenizer, _ids(data / "test.bin"), _ids(data / "shuffled.bin"))
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
    model: PreTrainedModel,
    untrained: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: Tensor,
    shuffled: Tensor,
) -> dict[str, float]:
    """Bits per byte of a trained model on held-out ids, before training, and on shuffled words."""
    return {
        "held_out": measure(model, tokenizer, test),
        "random_initialisation": measure(untrained, tokenizer, test),
        "shuffled_text": measure(model, tokenizer, shuffled),
    }


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, windows: int = EVIDENCE_WINDOWS
) -> float:
    """Bits per byte on the first `windows` windows of ids (n,), over the scored tokens and their bytes.

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
    """Measure a shipped model on this machine's held-out files and write the result into its training.json."""
    loaded, folder = loading.load(name), zoo.path(name)
    documents = corpus.held_out("test")
    texts = [d.text for d in documents]
    test, shuffled = (
        torch.tensor([i for ids in loaded.tokenizer(part, verbose=False)["input_ids"] for i in ids])  # pyright: ignore
        for part in (texts, [corpus.shuffled("".join(texts[:SHUFFLED_FILES]))])
    )
    facts = zoo.describe(name)
    found = evidence(loaded.model, build(name, facts["seed"]).eval(), loaded.tokenizer, test, shuffled)
    facts |= {"bits_per_byte": found, "measured_on": corpus.fingerprint(documents)}
    atomic_write_text(folder / "training.json", json.dumps(facts, indent=1))
    return found
