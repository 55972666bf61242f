"""What a server counts and measures, for Prometheus."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "grape_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "grape_request_seconds",
            "Time to an answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "grape_batch_size",
            "Items computed together.",
            ["stage"],
            buckets=BATCHES,
            registry=registry,
        )
        self.fallbacks = Counter(
            "grape_fallbacks", "Queries in place of a rewrite.", ["reason"], registry=registry
        )
        self.cached = Counter(
            "grape_cached_rewrites", "Rewrites taken from the cache.", registry=registry
        )
        self._waiting = Gauge(
            "grape_waiting", "Items waiting for a batch.", ["stage"], registry=registry
        )

    def watch_queue(self, stage: str, length: Callable[[], int]) -> None:
        """Reports the length of a queue whenever it is asked for."""
        self._waiting.labels(stage).set_function(length)


def measured(app: ASGIApp, metrics: Metrics) -> ASGIApp:
    """Middleware that counts and times requests by route."""

    async def measure(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, noting)
        finally:
            # Paths that belong to no route would be labels without bound.
            route = getattr(scope.get("route"), "path", "other")
            metrics.requests.labels(route, str(status)).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - started)

    return measure
