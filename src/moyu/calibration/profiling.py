"""Profile a dense model's activations on a text: quantiles, norms and needed neurons, in bounded memory."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moyu.engine.applied import Applied
from moyu.errors import UserError
from moyu.files import atomic_write_bytes, parse_json
from moyu.measure.windows import Windows
from moyu.methods import cett, selection
from moyu.methods.values import Rows, Site, Tap
from moyu.model import dissect
from moyu.model.anatomy import Anatomy, Block
from moyu.model.contents import weights_digest

QUANTILES = 101
GRID = 64  # steps of each token's search for the needed neurons
TAU = 0.2  # the CETT up to which the other neurons may be dropped


@dataclass(frozen=True)
class LayerProfile:
    """The profile of one layer."""

    layer: int
    neurons: int
    exact_zero_share: float
    needed: Tensor  # (N,) fraction of neurons that each token needs for CETT <= TAU
    positions: Tensor  # (N,) position of each of these tokens


@dataclass(frozen=True)
class Profile:
    """The windows for calibration, and the dense model's activations on them."""

    windows: Windows
    layers: list[LayerProfile]
    quantiles: Mapping[str, Tensor] = field(default_factory=dict)  # "layer0.mid" -> (101,) quantiles of |x|
    norms: Mapping[str, Tensor] = field(default_factory=dict)  # "layer0.mid" -> (n,) root mean square of each channel
    weights: str = ""  # digest of the model's

    def needed_by_position(self, buckets: int = 8) -> list[tuple[int, float]]:
        """The needed fraction, mean over layers, for `buckets` ranges of positions: (first position, fraction)."""
        length = self.windows.tokens.shape[1]
        edges = torch.linspace(0, length, buckets + 1).long().tolist()
        if not self.layers:  # all networks are routed experts
            return []
        needed = torch.cat([p.needed for p in self.layers])
        positions = torch.cat([p.positions for p in self.layers])
        inside = [(start, (positions >= start) & (positions < stop)) for start, stop in itertools.pairwise(edges)]
        return [(start, float(needed[chosen].mean())) for start, chosen in inside if bool(chosen.any())]

    def save(self, folder: Path) -> Path:
        """Write `profile.json` and `profile.safetensors`, atomically."""
        tensors = {"tokens": self.windows.tokens}
        for layer in self.layers:
            tensors[f"layer{layer.layer}.needed"] = layer.needed
            tensors[f"layer{layer.layer}.positions"] = layer.positions
        tensors |= {f"quantiles/{k}": v for k, v in self.quantiles.items()} | {
            f"norms/{k}": v for k, v in self.norms.items()
        }
        payload = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
        header = {
            "weights": self.weights,
            "prompt": self.windows.prompt,
            "source": dict(self.windows.source),
            "layers": [
                {"layer": p.layer, "neurons": p.neurons, "exact_zero_share": p.exact_zero_share} for p in self.layers
            ],
            "tensors_sha256": hashlib.sha256(payload).hexdigest(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / "profile.safetensors", payload)
        atomic_write_bytes(folder / "profile.json", json.dumps(header, indent=1).encode())
        return folder

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Read a profile. Raises UserError if it is missing or truncated."""
        again = "make it again with `moyu profile`"
        try:
            header = parse_json((folder / "profile.json").read_bytes())
            payload = (folder / "profile.safetensors").read_bytes()
            if hashlib.sha256(payload).hexdigest() != header["tensors_sha256"]:
                raise UserError(f"{folder / 'profile.safetensors'} is truncated or not this profile's", again)
            tensors = safetensors.torch.load(payload)
            layers = [
                LayerProfile(
                    **p, needed=tensors[f"layer{p['layer']}.needed"], positions=tensors[f"layer{p['layer']}.positions"]
                )
                for p in header["layers"]
            ]
            windows = Windows(tensors["tokens"], header["prompt"], header["source"])
        except OSError as error:
            raise UserError(f"no profile in {folder} ({error.strerror})", again) from error
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder / 'profile.json'} is truncated or not a profile", again) from error
        named = {
            kind: {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(kind)}
            for kind in ("quantiles", "norms")
        }
        return cls(windows, layers, **named, weights=str(header.get("weights")))


class _Sketch:
    """An observer with bounded memory: it keeps evenly spaced tokens of each tap."""

    def __init__(self, blocks: Mapping[int, Block], tokens: int) -> None:
        self.blocks, self.tokens = blocks, tokens
        self.quantiles: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.layers: dict[int, LayerProfile] = {}

    def mask(self, site: Site, values: Tensor, mask: Tensor, rows: Rows) -> None: ...

    def see(self, layer: int, expert: int | None, tap: Tap, x: Tensor, rows: Rows) -> None:
        if expert is not None:
            return
        sample = torch.linspace(0, len(x) - 1, min(self.tokens, len(x))).long()
        values = x[sample].float()
        name = f"layer{layer}.{tap}"
        flat = values.abs().flatten()
        flat = selection.ascending(flat[:: max(1, flat.numel() // 2**20)])
        self.quantiles[name] = flat[torch.linspace(0, len(flat) - 1, QUANTILES).long()]
        self.norms[name] = x.float().square().mean(0).sqrt()
        if tap == "mid":
            down = self.blocks[layer].pieces["down"].weight.detach()
            few = values[:: max(1, len(values) // 64)]
            spots = rows.pos[sample][:: max(1, len(values) // 64)]
            zero = float((x == 0).float().mean())
            self.layers[layer] = LayerProfile(layer, x.shape[1], zero, needed(few, down), spots)


def needed(mid: Tensor, down: Tensor, tau: float = TAU) -> Tensor:
    """Fraction of neurons that each token needs: dropping the rest keeps its CETT at or below `tau`. (N, f) -> (N,).

    The search uses the running maximum over a grid of `GRID` counts, because CETT is not monotone.
    """
    norms = down.float().norm(dim=0)
    scores = (mid.float().abs() * norms).sort(dim=1).values  # (N, f)
    at = torch.linspace(0, scores.shape[1] - 1, GRID).long()
    worst = cett.curve(mid, down, scores[:, at]).cummax(1).values  # (N, GRID)
    within = (worst <= tau).sum(1).tolist()
    return torch.tensor([1.0 - (float(at[count - 1] + 1) / scores.shape[1] if count else 0.0) for count in within])


@torch.no_grad()
def profile(
    model: nn.Module,
    windows: Windows,
    *,
    tokens: int = 512,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Run the dense model on at most 8 windows and profile every tap at up to `tokens` positions."""
    anatomy = anatomy or dissect.dissect(model)
    sketch = _Sketch({b.layer: b for b in anatomy.blocks if b.has_ffn}, tokens)
    some = windows.tokens[:8]
    with (
        Applied(model, None, anatomy=anatomy) as applied,
        applied.prompt(some.shape[1]),
        applied.watched(observer=sketch),
    ):
        model(input_ids=some, use_cache=False)
    if progress:
        progress(1, 1)
    layers = [sketch.layers[i] for i in sorted(sketch.layers)]
    return Profile(windows, layers, sketch.quantiles, sketch.norms, weights_digest(model))
