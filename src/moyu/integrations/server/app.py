"""The web application: OpenAI's routes, health, metrics and the chat page. It never touches the model but through the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from moyu.errors import UserError, place_of
from moyu.integrations.server import replies
from moyu.integrations.server.engine import Engine, Full
from moyu.integrations.server.errors import problem, refusal
from moyu.integrations.server.guard import Guard
from moyu.integrations.server.jobs import Job, Limits, Model
from moyu.integrations.server.schema import Chat, Completion
from moyu.measure.environment import VERSION

OFF: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
PAGE_MAY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)
SAID = {
    400: "refused",
    401: "no key",
    404: "no such model",
    408: "too slow",
    413: "too large",
    429: "too many",
    504: "too long",
}
STREAMS: Any = {200: {"description": "The answer, or its parts as events.", "content": {"text/event-stream": {}}}}
REFUSALS: Any = {code: {"description": said, "model": replies.Problem} for code, said in SAID.items()}


def build(
    model: Model, engine: Engine, limits: Limits, *, key: str | None = None, hosts: list[str] | None = None
) -> FastAPI:
    """The application. hosts: the names that it answers to; None: any."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(
        title="moyu",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        lifespan=life,
        max_body_size=limits.body,
        telemetry=OFF,
        responses=REFUSALS,
    )
    if hosts is not None:  # a page elsewhere could name this machine as its own (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(
        Guard,
        key=key,
        patience=limits.patience,
        answered=lambda path, status: engine.metrics.answers.labels(path, status).inc(),
    )
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(AnyHTTPException, _http_error)
    app.add_exception_handler(Exception, _broken)

    async def started(body: Chat | Completion, request: Request) -> Job:
        job = await asyncio.to_thread(Job.prepare, model, body, limits, asyncio.get_running_loop())
        try:
            engine.submit(*job.requests)
        except Full:
            raise HTTPException(429, f"{engine.queue} requests wait already: try again", {"Retry-After": "1"}) from None
        return job

    async def answered(body: Chat | Completion, request: Request) -> Any:
        job = await started(body, request)
        if body.stream:
            return StreamingResponse(
                streamed(job), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        watch = asyncio.create_task(_disconnected(request))
        work = asyncio.create_task(job.finish())
        try:
            await asyncio.wait({watch, work}, timeout=limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return job.reply(work.result())
            if watch.done():
                return Response(status_code=499)  # nobody reads it
            raise HTTPException(504, f"not finished in {limits.seconds:g} s: ask for fewer tokens")
        finally:
            watch.cancel()
            work.cancel()
            job.cancel(engine)

    async def streamed(job: Job) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(limits.seconds):
                async for chunk in job.chunks():
                    yield f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield _event(problem(504, f"not finished in {limits.seconds:g} s: ask for fewer tokens"))
        except UserError as error:
            yield _event(problem(400, str(error)))
        except Exception:
            yield _event(problem(500, "the server failed; its log says why"))
        finally:
            job.cancel(engine)

    @app.post(
        "/v1/chat/completions", response_model=replies.ChatReply, response_model_exclude_none=True, responses=STREAMS
    )
    async def chat_completions(body: Chat, request: Request) -> Any:
        """Answer a conversation."""
        return await answered(body, request)

    @app.post("/v1/completions", response_model=replies.TextReply, response_model_exclude_none=True, responses=STREAMS)
    async def completions(body: Completion, request: Request) -> Any:
        """Continue a text."""
        return await answered(body, request)

    @app.get("/v1/models")
    async def models() -> replies.Models:
        """The model under the plan, and dense."""
        return replies.Models(data=[replies.ModelCard(id=name, created=model.created) for name in model.names])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> replies.ModelCard:
        """One of them."""
        model.dense(name)
        return replies.ModelCard(id=name, created=model.created)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """That the server runs."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        """A page to chat on."""
        text = resources.files("moyu.integrations.server").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_MAY, "Cache-Control": "no-store"})

    return app


async def _disconnected(request: Request) -> None:
    """Return once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(body: dict[str, Any]) -> str:
    return f"data: {replies.Problem.model_validate(body).model_dump_json()}\n\n"


async def _user_error(request: Request, error: Any) -> Response:
    status = getattr(error, "status", 400)
    return refusal(status, str(error), getattr(error, "code", None))


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = place_of(part for part in first["loc"] if part != "body")
    said = str(first["msg"]).removeprefix("Value error, ")
    return refusal(400, f"{where}: {said}" if where else said)


async def _http_error(request: Request, error: Any) -> Response:
    answer = refusal(error.status_code, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


async def _broken(request: Request, error: Exception) -> Response:
    return refusal(500, "the server failed; its log says why")
