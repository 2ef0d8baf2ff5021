"""Compiled steps on a GPU, captured as graphs, against general ones: the tests of tests/test_compiled.py run without a compiler.

PYTHONPATH=src python tests/kernels/gpu_steps_checks.py
"""

import sys
import tempfile
from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from kernel_cases import one_candidate

import gguf_files
from moyu import methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.generate import generate, join, new_cache, read, step
from moyu.kernels.gpu import blocks, many, planes, single
from moyu.measure.windows import Windows
from moyu.model import loading
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import read as read_file
from moyu.model.quantised import QuantisedLinear
from tiny import build, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = (None, "teal", "was", "cats", "countdown", "griffin", "static-norm")
TOLERANCE = 1e-4  # float32; decisions on the edge of a threshold are not met, for the prompts are not the calibration's
STEPS = 5


def fresh(*shape, seed):
    return (61 + tokens(*shape, seed=seed, vocabulary=66)).to(DEVICE)


@torch.no_grad()
def logits(applied, prompts):
    cache = new_cache(applied)
    for row in prompts:
        own = new_cache(applied)
        read(applied, own, row[None])
        join(cache, own)
    given = fresh(STEPS, len(prompts), seed=7)
    return torch.stack([step(applied, cache, given[t]) for t in range(STEPS)])


def compare(model, plan, what, edges=False):
    """edges: levels round x differently on a CPU, and an input on the edge of a threshold may go the other way."""
    for batch in (1, 3):
        prompts = [fresh(5 + 2 * n, seed=n) for n in range(batch)]
        with Applied(model, plan) as applied:
            compiled = logits(applied, prompts)
            trace = applied.traces.summary()
            settings = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
            text = torch.stack(list(generate(applied, prompts, **settings)))
            applied.native = None
            general = logits(applied, prompts)
            other = torch.stack(list(generate(applied, prompts, **settings)))
        error = float((compiled - general).abs().max() / general.abs().max())
        print(f"{what} of {batch}: {trace}, {error:.1e} apart", file=sys.stderr, flush=True)
        assert trace == ("compiled" if DEVICE == "cuda" else "native")
        assert error <= (0.1 if edges else TOLERANCE), what
        assert edges or torch.equal(text, other), what


def check_families():
    for name in METHODS:
        model, plan = build("sharp", torch.float32).to(DEVICE), None
        if name is not None:
            windows = Windows(tokens(6, 40, vocabulary=64).to(DEVICE), 20)
            plan = calibrate(model, methods.method(name), windows, sparsity=0.5, name="tiny")
        compare(model, plan, name or "dense")


def check_weights_in_blocks():
    for kind in ("q8_0", "q4_0"):
        model = build("llama", torch.float32).to(DEVICE)
        loading.quantise_model(model, kind)
        compare(model, None, kind)


def tiled():
    """A tiny model whose linears have whole tiles of 64 outputs."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, max_position_embeddings=128)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def check_levels_and_shortlists():
    for kind, name in (("q8_0", "levels"), ("q8_0", "shortlist")):
        model = tiled().to(DEVICE)
        loading.quantise_model(model, kind)
        windows = Windows(tokens(6, 40, vocabulary=64).to(DEVICE), 20)
        plan = calibrate(model, methods.method(name), windows, sparsity=0.5, name="tiny")
        compare(model, plan, f"{name} of {kind}", edges=True)


def check_a_file():
    """A GGUF file: weights reach the device packed, and steps read them there."""
    with tempfile.TemporaryDirectory() as folder:
        plain, path = build("llama", torch.float32), Path(folder) / "tiny.gguf"
        tensors = {}
        for name, weight in plain.named_parameters():
            value = gguf_files.as_stored(plain, name)
            packed = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0) if weight.dim() == 2 else value
            content = packed.tobytes() if weight.dim() == 2 else gguf_files.stored(value, "F32")
            tensors[gguf_files.name_of(name)] = ("Q8_0" if weight.dim() == 2 else "F32", tuple(weight.shape), content)
        path.write_bytes(gguf_files.file_of(gguf_files.metadata_of(plain), tensors))
        model = load_model(read_file(path)).to(DEVICE)
    linears = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    assert len(linears) == 7 * model.config.num_hidden_layers + 1 and all(
        m.blocks.device.type == DEVICE for m in linears
    )
    assert not any(p.dim() > 1 for p in model.parameters())
    compare(model, None, "a file")


def main() -> None:
    """Every check, by name, or those that are named."""
    one_candidate(blocks, many, planes, single)
    for name, check in list(globals().items()):
        if name.startswith("check_") and (not sys.argv[1:] or name in sys.argv[1:]):
            check()
            print(name, flush=True)


if __name__ == "__main__":
    main()
