"""Refusals in the form that OpenAI's clients read."""

from __future__ import annotations

from starlette.responses import JSONResponse


def problem(status: int, message: str, code: str | None = None) -> dict[str, dict[str, str | None]]:
    """The body of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def refusal(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(problem(status, message, code), status)
