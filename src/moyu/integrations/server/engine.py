"""Continuous batching: one thread that reads prompts, steps all sequences, and lets them join and leave between steps."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moyu.engine.cache import KvCache
from moyu.engine.generate import CHUNK, join, leave, new_cache, read, step
from moyu.engine.memory import memory_of
from moyu.engine.session import Session
from moyu.errors import UserError
from moyu.integrations.server.answers import Answer, Event, Failed
from moyu.integrations.server.metrics import Metrics

NEVER = 1 << 60  # a prompt that ends here is never left: all steps are dense


class Full(Exception):
    """The queue of requests has no place left."""


@dataclass(eq=False)
class Request:
    """A prompt, (T,) int64, and the answers that are asked of it; what happens is told to `tell`, from the engine's thread."""

    prompt: Tensor
    answers: list[Answer]
    tell: Callable[[Event | Failed], None]
    dense: bool = False  # steps of it skip nothing
    cancelled: bool = False  # its sequences leave before the next step
    arrived: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Row:
    """A sequence that is being written: its next token (1,) is drawn and not yet read."""

    request: Request
    answer: Answer
    token: Tensor
    told: float


class _Lane:
    """Sequences that take their steps together, on one cache. Up to so many that a step is in one piece."""

    def __init__(self, session: Session, dense: bool) -> None:
        self.cache, self.rows, self.dense = new_cache(session), list[_Row](), dense
        self.most = session.rows_at_once

    def take(self, rows: list[_Row], cache: KvCache) -> bool:
        """Let rows with their cache join; False where they cannot stand beside those that are here."""
        if len(self.rows) + len(rows) > self.most:
            return False
        try:
            join(self.cache, cache)
        except UserError:  # layers with windows or states, methods that keep more of a sequence
            return False
        self.rows += rows
        return True


@dataclass(eq=False)
class _Prefill:
    """A request whose prompt is being read."""

    request: Request
    cache: KvCache


class Engine:
    """Runs requests on a model under a plan until `stop()`; all methods but `run` may be called from any thread."""

    def __init__(self, session: Session, metrics: Metrics, *, sequences: int = 16, queue: int = 64) -> None:
        """sequences: written at the same time at most; queue: requests that wait at most."""
        self.session, self.metrics, self.sequences, self.queue = session, metrics, sequences, queue
        self._waiting: deque[Request] = deque()
        self._reading: _Prefill | None = None
        self._lanes: list[_Lane] = []
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self.run, name="moyu-engine", daemon=True)

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def stop(self) -> None:
        """Leave what is unfinished, and end the thread."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none. Raises Full."""
        with self._wake:
            if len(self._waiting) + len(requests) > self.queue:
                raise Full
            self._waiting += requests
            self.metrics.waiting.set(len(self._waiting))
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Let a request's sequences leave before the next step; nothing is told of it any more."""
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    @property
    def active(self) -> int:
        """Sequences that are written or read now."""
        reading = self._reading
        return sum(len(lane.rows) for lane in self._lanes) + (0 if reading is None else len(reading.request.answers))

    # ---------------------------------------------------------------------------------------------- the engine's thread

    @torch.no_grad()
    def run(self) -> None:
        """Step until stopped: in turn, a part of a prompt and a step of every lane."""
        while self._wait():
            try:
                self._turn()
            except Exception as error:  # nobody may wait for ever, and the next request is answered again
                lost = [row.request for lane in self._lanes for row in lane.rows]
                lost += [] if self._reading is None else [self._reading.request]
                self._lanes, self._reading = [], None
                self._fail(lost, error)
            self.metrics.active.set(self.active)

    def _turn(self) -> None:
        self._drop()
        self._admit()
        if self._reading is not None:
            self._read(self._reading)
        for lane in list(self._lanes):
            self._step(lane)
        self._merge()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False once stopped."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopped or self._waiting or self._reading or self._lanes)
            return not self._stopped

    def _drop(self) -> None:
        """Let cancelled requests leave."""
        with self._wake:
            if any(request.cancelled for request in self._waiting):
                self._waiting = deque(r for r in self._waiting if not r.cancelled)
                self.metrics.waiting.set(len(self._waiting))
        if self._reading is not None and self._reading.request.cancelled:
            self._reading = None
        for lane in list(self._lanes):
            self._keep(lane, [row for row in lane.rows if not row.request.cancelled])

    def _admit(self) -> None:
        """Begin the prompt of the next request, where its sequences have room."""
        with self._wake:
            if self._reading or not self._waiting:
                return
            if self.active + len(self._waiting[0].answers) <= self.sequences:
                self._reading = _Prefill(self._waiting.popleft(), new_cache(self.session))
                self.metrics.waiting.set(len(self._waiting))

    def _read(self, reading: _Prefill) -> None:
        """Read a part of a prompt; behind the last one, draw first tokens and let the sequences join a lane."""
        request, cache = reading.request, reading.cache
        done = int(cache.get_seq_length())
        try:
            part = request.prompt[done : done + CHUNK].to(self.session.model.device)  # pyright: ignore
            logits = read(self.session, cache, part[None], last=True)[:, -1]
            if done + CHUNK < len(request.prompt):
                return
            self.metrics.prompt_tokens.inc(len(request.prompt))
            self._reading = None
            now = time.monotonic()
            self.metrics.first_token.observe(now - request.arrived)
            rows = [_Row(request, answer, torch.zeros(1, dtype=torch.int64), now) for answer in request.answers]
            kept = [n for n, row in enumerate(rows) if self._draw(row, logits)]
            if request.cancelled or not kept:
                return
            cache.batch_select_indices(torch.zeros(len(kept), dtype=torch.int64))
            if request.dense:
                memory_of(cache).prompt = NEVER
            self._place([rows[n] for n in kept], cache, request.dense)
        except Exception as error:
            self._reading = None
            self._fail([request], error)

    def _place(self, rows: list[_Row], cache: KvCache, dense: bool) -> None:
        """Let rows with their cache join a lane, or begin one."""
        if not any(lane.dense == dense and lane.take(rows, cache) for lane in self._lanes):
            lane = _Lane(self.session, dense)
            lane.cache, lane.rows = cache, rows
            self._lanes.append(lane)

    def _step(self, lane: _Lane) -> None:
        """One token of every row of a lane."""
        try:
            tokens = torch.cat([row.token for row in lane.rows]).to(self.session.model.device)  # pyright: ignore
            logits = step(self.session, lane.cache, tokens)
            self.metrics.steps.observe(len(lane.rows))
            self._keep(lane, [row for row, own in zip(lane.rows, logits.split(1), strict=True) if self._draw(row, own)])
        except Exception as error:  # of the whole lane: the others go on
            self._lanes.remove(lane)
            self._fail([row.request for row in lane.rows], error)

    def _draw(self, row: _Row, logits: Tensor) -> bool:
        """Draw and tell a row's next token from logits (1, V); whether the row goes on."""
        request = row.request
        if request.cancelled:
            return False
        try:
            row.token, event = row.answer.draw(logits)
        except Exception as error:
            self._fail([request], error)
            return False
        now = time.monotonic()
        if len(row.answer.fresh) > 1:
            self.metrics.between_tokens.observe(now - row.told)
        row.told = now
        self.metrics.new_tokens.inc()
        request.tell(event)
        return event.finish is None

    def _keep(self, lane: _Lane, rows: list[_Row]) -> None:
        """Only these rows of a lane go on."""
        if not rows:
            self._lanes.remove(lane)
        elif len(rows) < len(lane.rows):
            count = len(rows)
            late = [n for n, row in enumerate(lane.rows) if row in rows and n >= count]
            order = [n if lane.rows[n] in rows else late.pop() for n in range(count)]  # the last ones fill the gaps
            leave(lane.cache, torch.tensor(order))
            lane.rows = [lane.rows[n] for n in order]

    def _merge(self) -> None:
        """Put two lanes together where they have become short enough: weights are read once for all rows of a lane."""
        for lane in list(self._lanes):
            others = (o for o in self._lanes if o is not lane and o.dense == lane.dense)
            if any(other.take(lane.rows, lane.cache) for other in others):
                self._lanes.remove(lane)

    def _fail(self, requests: list[Request], error: Exception) -> None:
        """Tell requests that they have failed; their other sequences leave too."""
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        for request in dict.fromkeys(requests):
            if not request.cancelled:
                request.cancelled = True
                request.tell(Failed(error))
