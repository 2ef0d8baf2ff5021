"""Records as `moyu run` makes them: six methods on a small model, and a shape with random weights."""

from __future__ import annotations

from moyu import records

STAMP = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "versions": {"moyu": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
    "device": "AMD EPYC 9355P",
    "threads": 2,
    "dtype": "float32",
    "seed": 0,
    "date": "2026-03-01T10:00:00Z",
}
TEXT = {"corpus": "python", "documents": 154, "bytes": 1_843_221, "sha256": "8c1f2d3e4a5b6c7d", "exact": True}
MODEL = {
    "model": "swiglu",
    "weights": "trained",
    "protocol": {"prompt": 128, "window": 256, "table": "main"},
    "corpus": {**TEXT, "split": "test"},
}
PROMPT = "def read_config(path):\n"
DENSE = [
    '    """',
    "Read",
    " a",
    " configuration",
    " file",
    ".",
    '"""\n',
    "    with",
    " open",
    "(",
    "path",
    ")",
    " as",
    " f",
    ":\n",
]
OTHER = {" a": " the", " configuration": " config", " file": " text", "path": "file", "load": "loads", "f": "f.read()"}
DENSE += ["        return", " json", ".", "load", "(", "f", ")\n"]

# method, family, granularity, realised, bytes, ppl, KL, top-1, random (ppl, KL), oracle (ppl, KL), tokens a second,
# and of the shape (tokens a second, bytes)
METHODS = [
    ("cett", "threshold", "token", 0.497, 0.686, 7.31, 0.021, 0.941, (28.4, 1.38), (7.25, 0.013), 131.0, (29.6, 0.67)),
    ("cats", "threshold", "token", 0.512, 0.779, 7.62, 0.064, 0.902, (19.1, 0.97), (7.27, 0.016), 118.2, (25.1, 0.78)),
    ("teal", "threshold", "token", 0.503, 0.551, 8.96, 0.231, 0.836, (96.0, 2.61), (7.69, 0.073), 97.4, (31.9, 0.56)),
    (
        "griffin",
        "sequence",
        "sequence",
        0.500,
        0.682,
        9.74,
        0.312,
        0.801,
        (29.0, 1.40),
        (7.26, 0.013),
        163.0,
        (33.2, 0.66),
    ),
    ("tda", "sequence", "sequence", 0.500, 0.682, 10.1, 0.348, 0.792, (29.0, 1.40), (7.26, 0.013), 161.9, (33.4, 0.66)),
    (
        "popularity",
        "static",
        "static",
        0.500,
        0.682,
        13.9,
        0.672,
        0.701,
        (29.0, 1.40),
        (7.26, 0.013),
        164.1,
        (33.5, 0.66),
    ),
]
SPARSITY = [0.42, 0.47, 0.49, 0.51, 0.52, 0.53, 0.52, 0.50]


def make(**fields):
    """A record with a fixed stamp."""
    return records.validate({**STAMP, **fields})


def environment(**fields):
    """The record of the machine."""
    command = "moyu run swiglu --sparsity 0.5 --out runs/first"
    return make(**{"kind": "environment", "platform": "Linux x86_64", "cores": 2, "command": command, **fields})


def profile(**fields):
    """Over-activation that grows with depth and falls with position."""
    layers = [
        {
            "layer": i,
            "neurons": 1408,
            "needed_mean": 0.31 + 0.03 * i,
            "needed_p95": 0.48 + 0.035 * i,
            "exact_zero_share": 0.0,
        }
        for i in range(8)
    ]
    curve = [{"position_bucket": 32 * i, "needed_mean": 0.52 - 0.11 * i**0.4} for i in range(8)]
    corpus = {**TEXT, "split": "validation"}
    return make(**{"kind": "profile", **MODEL, "corpus": corpus, "layers": layers, "token_curve": curve, **fields})


def _method(row, **fields):
    name, family, granularity = row[:3]
    plan = name.encode().hex().ljust(12, "0")[:12]
    return {
        "method": name,
        "family": family,
        "granularity": granularity,
        "plan": plan,
        "target_sparsity": 0.5,
        **fields,
    }


def quality(row=METHODS[0], **fields):
    """One method's quality."""
    _, _, _, realized, fraction, ppl, kl, top, random, oracle, _, _ = row
    base = {
        "kind": "quality",
        **MODEL,
        **_method(row),
        "simulated": True,
        "realized_sparsity": realized,
        "byte_fraction": fraction,
        "tokens": 6096,
        "ppl_dense": 7.18,
        "ppl": ppl,
        "bits_per_byte_dense": 0.842,
        "bits_per_byte": 0.842 + kl / 2,
        "kl": kl,
        "top1_agreement": top,
        "ppl_random": random[0],
        "kl_random": random[1],
        "ppl_oracle": oracle[0],
        "kl_oracle": oracle[1],
        "sparsity_by_layer": SPARSITY if row[2] == "token" else [0.5] * 8,
        "floor": 0.45,
    }
    return make(**{**base, **fields})


def speed(row=METHODS[0], shape=False, **fields):
    """One method's speed on the model itself, or on a shape with random weights."""
    fraction = row[11][1] if shape else row[4]
    tok_s, dense, ceiling = (row[11][0], 24.3, 44.6) if shape else (row[10], 172.0, 44.6)
    step = 1.104 if shape else 0.046  # GB that a dense step reads
    base = {
        "kind": "speed",
        **(
            MODEL if not shape else {"model": "llama-3.2-1b (8 of 16 layers)", "weights": "random", "dtype": "bfloat16"}
        ),
        **_method(row),
        "simulated": False,
        "realized_sparsity": row[3],
        "byte_fraction": fraction,
        "context": "llama-3.2-1b" if shape else "model itself",
        "tok_s": tok_s,
        "tok_s_dense": dense,
        "speedup": tok_s / dense,
        "speedup_limit": 1 / fraction,
        "gb_s": tok_s * fraction * step,
        "gb_s_dense": dense * step,
        "read_ceiling_gb_s": ceiling,
        "ceiling_share": tok_s * fraction * step / ceiling,
        "peak_bytes": 2_900_000_000,
        "p20": 0.97 / tok_s,
        "p50": 1 / tok_s,
        "p80": 1.08 / tok_s,
        "backend": "auto: cpu (avx512, 2 threads)",
        "layers": 8,
        "dense_baseline": "transformers eager",
    }
    return make(**{**base, **fields})


def generation(row=METHODS[0], first=None, **fields):
    """Dense and sparse text that part at token `first`."""
    sparse = list(DENSE) if first is None else [*DENSE[:first], *[OTHER.get(t, t) for t in DENSE[first:]]]
    base = {
        "kind": "generation",
        **MODEL,
        **_method(row),
        "simulated": False,
        "prompt": PROMPT,
        "dense_text": "".join(DENSE),
        "sparse_text": "".join(sparse),
        "dense_tokens": DENSE,
        "sparse_tokens": sparse,
        "first_difference": first,
        "new_tokens": len(sparse),
    }
    return make(**{**base, **fields})


def full():
    """All that a run writes, and one of each other kind."""
    kernel = {
        "kind": "kernel",
        "op": "neurons",
        "shape": [2048, 8192],
        "kept": 0.5,
        "gb_s": 40.1,
        "read_ceiling_gb_s": 44.6,
    }
    return [
        environment(),
        profile(),
        *(quality(m) for m in METHODS),
        *(generation(m, first) for m, first in zip(METHODS, (None, 17, 10, 4, 3, 2), strict=True)),
        *(speed(m) for m in METHODS),
        *(speed(m, shape=True) for m in METHODS),
        make(**kernel, share=40.1 / 44.6, backend="cpu", dtype="bfloat16"),
        make(
            kind="study",
            name="over-activation falls with training",
            verdict="HOLDS",
            effect=0.12,
            interval=[0.08, 0.15],
            model="swiglu",
        ),
        make(kind="coverage", architecture="LlamaForCausalLM", taken=True, reason="proved at sparsity 0"),
    ]
