"""`moyu serve` under load: `make load N=1000`. On SmolLM2 where `make real` has fetched it, else on an embedded model.

Mixed requests, some streamed, some whose client leaves, some that must be refused, with prompts of up to 2,000 tokens, half of them
below 50: every greedy text has to be that of a single request, nobody may wait for ever, and memory has to stay.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import torch

from moyu.engine.applied import Applied
from moyu.engine.generate import generate
from moyu.model import loading
from moyu.model.prompts import context_of

N, SEED = int(os.environ.get("LOAD_N", "0")), int(os.environ.get("LOAD_SEED", "1"))
MODELS = Path(os.environ.get("MOYU_MODELS") or Path.home() / ".cache" / "moyu" / "models")
REAL = MODELS / "SmolLM2-135M-Instruct-Q4_1.gguf"
MODEL = os.environ.get("LOAD_MODEL") or (str(REAL) if REAL.exists() else "swiglu")
NAME = Path(MODEL).stem if MODEL.endswith(".gguf") else MODEL
CLIENTS, TEXTS, LONGEST, NEW = 24, 48, 2000, 64
BOOK = Path(__file__).read_text() * 3
pytestmark = pytest.mark.skipif(not N, reason="`make load` runs it")


@pytest.fixture(scope="module")
def jobs():
    """(prompt ids, new tokens, text of a single request)."""
    loaded, draw = loading.load(MODEL), random.Random(SEED)
    ids = loaded.tokenizer(BOOK)["input_ids"]
    longest = min(LONGEST, (context_of(loaded.model) or LONGEST) - NEW)
    found = []
    with Applied(loaded.model, None) as session:
        for _ in range(TEXTS):
            length, new = (int(math.exp(draw.uniform(0, math.log(top)))) for top in (longest, NEW))
            start = draw.randrange(len(ids) - length)
            prompt = ids[start : start + length]
            fresh = [int(t) for t in generate(session, torch.tensor([prompt]), max_new_tokens=new, do_sample=False)]
            found.append((prompt, new, loaded.tokenizer.decode(fresh, skip_special_tokens=True)))
    return found


@contextmanager
def served(*options):
    """`moyu serve` as a process of its own: (process, url). It must end without a traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moyu.commands.cli", "serve", MODEL, "--port", str(port), *options]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            httpx.get(f"{url}/health")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    yield process, url
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    print(said)
    assert process.returncode == 0 and "Traceback" not in said


@pytest.fixture(scope="module")
def server():
    with served("--queue", "256") as found:
        yield found


def memory(process) -> int:
    """MB that a process holds."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) // 1024


def metric(url: str, name: str) -> float:
    """A value of /metrics."""
    line = next(line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name + " "))
    return float(line.split()[1])


async def ask(client, draw, jobs, gaps) -> str:
    """One request: what became of it."""
    prompt, new, text = draw.choice(jobs)
    asked = {"model": NAME, "prompt": prompt, "max_tokens": new, "temperature": 0}
    kind = draw.choices(["whole", "streamed", "leaves", "bad", "sampled"], [30, 30, 15, 15, 10])[0]
    if kind == "bad":
        bad = draw.choice(
            [{"max_tokens": 10**9}, {"prompt": []}, {"model": "none"}, {"temperature": -1}, {"seed": "x"}]
        )
        try:
            await client.completions.create(**{**asked, **bad})
        except openai.APIStatusError as error:
            return "refused" if 400 <= error.status_code < 500 else "WRONG"
        return "WRONG"
    if kind == "sampled":
        several = await client.completions.create(**{**asked, "temperature": 1, "n": 2, "seed": 3})
        return "sampled" if len(several.choices) == 2 else "WRONG"
    if kind == "whole":
        got = await client.completions.create(**asked)
        return kind if got.choices[0].text == text else "WRONG"
    got, last = "", None
    async with await client.completions.create(**asked, stream=True) as parts:
        after = draw.randrange(new + 1) if kind == "leaves" else -1
        async for part in parts:
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last, after = now, after - 1
            got += part.choices[0].text
            if after == 0:
                return kind
    return kind if kind == "leaves" or got == text else "WRONG"


@pytest.mark.timeout(0)
def test_mixed_requests(server, jobs):
    process, url = server
    told, gaps, held = Counter(), [], []
    start = time.perf_counter()

    async def client_of(number: int, left: list[int]) -> None:
        own = random.Random(SEED * 1000 + number)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            while left:
                left.pop()
                try:
                    told[await ask(client, own, jobs, gaps)] += 1
                except openai.APITimeoutError:
                    told["STUCK"] += 1
                if len(left) % max(1, N // 10) == 0:
                    held.append(memory(process))

    async def all_of_them() -> None:
        left = list(range(N))
        await asyncio.gather(*(client_of(n, left) for n in range(CLIENTS)))

    asyncio.run(all_of_them())
    gaps.sort()
    print(f"\n{MODEL}: {N} requests of {CLIENTS} clients in {time.perf_counter() - start:.0f} s: {dict(told)}")
    print(
        f"between tokens: median {statistics.median(gaps) * 1e3:.0f} ms, p99 {gaps[int(len(gaps) * 0.99)] * 1e3:.0f} ms, "
        f"most {gaps[-1] * 1e3:.0f} ms; the server held {held} MB"
    )
    end = time.monotonic() + 10
    while metric(url, "moyu_active_sequences") + metric(url, "moyu_waiting_requests") and time.monotonic() < end:
        time.sleep(0.05)
    assert metric(url, "moyu_active_sequences") == metric(url, "moyu_waiting_requests") == 0
    assert told["WRONG"] == told["STUCK"] == 0 and told.total() == N


@pytest.mark.timeout(0)
def test_throughput(server):
    """Tokens a second, all clients together: prompts of 32 tokens, 64 new ones each, twice as many requests as clients."""
    _, url = server
    prompt = list(range(100, 132))

    async def measure(clients: int) -> float:
        async with httpx.AsyncClient(timeout=300) as client:
            body = {"prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}

            async def one() -> None:
                for _ in range(2):
                    assert (await client.post(f"{url}/v1/completions", json=body)).status_code == 200

            start = time.perf_counter()
            await asyncio.gather(*(one() for _ in range(clients)))
            return 2 * clients * 64 / (time.perf_counter() - start)

    for clients in (1, 4, 8, 16):
        print(f"{MODEL}: {clients} concurrent requests: {asyncio.run(measure(clients)):.1f} tokens/s")


@pytest.mark.timeout(0)
def test_whatever_a_fuzzer_sends_is_answered():
    """schemathesis makes requests of the OpenAPI document, valid and not: no 5xx, and answers are what it documents."""
    if "SCHEMATHESIS" not in os.environ:
        pytest.skip("`make load` installs schemathesis")
    with served("--new-tokens", "8") as (_, url):
        words = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{url}/openapi.json",
            "--max-examples",
            str(max(10, N // 10)),
        ]
        checks = "not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance"
        words += ["--checks", checks, "--request-timeout", "60", "--workers", "2"]
        env = {**os.environ, "PYTHONPATH": f"{os.environ['SCHEMATHESIS']}:{os.environ.get('PYTHONPATH', '')}"}
        found = subprocess.run(words, env=env, text=True, capture_output=True, cwd=os.environ["SCHEMATHESIS"])
        print(found.stdout[-2000:])
        assert found.returncode == 0
