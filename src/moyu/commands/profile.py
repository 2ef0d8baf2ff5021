"""`moyu profile`: what a model activates on a text."""

from __future__ import annotations

from moyu.commands.options import RUNS, BackendName, Boundary, Device, Json, Model, Out, Seed, Text, Window
from moyu.commands.output import check_writable, progress


def profile(
    model: Model = "swiglu",
    text: Text = None,
    out: Out = RUNS / "profile",
    window: Window = 256,
    prompt_tokens: Boundary = 128,
    device: Device = "cpu",
    backend: BackendName = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure which neurons a model needs on a text. `moyu calibrate --profile` calibrates on the same text."""
    from moyu import kernels
    from moyu.calibration.settings import Settings, default_methods
    from moyu.model import machine

    settings = Settings(
        methods=default_methods(prompt_tokens),
        text=text,
        window=window,
        boundary=prompt_tokens,
        seed=seed,
        backend=machine.backend_of(backend),
        device=device,
    )
    settings.check()
    from moyu.calibration.context import Context
    from moyu.commands.rows import profile_record

    check_writable(out)
    with progress() as stage, kernels.use(settings.backend):
        context = Context.open(model, settings, stage)
        found = context.profile()
    found.save(out)
    row = profile_record(context, found)
    if as_json:
        print(row.model_dump_json())
        return
    for layer in found.layers:
        mean, high = float(layer.needed.mean()), float(layer.needed.quantile(0.95))
        zero = f", {layer.exact_zero_share:.0%} exactly zero" if layer.exact_zero_share > 0.001 else ""
        print(
            f"layer {layer.layer:3d}: {mean:.0%} of {layer.neurons} neurons needed for CETT 0.2 (95th percentile {high:.0%}){zero}"
        )
    print(f"profile  {out}")
