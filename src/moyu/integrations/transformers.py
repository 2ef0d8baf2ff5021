"""A plan through transformers' own loading: `from_pretrained(path, quantization_config=MoyuConfig(plan=...))`.

Importing `MoyuConfig` from `moyu` registers it. The plan is applied when the weights are loaded; a checkpoint that is saved carries
it in the folder `moyu-plan`, says in its model card what was measured of it, names it in config.json, and is sparse again when it is
loaded by a process that imported `MoyuConfig`.
Weights stay as they are: for a model that another quantiser has loaded, apply the plan afterwards with `moyu.apply`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any, get_args

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moyu import methods, records
from moyu.engine.applied import Applied
from moyu.engine.session import Engine
from moyu.errors import UserError
from moyu.files import atomic_write_text
from moyu.kernels import BackendName
from moyu.model import dissect
from moyu.model.loading import PLAN_FOLDER as FOLDER
from moyu.model.loading import plan_folder
from moyu.plan import Plan
from moyu.records import Quality


class MoyuConfig(QuantizationConfigMixin):
    """What to apply to a model that is being loaded.

    plan: a plan's folder; for a saved checkpoint, its folder inside the checkpoint.
    method: instead of a plan, a method that needs no calibration, as `griffin`, `clada` and `relu-zero`; others raise UserError.
    sparsity: of `method`, in [0, 1).
    backend: "auto", "cpu", "gpu" or "reference". engine: "skip", or "mask" to simulate.
    """

    def __init__(
        self,
        plan: str | Path | None = None,
        method: str | None = None,
        sparsity: float = 0.5,
        backend: BackendName = "auto",
        engine: Engine = "skip",
        quant_method: str = "moyu",
        **knobs: Any,
    ) -> None:
        """Raises UserError where neither or both of plan and method are given, and for unknown engines, methods and knobs."""
        if (plan is None) == (method is None):
            raise UserError("say what to apply", "give MoyuConfig a plan or a method, not both")
        if engine not in get_args(Engine):
            raise UserError(
                f"engine must be one of {', '.join(get_args(Engine))}, not {engine!r}", "`skip` is the default"
            )
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self.plan = None if plan is None else str(plan)
        self.method, self.sparsity, self.backend, self.engine = method, sparsity, backend, engine
        self.knobs = knobs.pop("knobs", {}) | knobs
        if method is not None and methods.method(method, **self.knobs).needs_calibration:
            raise UserError(
                f"method {method!r} needs text to calibrate on",
                f"make a plan, `moyu calibrate MODEL --method {method} --out FOLDER`, and give MoyuConfig(plan=FOLDER)",
            )


class MoyuQuantizer(HfQuantizer):
    """Applies a MoyuConfig once the weights are there."""

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        """As transformers calls it; `pre_quantized` says that the weights come from a saved checkpoint."""
        super().__init__(quantization_config, **kwargs)
        self.asked: Any = quantization_config

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model.eval()
        plan = self._plan(model)
        applied = Applied(model, plan, backend=self.asked.backend, engine=self.asked.engine)
        object.__setattr__(model, "moyu_applied", applied)
        object.__setattr__(
            model, "moyu_measured", [] if self.asked.plan is None else measured(self._folder(model), plan)
        )
        object.__setattr__(model, "save_pretrained", MethodType(_save, model))
        return model

    def _plan(self, model: Any) -> Plan:
        if self.asked.method is not None:
            return _plan_without_text(model, self.asked)
        return Plan.load(self._folder(model))

    def _folder(self, model: Any) -> Path:
        """Where the plan is: as given, or inside the checkpoint."""
        given, source = Path(self.asked.plan), str(getattr(model, "name_or_path", "") or "")
        if given.exists() or not source:
            return given
        if self.asked.plan == FOLDER:
            return plan_folder(source, getattr(model.config, "_commit_hash", None))
        inside = Path(source) / given
        return inside if inside.exists() else given

    def is_serializable(self, **kwargs: Any) -> bool:
        """The weights are plain ones, and `_save` brings the plan."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Applied models decode; restore the model to train it."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Decode steps fall back to what torch.compile can trace."""
        return True


register_quantization_config("moyu")(MoyuConfig)
register_quantizer("moyu")(MoyuQuantizer)


def _plan_without_text(model: Any, asked: MoyuConfig) -> Plan:
    """A plan of a method that looks at weights and activations of the step alone."""
    import torch

    from moyu.calibration.walk import calibrate
    from moyu.measure.windows import Windows

    vocabulary = int(model.get_input_embeddings().num_embeddings)
    tokens = torch.randint(0, vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))  # seen, and not looked at
    name = getattr(model, "name_or_path", "") or type(model).__name__
    method = methods.method(asked.method or "", **asked.knobs)
    return calibrate(
        model, method, Windows(tokens, 1), sparsity=asked.sparsity, name=name, anatomy=dissect.dissect(model)
    )


def _save(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Stands for save_pretrained: the checkpoint as transformers writes it, the plan, and a model card."""
    applied: Applied = vars(self)["moyu_applied"]
    config: Any = self.config.quantization_config
    plan, folder, rows = applied.plan, Path(save_directory), vars(self)["moyu_measured"]
    assert plan is not None
    before = (config.plan, config.method)
    written = (folder / "README.md").exists()

    def beside() -> None:
        """Write the plan and the card, before anything is uploaded."""
        plan.save(folder / FOLDER)
        if rows:
            records.write(folder / FOLDER / records.FILE, rows)
        if not written:
            atomic_write_text(folder / "README.md", card(plan, rows))

    def uploaded(*told: Any, **more: Any) -> Any:
        beside()
        return type(self)._upload_modified_files(self, *told, **more)

    applied.restore()  # weights as the checkpoint has them
    try:
        config.plan, config.method = FOLDER, None
        object.__setattr__(self, "_upload_modified_files", uploaded)
        result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
        beside()
    finally:
        del vars(self)["_upload_modified_files"]
        config.plan, config.method = before
        again = Applied(self, plan, backend=config.backend, engine=config.engine)
        object.__setattr__(self, "moyu_applied", again)
    return result


def measured(folder: Path, plan: Plan) -> list[Quality]:
    """The quality of a plan as it was measured, where `moyu calibrate` or `moyu run` put it: beside the plan."""
    file = folder / records.FILE
    rows = records.read(file) if file.exists() else []
    return [r for r in rows if isinstance(r, Quality) and r.plan == plan.hash and r.status is None]


def _quality(rows: Sequence[Quality]) -> str:
    from moyu.reporting import columns  # brings templates and charts, which loading a model does not need

    if not rows:
        return "Quality was not measured: `moyu eval THIS FOLDER` does it."
    lines = [
        "Measured on held-out text, every scored position sparse, simulated by masking:",
        "",
        "| prompt, window | tokens | units skipped | bytes read | perplexity dense | sparse | KL, nats a token | same top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        protocol = f"{r.protocol.prompt}, {r.protocol.window}" if r.protocol else columns.NONE
        cells = (
            protocol, str(r.tokens), columns.tenths(r.realized_sparsity), columns.fixed(r.byte_fraction),
            columns.number(r.ppl_dense), columns.number(r.ppl), columns.number(r.kl), columns.tenths(r.top1_agreement),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    text = ", ".join(f"{k} {v}" for k, v in (rows[0].corpus or {}).items())
    return "\n".join([*lines, "", f"Text: {text}. Commit {rows[0].commit}, {rows[0].date}."])


def card(plan: Plan, rows: Sequence[Quality] = ()) -> str:
    """A model card: what is skipped, what the plan was made from, what was measured, and how to load it."""
    sites = sorted({f"{s.reads} -> {s.skips} of {', '.join(s.linears)}" for s in plan.sites()})
    facts = {
        "method": f"{plan.method.name} ({plan.method.paper})",
        "target sparsity": plan.target_sparsity,
        "knobs": json.dumps(plan.method.knobs()),
        **({"sites with their own": json.dumps(plan.site_knobs)} if plan.settings else {}),
        "sites": "; ".join(sites),
        "calibrated on": json.dumps(dict(plan.calibration)),
        "plan": plan.hash,
    }
    lines = "\n".join(f"| {k} | {v} |" for k, v in facts.items())
    name = str(plan.model["name"])
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    base = f"\nbase_model: {name}" if on_hub else ""  # a path of this machine is nothing to others
    return f"""---
tags: [moyu, dynamic-activation]{base}
---

# {name if on_hub else Path(name).name}, with dynamic activation by {plan.method.name}

The weights are those of the base model. Decode steps skip what the plan in `{FOLDER}` says; without MOYU this is the dense model.

```python
from moyu import MoyuConfig  # registers the loader
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

| | |
|---|---|
{lines}

{_quality(rows)} Speed on a machine: `moyu bench THIS FOLDER`. Tasks of lm-eval: `moyu eval THIS FOLDER --tasks NAME`.
`lm_eval --model hf` refuses this folder ("Unknown quantization type, got moyu"): it knows no types but those of transformers.
"""
