"""One process of a model with tensor parallelism: `python -m torch.distributed.run parallel_worker.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

import moyu
from moyu.measure.windows import Windows
from moyu.model import dissect
from moyu.plan import Plan
from tiny import tokens


def main(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(tp_plan="auto"))
    anatomy = dissect.dissect(model)
    found: dict = {"pieces": [sorted(b.pieces) for b in anatomy.blocks], "spread": [b.spread for b in anatomy.blocks]}
    for path in sorted((folder / "plans").iterdir()):
        plan = Plan.load(path)
        try:
            with moyu.apply(model, plan, engine="mask") as applied:
                out = model.generate(tokens(2, 8), max_new_tokens=8, do_sample=False, pad_token_id=0)
                with torch.no_grad(), applied.prompt(8):
                    found[path.name] = out, model(out).logits
        except moyu.UserError as error:
            found[path.name] = str(error)
    for name, act in {"skip": lambda: moyu.apply(model, plan), "calibrate": lambda: calibrated(model)}.items():
        try:
            act()
        except moyu.UserError as error:
            found[name] = str(error)
    with torch.no_grad():
        found["dense"] = model(tokens(2, 16)).logits
    torch.save(found, folder / f"found{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


def calibrated(model) -> Plan:
    return moyu.calibrate(model, moyu.method("teal"), Windows(tokens(2, 32), 16), sparsity=0.5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
