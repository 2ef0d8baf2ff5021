"""A plan: everything a method decided for one model, as JSON and safetensors."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic_core
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moyu import methods
from moyu.errors import UserError, first_problem
from moyu.files import atomic_write_bytes
from moyu.methods.base import Method
from moyu.methods.expected import check_rule, check_site
from moyu.methods.heads import KvPolicy
from moyu.methods.selection import Threshold, TopK
from moyu.methods.shapes import check_values
from moyu.methods.values import Site, SiteParams
from moyu.model.anatomy import Anatomy, Block, Piece
from moyu.model.quantised import weight_format

FORMATS = (1, 2)  # 2: sites may have knobs of their own
SAMPLES = 4096  # weights of each planned tensor that the digest looks at
AGAIN = "make it again with `moyu calibrate`"


@dataclass(frozen=True)
class Plan:
    """Sites with their parameters, and what they were made for."""

    method: Method
    parts: Mapping[str, tuple[Site, SiteParams]]
    model: Mapping[str, Any]  # name, revision, fingerprint, digests
    target_sparsity: float | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)  # corpus, windows, prompt, bos, template
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Method] = field(default_factory=dict)  # of sites that have knobs of their own, by key

    @property
    def kv_policy(self) -> KvPolicy:
        """What becomes of the keys and values of skipped heads."""
        return self.method.kv_policy

    @property
    def compensation(self) -> str:
        """What gives back a part of what is skipped: "centre", "bias", "learned bias", two of them, or ""."""
        kinds = ["centre"] if any(p.centre is not None for _, p in self.parts.values()) else []
        if any(p.bias is not None for _, p in self.parts.values()):
            kinds.append("learned bias" if "learned_bias" in self.calibration else "bias")
        return " + ".join(kinds)

    def method_of(self, site: Site) -> Method:
        """The method that decides at a site, with the knobs that it has there."""
        return self.settings.get(site.key, self.method).at(site)

    def own_knobs(self, key: str) -> dict[str, Any]:
        """The knobs of a site that are not those of the plan's method."""
        common = self.method.knobs()
        return {k: v for k, v in self.settings.get(key, self.method).knobs().items() if v != common[k]}

    @property
    def site_knobs(self) -> dict[str, int]:
        """How many sites have which knobs of their own, as "name=value, ..."."""
        own = (self.own_knobs(key) for key in self.settings)
        return dict(collections.Counter(", ".join(f"{k}={v}" for k, v in knobs.items()) for knobs in own))

    def sites(self) -> Iterator[Site]:
        """Every site of the plan."""
        return (site for site, _ in self.parts.values())

    def parts_of(self, layer: int, expert: int | None) -> list[tuple[Site, SiteParams]]:
        """The sites of one block."""
        return [p for p in self.parts.values() if (p[0].layer, p[0].expert) in ((layer, expert), (layer, None))]

    def check(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Refuse a model this plan was not made for, a fine-tune of it included (UserError)."""
        found = fingerprint(model)
        if found != self.model["fingerprint"]:
            raise UserError(
                f"this plan was made for {self.model['name']!r}, whose configuration differs from {type(model).__name__}'s",
                "calibrate this model: `moyu calibrate MODEL`",
            )
        kept, own = self.model.get("weight_format"), weight_format(model)
        if kept != own:
            raise UserError(
                f"this plan was made for weights in {kept or 'numbers'} of {self.model['name']!r}, these are in {own or 'numbers'}",
                f"open the model with `--weights {kept}`"
                if kept
                else "a quantised model needs its own plan: `moyu calibrate MODEL --weights`",
            )
        fresh = digests(anatomy, self.sites())
        changed = [name for name, value in self.model["digests"].items() if fresh.get(name) != value]
        if changed:
            raise UserError(
                f"this plan was made for other weights of {self.model['name']!r} ({len(changed)} of "
                f"{len(self.model['digests'])} planned tensors differ, first {changed[0]})",
                "a fine-tuned or cast model needs its own plan: `moyu calibrate MODEL`",
            )
        self.check_sites(anatomy)

    def check_sites(self, anatomy: Anatomy) -> None:
        """Refuse sites that the method does not have on this model, and tensors of other shapes than it reads there."""
        blocks = {(b.layer, b.expert): b for b in anatomy.places()}
        governed: set[tuple[int, int | None, str]] = set()
        legal: dict[tuple[Block, Method], dict[str, Site]] = {}
        for key, (site, params) in self.parts.items():
            block, own = blocks.get((site.layer, site.expert)), {(site.layer, site.expert, n) for n in site.linears}
            try:
                if block is None or not set(site.linears) <= block.pieces.keys():
                    raise ValueError("the model has no such weights")
                if governed & own:
                    raise ValueError("another site skips the same weights")
                method = self.method_of(site)
                if (block, method) not in legal:
                    legal[block, method] = {s.key: s for s in method.sites(block)}
                check_rule(site, params)
                check_site(method, legal[block, method].get(key), site, params, block)
            except ValueError as error:
                raise UserError(f"this plan does not fit {self.model['name']!r} at {key}: {error}", AGAIN) from error
            governed |= own

    @property
    def hash(self) -> str:
        """Names the experiment in every record: 12 hex digits over all of the plan."""
        header, tensors = self._split()
        digest = hashlib.sha256(json.dumps({**header, "versions": None}, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(
                name.encode() + tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()[:12]

    def save(self, folder: str | Path) -> Path:
        """Write `plan.json` and `plan.safetensors` into a folder, each atomically, the JSON last."""
        folder = Path(folder)
        header, tensors = self._split()
        payload = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
        header["tensors_sha256"] = hashlib.sha256(payload).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / "plan.safetensors", payload)
        atomic_write_bytes(folder / "plan.json", json.dumps(header, indent=1).encode())
        return folder

    def _split(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        parts = []
        for key, (site, params) in self.parts.items():
            fields = dataclasses.asdict(site)
            if not site.further:  # as plans were before there were such sites, which have the hash that they had
                del fields["further"]
            entry: dict[str, Any] = {"site": fields}
            if own := self.own_knobs(key):
                entry["knobs"] = own
            match params.rule:
                case Threshold(value):
                    entry["rule"] = {"threshold": "-inf" if value == -math.inf else value}
                case TopK(k):
                    entry["rule"] = {"top_k": k}
            tensors |= {f"{key}/{name}": tensor for name, tensor in params.tensors().items()}
            parts.append(entry)
        header = {
            "format": FORMATS[bool(self.settings)],
            "method": self.method.name,
            "knobs": self.method.knobs(),
            "model": dict(self.model),
            "target_sparsity": self.target_sparsity,
            "calibration": dict(self.calibration),
            "seed": self.seed,
            "versions": dict(self.versions),
            "kv_policy": self.kv_policy,
            "parts": parts,
        }
        return header, tensors

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read a plan; UserError for one that is missing, damaged or of another format.

        Whether it fits a model is `check`'s to say, which every applied plan goes through.
        """
        file = Path(folder) / "plan.json"
        try:
            written, payload = file.read_bytes(), (file.parent / "plan.safetensors").read_bytes()
        except OSError as error:
            raise UserError(f"no plan in {folder} ({error.strerror})", AGAIN) from error
        try:
            given: Any = pydantic_core.from_json(written)
            number = given.get("format") if isinstance(given, dict) else None
            if isinstance(number, int) and number not in FORMATS:
                known = " and ".join(map(str, FORMATS))
                raise UserError(f"{folder} has plan format {number}, this MOYU reads {known}", AGAIN)
            header = _Header.model_validate_json(written)
            if hashlib.sha256(payload).hexdigest() != header.tensors_sha256:
                raise UserError(f"{file.with_suffix('.safetensors')} is truncated or not this plan's", AGAIN)
            return header.plan(given, safetensors.torch.load(payload))
        except UserError:
            raise
        except ValidationError as error:
            raise UserError(f"{file} is truncated or not a plan ({first_problem(error)})", AGAIN) from error
        except (ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
            raise UserError(f"{file} is truncated or not a plan ({error})", AGAIN) from error


# --------------------------------------------------------------------------------------------------------- the file

Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Open(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Rule(_Strict):
    threshold: float | Literal["-inf"] | None = None
    top_k: Count | None = None


class _Part(_Strict):
    site: Site
    rule: _Rule
    knobs: dict[str, Any] = {}

    def params(self, tensors: Mapping[str, Tensor]) -> SiteParams:
        """Of the site; ValueError for sizes and a rule that none can have, and for tensors that hold what is not finite."""
        site, threshold, k = self.site, self.rule.threshold, self.rule.top_k
        if not (0 < site.units < 2**31 and 0 <= site.unit_bytes < 2**53 and 0 <= site.layer < 2**31 and site.linears):
            raise ValueError(f"{site.key} has {site.units} units of {site.unit_bytes} bytes")
        if (threshold is None) == (k is None):
            raise ValueError(f"{site.key} has no rule, or two")
        params = SiteParams.of(Threshold(float(threshold or 0)) if k is None else TopK(k), tensors)
        check_rule(site, params)
        for name, tensor in params.tensors().items():
            check_values(f"{site.key}/{name}", tensor)
        return params


class _KvBytes(_Strict):
    context: Count
    bytes: Count


class _Calibration(_Open):
    source: dict[str, Any] = {}
    dense_layers: list[int] = []
    kv_bytes: list[_KvBytes] = []


class _Model(_Open):
    name: str
    fingerprint: str
    digests: dict[str, str]
    revision: str | None = None
    weight_format: str | None = None


class _Header(_Strict):
    """What `plan.json` holds."""

    format: int
    method: str
    knobs: dict[str, Any]
    model: _Model
    target_sparsity: Annotated[float, Field(ge=0, le=1)] | None
    calibration: _Calibration
    seed: int
    versions: dict[str, str]
    kv_policy: str
    parts: list[_Part]
    tensors_sha256: str

    def plan(self, given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
        """The plan of this header, which was `given` as plain values, and of its tensors."""
        parts: dict[str, tuple[Site, SiteParams]] = {}
        settings: dict[str, Method] = {}
        left = dict(tensors)
        for part in self.parts:
            site = part.site
            if site.key in parts:
                raise ValueError(f"{site.key} comes twice")
            own = {k: left.pop(k) for k in tensors if k.startswith(f"{site.key}/")}
            parts[site.key] = (site, part.params({k.removeprefix(f"{site.key}/"): v for k, v in own.items()}))
            if part.knobs:
                settings[site.key] = methods.method(self.method, **{**self.knobs, **part.knobs})
        if left:
            raise ValueError(f"the tensor {next(iter(left))!r} is of no site")
        return Plan(
            method=methods.method(self.method, **self.knobs),
            parts=parts,
            settings=settings,
            **{k: given[k] for k in ("model", "target_sparsity", "calibration", "seed", "versions")},
        )


def fingerprint(model: nn.Module) -> str:
    """A hash of the configuration that shapes the model: type, widths, depth, activation, vocabulary."""
    ignored = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "_attn_implementation",
               "quantization_config", "distributed_config")  # fmt: skip  # how weights are stored: the digests tell
    config = {k: v for k, v in model.config.to_dict().items() if k not in ignored}  # pyright: ignore
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digests(anatomy: Anatomy, sites: Iterator[Site]) -> dict[str, str]:
    """A digest of sampled weights of each planned tensor; the same for a copy in bfloat16 and in float32 of its values."""
    blocks: dict[tuple[int, int | None], Block] = {(b.layer, b.expert): b for b in anatomy.places()}
    out = {}
    for site in sites:
        block = blocks.get((site.layer, site.expert))
        if block is None:
            continue
        for name in site.linears:
            key = f"layer{site.layer}" + ("" if site.expert is None else f".expert{site.expert}") + f".{name}"
            if key not in out and name in block.pieces:
                out[key] = _digest(block.pieces[name])
    return out


def _digest(piece: Piece) -> str:
    rows, columns = piece.shape
    index = torch.linspace(0, rows * columns - 1, min(SAMPLES, rows * columns), dtype=torch.float64).long()
    row, column, blocks = index // columns, index % columns, piece.blocks
    if blocks is None:
        weight = piece.weight.detach()
        sample = (weight.full_tensor() if isinstance(weight, DTensor) else weight)[row, column]
    else:
        sample = blocks.at(row.to(blocks.device), column.to(blocks.device))
    sample = sample.to("cpu", torch.bfloat16)
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
