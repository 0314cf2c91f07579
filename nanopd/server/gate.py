"""Who is let in, and what became of each: around everything else, so that no way out goes uncounted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanopd.server.errors import overloaded
from nanopd.server.prometheus import Metrics


@dataclass
class Visit:
    """One HTTP request for an answer. Whoever handles it may say what came of it; else its status does."""

    begun: float = field(default_factory=time.monotonic)
    outcome: str | None = None
    status: int = 500

    def outcome_by_status(self) -> str:
        if self.status < 400:
            return "completed"
        return "dropped" if self.status == 429 else "invalid" if self.status < 500 else "failed"


def visit_of(scope: Scope) -> Visit:
    return scope["nanopd.visit"]


class Gate:
    """ASGI middleware.

    Args:
        most: requests that may be open at once.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int) -> None:
        self.app = app
        self.metrics = metrics
        self.most = most
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        visit = scope["nanopd.visit"] = Visit()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
            await send(message)

        self.num_open += 1
        self.metrics.open.inc()
        try:
            await self._let_in(scope, receive, noting)
        finally:
            self.num_open -= 1
            self.metrics.open.dec()
            self.metrics.requests.labels(_endpoint(scope), visit.outcome or visit.outcome_by_status()).inc()

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.num_open > self.most:
            refusal = overloaded(f"{self.most} requests are open, and no more are let in: try again when some have ended")
            await refusal.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _endpoint(scope: Scope) -> str:
    """Known ones by name: a metric must not grow with what clients think up."""
    path = scope["path"]
    return path if path in ("/v1/completions", "/v1/chat/completions") else "other"
