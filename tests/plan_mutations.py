"""Plans that are not what a method made: other tensors, other rules, other sites."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moyu import UserError
from moyu.methods.selection import Threshold, TopK
from moyu.methods.values import Site, SiteParams
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan


def with_part(plan: Plan, key: str, site: Site, params: SiteParams) -> Plan:
    """The plan with another site in the place of one."""
    return dataclasses.replace(plan, parts={k: (site, params) if k == key else v for k, v in plan.parts.items()})


def with_tensor(plan: Plan, key: str, name: str, tensor: Tensor | None) -> Plan:
    """The plan with another tensor of a site, or without it."""
    site, params = plan.parts[key]
    tensors = {n: t for n, t in params.tensors().items() if n != name} | ({} if tensor is None else {name: tensor})
    return with_part(plan, key, site, SiteParams.of(params.rule, tensors))


def other_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Tensors of another shape, of another type, and with values that are no numbers."""
    yield tensor[: len(tensor) // 2] if len(tensor) > 1 else torch.cat([tensor, tensor])
    yield tensor[..., None]
    yield torch.zeros(1, 100_000, dtype=tensor.dtype)
    if tensor.is_floating_point():
        for value in (math.nan, math.inf):
            wrong = tensor.clone()
            wrong.view(-1)[-1] = value
            yield wrong
        yield tensor.to(torch.int32)
    else:
        yield tensor.float()
    if tensor.dtype == torch.int64:  # units of neurons
        yield tensor - 1
        yield tensor + 1


def wrong_parts(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The plan with one thing changed, and what was; of sites that differ in their layer alone, one is changed."""
    kinds = {(s.reads, s.skips, s.linears, s.expert is None): key for key, (s, _) in plan.parts.items()}
    for key in kinds.values():
        site, params = plan.parts[key]
        for rule in (Threshold(math.nan), Threshold(math.inf), TopK(10**9), TopK(-1)):
            yield f"{key} {rule}", with_part(plan, key, site, dataclasses.replace(params, rule=rule))
        for change in (
            {"units": site.units + 1},
            {"units": 10**9},
            {"layer": 99},
            {"expert": 99},
            {"reads_layer": 99},
            {"linears": (*site.linears[:1], "o", "down")},
            {"reads": "heads" if site.reads != "heads" else "mid"},
        ):
            yield f"{key} {change}", with_part(plan, key, dataclasses.replace(site, **change), params)
        for name, tensor in params.tensors().items():
            for other in other_tensors(tensor):
                yield f"{key} {name} {other.dtype} {tuple(other.shape)}", with_tensor(plan, key, name, other)
            if name not in ("outer", "inner", "bias", "centre", "basis"):  # parts that a site may lack
                yield f"{key} without {name}", with_tensor(plan, key, name, None)
        yield f"{key} with more", with_tensor(plan, key, "buffer.more", torch.ones(1))


def taken(plan: Plan, anatomy: Anatomy) -> list[str]:
    """What was changed in the plans of `wrong_parts` that are not refused in one line."""
    found = []
    for what, wrong in wrong_parts(plan):
        try:
            wrong.check_sites(anatomy)
            found.append(what)
        except UserError as error:
            found += [] if "does not fit" in str(error) and "\n" not in str(error) else [f"{what}: {error}"]
    return found
