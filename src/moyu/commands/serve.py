"""`moyu serve`: an OpenAI-compatible server."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moyu.commands.options import BackendName, Device, Model, PlanFolder, Weights
from moyu.errors import UserError

HERE = ["127.0.0.1", "localhost", "::1"]


def serve(
    model: Model = "swiglu",
    plan: PlanFolder = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. 0.0.0.0 is every one: give a key then.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on. 0 takes a free one.", min=0, max=65535)] = 8000,
    key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="MOYU_API_KEY",
            help="Serve only who sends this key. Others can read it here: better set the variable.",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Write at most this many sequences at a time.", min=1, max=256)] = 16,
    queue: Annotated[int, typer.Option(help="Let at most this many requests wait; more get 429.", min=0)] = 64,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and answer, at most. Default: what the model reads, 8192 at most.", min=2),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer, at most. Default: as the context.", min=1)
    ] = None,
    seconds: Annotated[float, typer.Option(help="Give an answer up after so many seconds.", min=0.1)] = 600.0,
    body: Annotated[int, typer.Option(help="Bytes of a request, at most.", min=1)] = 1 << 20,
    drain: Annotated[
        float, typer.Option(help="After SIGTERM, finish what is being written for so many seconds.", min=0)
    ] = 60.0,
    log: Annotated[
        bool, typer.Option("--log", help="Print a line for each request: its path and status, never its text.")
    ] = False,
    weights: Weights = None,
    device: Device = "cpu",
    backend: BackendName = "auto",
) -> None:
    """Serve a model over HTTP as OpenAI's API has it, dense or under a plan, with a page to chat on."""
    from moyu.model import machine

    kernels = machine.backend_of(backend)
    machine.check(device, kernels, weights)
    try:
        import uvicorn

        from moyu.integrations.server.app import build
        from moyu.integrations.server.engine import Engine
        from moyu.integrations.server.jobs import Limits
        from moyu.integrations.server.jobs import Model as Served
        from moyu.integrations.server.metrics import Metrics
    except ImportError as error:
        raise UserError(
            f"the server is not installed ({error.name} is missing)", "pip install 'moyu-llm[serve]'"
        ) from error
    from moyu.calibration.context import open_with_plan
    from moyu.engine.applied import Applied
    from moyu.model import loading
    from moyu.model.prompts import context_of

    loaded, asked = open_with_plan(model, plan, weights, device)
    reads = context_of(loaded.model)
    if context is not None and reads is not None and context > reads:
        raise UserError(
            f"--context {context} is more than the {reads} tokens that {loaded.name!r} reads", "give that or less"
        )
    room = context or min(reads or 8192, 8192)
    limits = Limits(context=room, new_tokens=new_tokens or room, sequences=sequences, body=body, seconds=seconds)
    with Applied(loaded.model, asked, backend=kernels) as session:
        engine = Engine(session, Metrics(), sequences=sequences, queue=queue)
        served = Served(loaded, Path(model).stem if loading.gguf_file(model) else model, asked is not None)
        app = build(served, engine, limits, key=key, hosts=[*HERE, "[::1]"] if host in HERE else None)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_level="info" if log else "warning",
            access_log=log,
            limit_concurrency=2 * (queue + sequences) + 64,
            timeout_graceful_shutdown=max(1, round(drain)),
            server_header=False,
        )
        line = _listen(host, port)
        where = f"http://{f'[{host}]' if ':' in host else host}:{line.getsockname()[1]}"
        says = _says(session, loaded, sequences, room, key)
        print(f"moyu: {where} serves {', '.join(served.names)}; {says}", file=sys.stderr, flush=True)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains, then raises the signal again
        try:
            uvicorn.Server(config).run(sockets=[line])
        finally:
            signal.signal(signal.SIGTERM, before)


def _listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises UserError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        said = error.strerror or str(error)
        raise UserError(f"cannot listen on {host}, port {port} ({said})", "give another --host or --port") from error


def _says(session: Any, loaded: Any, sequences: int, context: int, key: str | None) -> str:
    """The server in a line: its decode step, its sequences, its context, whether there is a key."""
    run = session.native
    step = f"general steps ({session.general_because})" if run is None else f"{run.trace.step} steps"
    chat = "" if loaded.tokenizer.chat_template else "no chat template: only /v1/completions answers; "
    return f"{step}; {chat}{sequences} sequences of {context} tokens; {'no key' if key is None else 'with a key'}"
