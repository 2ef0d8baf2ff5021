"""A server of the tests: uvicorn in a thread, on an embedded model under a plan."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import torch
import uvicorn

import moyu
from moyu import methods
from moyu.engine.applied import Applied
from moyu.integrations.server.app import build
from moyu.integrations.server.engine import Engine
from moyu.integrations.server.jobs import Limits, Model
from moyu.integrations.server.metrics import Metrics
from moyu.measure.windows import Windows
from moyu.model import loading

TEMPLATE = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}# assistant\n{% endif %}"
WORDS = (
    "import os\ndef read(path, mode):\n    with open(path) as file:\n        return [line.split() for line in file]\n"
)


def embedded(name: str = "swiglu", method: str | None = "teal"):
    """An embedded model with a chat template, and a plan for it."""
    loaded = loading.load(name)
    loaded.tokenizer.chat_template = TEMPLATE
    if method is None:
        return loaded, None
    ids = loaded.tokenizer(WORDS * 4, return_tensors="pt")["input_ids"]
    windows = Windows(ids[:, : ids.shape[1] // 2 * 2].reshape(2, -1)[:, :32].contiguous(), 16)
    return loaded, moyu.calibrate(loaded.model, methods.method(method), windows, sparsity=0.4, name=name)


class Running:
    """A server that runs: where, and its engine."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url, self.engine = url, engine

    def waits_for(self, condition, seconds: float = 10.0) -> None:
        """Until it is so; fails after some seconds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    @property
    def idle(self) -> bool:
        """Whether nothing is written, read or queued."""
        return self.engine.active == 0 and not self.engine._waiting


@contextmanager
def running(loaded, plan, *, sequences=16, queue=64, key=None, hosts=None, **limits):
    """Serve on a free port until the end of the block."""
    asked = {"context": 256, "new_tokens": 256, "sequences": sequences} | limits
    threads = torch.get_num_threads()
    with Applied(loaded.model, plan) as session:
        engine = Engine(session, Metrics(), sequences=sequences, queue=queue)
        app = build(Model(loaded, loaded.name, plan is not None), engine, Limits(**asked), key=key, hosts=hosts)
        config = uvicorn.Config(app, port=0, http="h11", ws="none", log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield Running(f"http://127.0.0.1:{port}", engine)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
    torch.set_num_threads(threads)
