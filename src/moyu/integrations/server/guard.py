"""What stands before every route: the key, and a limit on the time that a request may take to arrive."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moyu.integrations.server.errors import refusal


class Guard:
    """Lets requests with the key pass, in time. Browsers ask their user for it: as the password of Basic authentication."""

    def __init__(self, app: ASGIApp, *, key: str | None, patience: float, answered: Callable[[str, int], None]) -> None:
        """key: None lets everybody pass. patience: seconds for a body to arrive. answered: is told each path and status."""
        self.app, self.patience, self.answered = app, patience, answered
        self.key = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.answered(getattr(route, "path", "other"), message["status"])
            await send(message)

        if not self._knows(Headers(scope=scope).get("authorization", "")):
            answer = refusal(401, "the key is missing or wrong: send `Authorization: Bearer KEY`", "invalid_api_key")
            answer.headers["WWW-Authenticate"] = 'Basic realm="moyu"'
            await answer(scope, receive, counted)
            return
        deadline, arrived = time.monotonic() + self.patience, False

        async def timely() -> Message:
            nonlocal arrived
            if arrived:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, f"the body took more than {self.patience:g} s to arrive") from None
            arrived = not message.get("more_body", False)
            return message

        await self.app(scope, timely, counted)

    def _knows(self, header: str) -> bool:
        """Whether a request may pass. The comparison takes the same time for every key of a length."""
        if self.key is None:
            return True
        kind, _, given = header.partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(hashlib.sha256(given.strip().encode("latin-1", "replace")).digest(), self.key)
