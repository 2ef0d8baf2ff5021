"""What the server counts, for Prometheus. Nothing of a request's content, and nothing is sent anywhere."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        """All zero."""
        self.registry = registry = CollectorRegistry()
        self.answers = Counter("moyu_http_responses", "Answers over HTTP.", ["path", "status"], registry=registry)
        self.cancelled = Counter("moyu_cancelled", "Requests whose client left or ran out of time.", registry=registry)
        self.prompt_tokens = Counter("moyu_prompt_tokens", "Tokens of prompts that were read.", registry=registry)
        self.new_tokens = Counter("moyu_new_tokens", "Tokens that were written.", registry=registry)
        self.active = Gauge("moyu_active_sequences", "Sequences that are read or written now.", registry=registry)
        self.waiting = Gauge("moyu_waiting_requests", "Requests in the queue.", registry=registry)
        self.steps = Histogram(
            "moyu_step_rows", "Sequences in a decode step.", registry=registry, buckets=tuple(range(1, 17))
        )
        self.first_token = Histogram(
            "moyu_first_token_seconds", "From arrival to the first token.", registry=registry, buckets=SECONDS
        )
        self.between_tokens = Histogram(
            "moyu_between_tokens_seconds", "From a sequence's token to its next.", registry=registry, buckets=SECONDS
        )

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)
