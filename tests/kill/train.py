"""`moyu zoo train` of a model of two small layers on a text of a few functions: python train.py OUT."""

import sys
from pathlib import Path

import torch

from moyu.model.zoo import corpus
from moyu.model.zoo.corpus import Document
from moyu.research import training

torch.set_num_threads(1)
out = Path(sys.argv[1])
documents = [Document(f"stdlib/f{i}.py", f"def function_{i}(x):\n    return x * {i}\n\n" * 8) for i in range(60)]
corpus.collect = lambda: {"train": documents[:40], "validation": documents[40:50], "test": documents[50:]}
training.LENGTH, whole = 32, training.config_of


def small(name, size=training.SHIPPED):
    config = whole(name, size)
    config.num_hidden_layers, config.hidden_size, config.word_embed_proj_dim = 2, 64, 64
    return config


training.config_of = small
if not training.prepared(out / "data"):
    training.prepare(out / "data")
training.train("relu", out / "data", out / "model", tokens=40 * 2 * 32, batch=2, device="cpu", checkpoint_every=3)
