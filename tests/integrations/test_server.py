"""`moyu serve` as its clients see it: the official openai client, raw HTTP, and a process that is told to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
import torch

from integrations.serving import WORDS, embedded, running
from moyu.commands import cli
from moyu.engine.applied import Applied
from moyu.engine.generate import generate
from moyu.integrations.server import engine
from moyu.model import loading

PROMPTS = [WORDS[:n] for n in (3, 9, 17, 30, 44, 60, 81, 100, 5, 12, 25, 90)]


@pytest.fixture(scope="module")
def model():
    """The embedded model, and a plan for it."""
    return embedded()


@pytest.fixture(scope="module")
def plain():
    """Another embedded model, dense: for tests that start servers of their own."""
    return embedded("relu", None)


@pytest.fixture(scope="module")
def alone(model):
    """The greedy text of each prompt, from `moyu.generate` of that prompt alone; under the plan and dense."""
    loaded, plan = model

    def text(prompt, new, dense=False):
        ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with Applied(loaded.model, None if dense else plan) as session:
            fresh = [int(t) for t in generate(session, ids, max_new_tokens=new, do_sample=False)]
        return loaded.tokenizer.decode(fresh, skip_special_tokens=True)

    return {(n, dense): text(prompt, 8 + 3 * n, dense) for n, prompt in enumerate(PROMPTS) for dense in (False, True)}


@pytest.fixture(scope="module")
def server(model, alone):
    with running(*model) as found:
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def post(server, path="/v1/completions", **body):
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def test_every_text_is_that_of_a_single_request_whoever_stands_beside_it(server, client, alone):
    """Streamed or not, dense or under the plan, of any length, beside requests that leave and requests that are refused."""

    def ask(job):
        n, kind, stream = job
        asked = {"model": "swiglu:dense" if kind == "dense" else "swiglu", "prompt": PROMPTS[n], "temperature": 0}
        asked["max_tokens"] = 8 + 3 * n
        if kind == "bad":
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**asked, extra_body={"logit_bias": {"5": 1}})
            return True
        if kind == "leaves":
            with client.completions.create(**asked, stream=True) as parts:
                return next(iter(parts)) is not None
        if not stream:
            text = client.completions.create(**asked).choices[0].text
        else:
            text = "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True))
        return text == alone[n, kind == "dense"]

    jobs = [(n, kind, stream) for n in range(12) for kind in ("plan", "dense") for stream in (False, True)]
    jobs += [(n, kind, False) for n in (3, 7, 11) for kind in ("bad", "leaves")]
    order = torch.randperm(len(jobs), generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, [jobs[i] for i in order]))
    server.waits_for(lambda: server.idle)


def test_a_chat_is_its_template_continued(server, client, model):
    loaded, _ = model
    said = [{"role": "user", "content": [{"type": "text", "text": "reads "}, {"type": "text", "text": "a file"}]}]
    chat = client.chat.completions.create(
        model="swiglu", messages=said, max_tokens=9, temperature=0, logprobs=True, top_logprobs=3
    )
    prompt = loaded.tokenizer("# user\nreads a file\n# assistant\n")["input_ids"]
    text = client.completions.create(model="swiglu", prompt=prompt, max_tokens=9, temperature=0, logprobs=3)
    choice = chat.choices[0]
    assert choice.message.content == text.choices[0].text and choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert chat.usage.prompt_tokens == len(prompt) and chat.usage.completion_tokens == 9
    entries = choice.logprobs.content
    assert [e.token for e in entries] == text.choices[0].logprobs.tokens and len(entries) == 9
    assert all(e.logprob == e.top_logprobs[0].logprob <= 0 and len(e.top_logprobs) == 3 for e in entries)
    stream = client.chat.completions.create(
        model="swiglu", messages=said, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = list(stream)
    assert "".join(p.choices[0].delta.content for p in parts) == choice.message.content
    assert parts[-1].choices[0].finish_reason == "length" and last.usage.total_tokens == len(prompt) + 9


def test_logprobs_are_the_models(server, client):
    loaded = loading.load("swiglu")
    ids = loaded.tokenizer(WORDS, return_tensors="pt")["input_ids"]
    got = (
        client.completions.create(
            model="swiglu:dense", prompt=ids[0].tolist(), max_tokens=1, temperature=0.7, seed=1, logprobs=5
        )
        .choices[0]
        .logprobs
    )
    with torch.no_grad():
        wanted = loaded.model(input_ids=ids).logits[0, -1].log_softmax(-1).topk(5).values
    assert list(got.top_logprobs[0].values()) == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_seed_repeats_and_several_answers_differ(server, client):
    asked = {"model": "swiglu", "prompt": "def ", "max_tokens": 12, "temperature": 1.2, "top_p": 0.95, "n": 3}
    first, again = (client.completions.create(**asked, seed=7).choices for _ in range(2))
    assert [c.text for c in first] == [c.text for c in again] and [c.index for c in first] == [0, 1, 2]
    assert len({c.text for c in first}) > 1
    assert [c.text for c in client.completions.create(**asked, seed=8).choices] != [c.text for c in first]
    streamed = ["", "", ""]
    for part in client.completions.create(**asked, seed=7, stream=True):
        streamed[part.choices[0].index] += part.choices[0].text
    assert streamed == [c.text for c in first]


def test_several_prompts_are_answered_in_their_order(server, client, alone):
    got = client.completions.create(model="swiglu", prompt=PROMPTS[:3], max_tokens=8, temperature=0)
    assert got.choices[0].text == alone[0, False] and len(got.choices) == 3
    assert all(alone[n, False].startswith(c.text) for n, c in enumerate(got.choices))


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_its_stop_sequence(server, client, alone, stream):
    whole = alone[11, False]
    for stop in (whole[5:9], whole[11:12], whole[-3:]):
        asked = {"model": "swiglu", "prompt": PROMPTS[11], "max_tokens": 41, "temperature": 0, "stop": ["never", stop]}
        if stream:
            parts = [c.choices[0] for c in client.completions.create(**asked, stream=True)]
            text, finish = "".join(p.text for p in parts), parts[-1].finish_reason
        else:
            choice = client.completions.create(**asked).choices[0]
            text, finish = choice.text, choice.finish_reason
        assert text == whole[: whole.index(stop)] and finish == "stop"


NEST = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
BAD = [
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 10**9}, "context of 256: set max_tokens to 254"),
    ({"prompt": "word " * 600}, "send a shorter one"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1 << 20]}, "is none of the 4096"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "\ud800"}, "surrogate"),
    ({"prompt": "x", "n": 17}, "more than 16 sequences"),
    ({"prompt": "x", "temperature": 3}, "temperature"),
    ({"prompt": "x", "temperature": float("nan")}, "temperature"),
    ({"prompt": "x", "temperature": 1e-45}, "at least 0.01"),
    ({"prompt": "x", "repetition_penalty": 5e-324}, "repetition_penalty"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "stop": ["a"] * 5}, "stop"),
    ({"prompt": "x", "stop": ""}, "stop"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "seed": 2**70}, "seed"),
    ({"prompt": "x", "echo": True}, "echo"),
    ({"prompt": "x", "frequency_penalty": 1}, "frequency_penalty"),
    ({"prompt": "x", "tempratur": 1}, "tempratur"),
    ({}, "prompt"),
    ([], ""),
]


@pytest.mark.parametrize(("body", "says"), BAD)
def test_what_cannot_be_obeyed_is_refused_in_a_line(server, body, says):
    text = json.dumps(body)
    answer = httpx.post(f"{server.url}/v1/completions", content=text, headers={"content-type": "application/json"})
    refused(answer, 400, says)


def refused(answer, status, says=""):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert says in error["message"] and "\n" not in error["message"] and "Traceback" not in answer.text


def test_other_mistakes_are_refused_too(server):
    url = server.url
    for content in (b"", b"{", b"\xff\xfe", b"null", NEST.encode()):
        refused(httpx.post(f"{url}/v1/completions", content=content, headers={"content-type": "application/json"}), 400)
    refused(
        httpx.post(f"{url}/v1/completions", content=b'{"prompt": "x"}'), 400
    )  # no JSON by its type: pages elsewhere send that
    for content in (b"x" * (2 << 20), iter([b"x" * (1 << 19)] * 4)):  # with its length said and without
        assert httpx.post(f"{url}/v1/completions", content=content).status_code == 413
    refused(httpx.get(f"{url}/v1/nothing"), 404)
    refused(httpx.get(f"{url}/v1/completions"), 405)
    refused(httpx.get(f"{url}/v1/models/swigul"), 404, "it is one of swiglu, swiglu:dense")
    refused(post(server, model="gpt-4", prompt="x"), 404, "no model 'gpt-4'")
    for messages in (
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "x",
    ):
        refused(post(server, "/v1/chat/completions", messages=messages), 400, "messages")
    refused(post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], top_logprobs=2), 400)
    assert server.idle


def test_a_model_without_a_chat_template_says_so():
    loaded, plan = embedded("relu", None)
    loaded.tokenizer.chat_template = None
    with running(loaded, plan) as server:
        refused(
            post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}]),
            400,
            "use /v1/completions",
        )


def test_models_health_and_metrics(server, client):
    assert [m.id for m in client.models.list()] == ["swiglu", "swiglu:dense"]
    assert client.models.retrieve("swiglu:dense").owned_by == "moyu"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = written(server)
    client.completions.create(model="swiglu", prompt="def", max_tokens=5, extra_body={"ignore_eos": True})
    assert written(server) == before + 5
    text = httpx.get(f"{server.url}/metrics").text
    assert 'moyu_http_responses_total{path="/v1/completions",status="400"}' in text
    assert "moyu_active_sequences 0.0" in text


def written(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("moyu_new_tokens_total")).split()[1])


def test_a_client_that_leaves_frees_its_rows_at_once(server):
    for stream in (False, True):
        body = json.dumps({"prompt": "def", "max_tokens": 250, "n": 4, "stream": stream, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        before, cancelled = written(server), server.engine.metrics.cancelled._value.get()
        with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as line:
            line.sendall(head.encode() + body)
            server.waits_for(lambda before=before: written(server) > before + 8)
        server.waits_for(lambda: server.idle)
        assert written(server) < before + 4 * 240
        assert server.engine.metrics.cancelled._value.get() == cancelled + 1


def test_what_finds_no_place_in_the_queue_gets_429(plain):
    with running(*plain, sequences=1, queue=1) as server, ThreadPoolExecutor(8) as pool:
        asked = {"prompt": "def", "max_tokens": 100, "ignore_eos": True}
        answers = list(pool.map(lambda _: post(server, **asked), range(8)))
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429} and codes.count(200) >= 2
        late = next(a for a in answers if a.status_code == 429)
        refused(late, 429, "try again")
        assert late.headers["retry-after"] == "1"
        assert post(server, **asked).status_code == 200


@pytest.mark.parametrize("broken", ["read", "step", "join", "leave"])
def test_a_failure_of_the_engine_is_told_and_the_next_request_is_answered(plain, monkeypatch, broken):
    def fails(*args, **kwargs):
        raise RuntimeError("of the tests")

    with running(*plain) as server, ThreadPoolExecutor(6) as pool:
        asked = [
            {"prompt": "def", "max_tokens": n, "temperature": 0, "ignore_eos": True} for n in (5, 20, 35, 50, 65, 80)
        ]
        with monkeypatch.context() as patch:
            patch.setattr(engine, broken, fails)
            answers = list(pool.map(lambda body: post(server, **body), asked))
        codes = {a.status_code for a in answers}
        assert codes <= {200, 500} and 500 in codes
        assert all("of the tests" not in a.text for a in answers)
        server.waits_for(lambda: server.idle)
        assert all(a.status_code == 200 for a in pool.map(lambda body: post(server, **body), asked))


def test_requests_have_a_time_limit(plain):
    with running(*plain, seconds=0.05, patience=0.3) as server:
        asked = {"prompt": "def", "max_tokens": 250, "ignore_eos": True}
        refused(post(server, **asked), 504, "ask for fewer tokens")
        last = post(server, **asked, stream=True).text.strip().rpartition("data: ")[2]
        assert "ask for fewer tokens" in json.loads(last)["error"]["message"]
        server.waits_for(lambda: server.idle)
        with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as line:
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
            )
            assert line.recv(1000).startswith(b"HTTP/1.1 408")


def test_without_the_key_nothing_is_served(plain):
    with running(*plain, key="sésame") as server:
        paths = ["/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/completions", "/nothing"]
        for headers in (
            {},
            {"Authorization": "Bearer sesame"},
            {"Authorization": "Basic !"},
            {"Authorization": "Bearer"},
        ):
            for path in paths:
                refused(httpx.get(f"{server.url}{path}", headers=headers), 401, "key")
            refused(httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers=headers), 401, "key")
        bearer = {"Authorization": "Bearer sésame".encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=bearer).status_code == 200
        assert httpx.get(f"{server.url}/", auth=("anybody", "sésame")).status_code == 200  # as browsers do


def test_only_this_machines_names_are_answered(plain):
    with running(*plain, hosts=["127.0.0.1"]) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/health", headers={"Host": "example.org"}).status_code == 400


@pytest.mark.parametrize("method", ["griffin", "clada"])
def test_methods_of_a_sequence_keep_its_own_mask(method):
    """CLADA's controller keeps tokens, which cannot stand beside another sequence's: such rows step alone."""
    loaded, plan = embedded("relu", method)
    texts = []
    for prompt in PROMPTS[:4]:
        ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
        fresh = [int(t) for t in generate(loaded.model, ids, plan, max_new_tokens=12, do_sample=False)]
        texts.append(loaded.tokenizer.decode(fresh, skip_special_tokens=True))
    with running(loaded, plan) as server, ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda p: post(server, prompt=p, max_tokens=12, temperature=0).json(), PROMPTS[:4])
        assert [g["choices"][0]["text"] for g in got] == texts


@pytest.fixture(scope="module")
def process():
    """`moyu serve` as a process of its own: (process, url, its first line)."""
    # FastAPI exports traces where the environment names a collector, and fails where it cannot: nothing is exported here.
    env = {**os.environ, "FASTAPI_OTEL_AUTO_CONFIGURE": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    words = [sys.executable, "-m", "moyu.commands.cli", "serve", "relu", "--port", "0"]
    started = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)
    said = started.stderr.readline()
    yield started, said.split()[1], said
    started.kill()
    started.communicate()


@pytest.mark.slow
def test_sigterm_finishes_what_is_being_written_and_takes_nothing_new(process):
    started, url, said = process
    asked = {"prompt": "def", "max_tokens": 300, "stream": True, "ignore_eos": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
        rest = list(lines)
    assert rest[-1] == "data: [DONE]" or rest[-2] == "data: [DONE]"
    assert (
        json.loads(rest[-4 if rest[-1] == "" else -3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    )
    assert started.wait(20) == 0
    assert "serves relu; native steps" in said and started.stderr.read() == ""


def test_what_cannot_be_served_is_refused_in_a_line(monkeypatch, capfd):
    def refusal(*words):
        monkeypatch.setattr(sys, "argv", ["moyu", "serve", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        line = capfd.readouterr().err
        assert line.startswith("moyu: error: ") and line.count("\n") == 1
        return line

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "give another --host or --port" in refusal("relu", "--port", str(taken.getsockname()[1]))
    assert "the 512 tokens that 'relu' reads" in refusal("relu", "--context", "1000")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'moyu-llm[serve]'" in refusal("relu")
