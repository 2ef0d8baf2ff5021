"""MoEfication: split a trained feed-forward network into experts of similar neurons and run the ones that match the token.

Neurons are grouped by balanced k-means on the L2-normalised rows of the matrix that the activation acts on (gate, or up where
there is no gate), or by a balanced partition of the graph of their co-activation. score_e = <x, r_e> / ||r_e||, r_e the mean row
of expert e, or B tanh(A x), trained; the k experts with the largest are computed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from moyu.methods.base import Family, Method
from moyu.methods.fitting import at_count
from moyu.methods.knobs import knob
from moyu.methods.magnitude import column_norms
from moyu.methods.routers import low_rank, train
from moyu.methods.shapes import shape
from moyu.methods.sites import grouped, neuron_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams

ROUNDS = 10  # of k-means
ROWS = 1024  # calibration rows, evenly spaced, that co-activation is looked at on


@dataclass(frozen=True)
class Moefication(Method):
    """MoEfication, arXiv 2110.01786, on a frozen model.

    block: neurons of an expert.
    groups: "weights" or "graph" as in the paper, or "activations": k-means on what neurons add to the output, |a_j| ||w_j||,
    over calibration tokens. That also weighs the graph's edges, so that networks whose activation is no ReLU have one.
    selector: "similarity" to the expert's mean row, or "mlp", trained on the calibration text to say which share of the token's
    largest expert each one adds.
    """

    block: int = knob(16, at_least=1)
    groups: str = knob("weights", one_of=("weights", "graph", "activations"))
    selector: str = knob("similarity", one_of=("similarity", "mlp"))

    name: ClassVar[str] = "moefication"
    paper: ClassVar[str] = "MoEfication, arXiv 2110.01786"
    family: ClassVar[Family] = "router_off_loop"
    matrices: ClassVar[tuple[str, ...]] = ("rows", "inner", "outer")

    def sites(self, block) -> tuple[Site, ...]:
        sites = neuron_sites(block, "mlp_in")
        return tuple(grouped(site, max(1, site.units // self.block)) for site in sites)

    def shapes(self, site: Site, block):
        if self.selector == "mlp":
            return {"inner": shape("units", "n"), "outer": shape("units", "units")}
        return {"rows": shape("units", "n")}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        rows = acts.weights["gate" if "gate" in acts.weights else "up"]  # (f, d)
        if self.groups == "weights":
            points = rows.float()
        else:
            mid = acts.met("mid")
            mid = mid[torch.linspace(0, len(mid) - 1, min(ROWS, len(mid))).long()]
            points = (mid.abs().float() * column_norms(acts.weights, ["down"])).t()  # (f, N)
            points = spectral(points, site.units) if self.groups == "graph" else points
        experts = balanced_clusters(functional.normalize(points, dim=1), site.units)  # (f,)
        if self.selector == "mlp":
            buffers = _mlp(site, acts, experts, learns=target > 0)
        else:
            means = torch.stack([rows[experts == e].mean(0) for e in range(site.units)])
            buffers = {"rows": functional.normalize(means, dim=1).contiguous()}  # (E, d)
        return dataclasses.replace(at_count(site, target, buffers), blocks=experts)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        if self.selector == "mlp":
            inner, outer = (params.buffers[n].to(x.dtype) for n in ("inner", "outer"))
            return (x @ inner.t()).tanh() @ outer.t()  # (N, E)
        return x @ params.buffers["rows"].to(x.dtype).t()  # (N, E)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        return sum(t.nbytes for t in params.buffers.values())


def _mlp(site: Site, acts: Acts, experts: Tensor, *, learns: bool) -> dict[str, Tensor]:
    """A router of as many hidden units as experts, on what each expert adds over what the token's largest one adds."""
    x = acts.met("mlp_in")
    inner, outer = low_rank(x.shape[1], site.units, site.units, seed=site.layer).children()
    mass = acts.met("mid").abs().float() * column_norms(acts.weights, ["down"])  # (N, f)
    mass = mass.new_zeros(len(mass), site.units).index_add_(1, experts, mass)  # (N, E)
    if learns:
        labels = mass / mass.amax(1, keepdim=True).clamp(min=1e-30)
        train(nn.Sequential(inner, nn.Tanh(), outer), x, labels, torch.ones_like(labels))
    return {n: m.weight.detach().to(x) for n, m in (("inner", inner), ("outer", outer))}  # pyright: ignore


def spectral(mass: Tensor, count: int) -> Tensor:
    """Coordinates of a graph's nodes in which its parts are clusters (Ng, Jordan, Weiss 2001): (f, N) -> (f, at most count).

    The edge i - j weighs sum over tokens of mass_i mass_j, and the first eigenvectors of the normalised graph are the first left
    singular vectors of the mass over the square root of the degrees.
    """
    degree = mass @ mass.sum(0)  # (f,)
    u = torch.linalg.svd(mass / degree.clamp(min=1e-30).sqrt()[:, None], full_matrices=False).U
    return u[:, :count]


def balanced_clusters(points: Tensor, count: int) -> Tensor:
    """k-means with clusters of equal size (one more or less where f is no multiple): points (f, n) -> (f,) int64.

    Starts from evenly spaced points; each round is the assignment of points to places that has the largest similarity in all.
    """
    f = len(points)
    places = torch.arange(f) % count  # centre of each place
    centres, labels = points[torch.linspace(0, f - 1, count).long()], None
    for _ in range(ROUNDS):
        similarity = (points @ centres.t()).float().cpu()
        _, chosen = linear_sum_assignment(similarity[:, places].numpy(), maximize=True)
        found = places[torch.from_numpy(chosen)].to(points.device)
        if labels is not None and torch.equal(labels, found):
            break
        labels = found
        centres = functional.normalize(torch.zeros_like(centres).index_add_(0, labels, points), dim=1)
    assert labels is not None
    return labels
