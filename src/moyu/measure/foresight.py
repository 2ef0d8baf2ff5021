"""How well a method predicts, on unseen text, which neurons matter before they are computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moyu.engine.applied import Applied
from moyu.errors import UserError
from moyu.measure.windows import Windows
from moyu.methods.heads import head_norms
from moyu.methods.routers import Grade, grade
from moyu.methods.selection import TopK, select
from moyu.methods.values import Rows, Site, SiteParams, Tap
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan


@torch.no_grad()
def foresight(
    model: nn.Module, plan: Plan, windows: Windows, *, batch: int = 8, anatomy: Anatomy | None = None
) -> dict[int, Grade]:
    """Grade a plan's scores by layer: recall, AUROC and captured mass |a_j| ||w_j|| on the sparse positions of `windows`.

    The plan must select whole neurons, groups of neurons or heads at every token (routers, proxies); UserError for others. The
    mass of a head is the norm of its contribution to the output. A layer with neurons and heads gets the mean of both grades.
    The model runs under the plan, so that each layer is graded on the inputs it would get.
    """
    judged = [part for part in plan.parts.values() if part[0].skips in ("neurons", "heads")]
    if plan.method.granularity != "token" or not judged:
        raise UserError(
            f"method {plan.method.name!r} predicts no neurons", "grade a method that does, such as 'deja-vu'"
        )
    anatomy = anatomy or dissect.dissect(model)
    observer = _Grader(plan, anatomy)
    with Applied(model, plan, engine="mask", anatomy=anatomy) as applied, applied.watched(observer=observer):
        for tokens in windows.tokens.split(batch):
            observer.inputs.clear()
            with applied.prompt(windows.prompt):
                model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    return {layer: _mean(grades) for layer, grades in sorted(observer.grades.items())}


def _mean(grades: list[tuple[int, Grade]]) -> Grade:
    """The mean grade, weighted by rows."""
    rows = sum(count for count, _ in grades)
    fields = ("recall", "auroc", "captured", "ideal")
    return Grade(**{f: sum(count * getattr(g, f) for count, g in grades) / rows for f in fields})


class _Grader:
    """An observer that grades each layer once its neurons are computed."""

    def __init__(self, plan: Plan, anatomy: Anatomy) -> None:
        self.plan = plan
        self.blocks = {(b.layer, b.expert): b for b in anatomy.all_blocks()}
        self.inputs: dict[tuple[int, int | None, Tap], Tensor] = {}
        self.grades: dict[int, list[tuple[int, Grade]]] = {}

    def see(self, layer: int, expert: int | None, tap: Tap, x: Tensor, rows: Rows) -> None:
        if tap in ("mlp_in", "attn_in"):
            self.inputs[layer, expert, tap] = x
        chosen = (rows.sparse & rows.valid).nonzero().squeeze(1)
        shown = {"mid": "neurons", "heads": "heads"}.get(tap)
        if shown and len(chosen):
            for site, params in self.plan.parts.values():
                if (site.layer, site.expert, site.skips) == (layer, expert, shown):
                    own = self._grade(site, params, x[chosen], chosen, rows)
                    self.grades.setdefault(layer, []).append((len(chosen), own))

    def mask(self, site: Site, values: Tensor, mask: Tensor, rows: Rows) -> None: ...

    def _grade(self, site: Site, params: SiteParams, held: Tensor, chosen: Tensor, rows: Rows) -> Grade:
        inputs = self.inputs[site.source_layer, site.expert, site.reads][chosen]
        scores = self.plan.method_of(site).score(inputs, rows.take(chosen), site, params, {})  # (N, units)
        pieces = self.blocks[site.layer, site.expert].pieces
        if site.skips == "heads":
            mass = head_norms(held, pieces["o"].weight, site.units)
        else:
            mass = held.abs().float() * pieces["down"].weight.detach().float().norm(dim=0)
        if params.blocks is not None:
            mass = mass.new_zeros(len(mass), site.units).index_add_(1, params.blocks, mass)
        rule = params.rule
        kept = rule.k if isinstance(rule, TopK) else round(float(select(scores, rule).sum(1).float().mean()))
        return grade(scores, mass, max(1, kept))
