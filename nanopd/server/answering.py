"""One request's way to the cluster, and its answer's way back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanopd.core import RequestOutput
from nanopd.server.driver import Driver
from nanopd.server.errors import ApiError, failed, overloaded, timed_out, to_json, unavailable
from nanopd.server.forms import Form, usage
from nanopd.server.gate import Visit, visit_of
from nanopd.server.job import Job
from nanopd.server.prometheus import Metrics

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class ServerLimits:
    """What the server does not exceed, whatever comes. All beyond it is refused."""

    max_requests: int = 2048  # open at once
    max_streams: int = 1024  # answers streamed at once
    max_body: int = 2 * 2**20  # bytes of a request
    body_seconds: float = 30.0  # that a request may take to arrive
    timeout: float | None = None  # seconds that an answer may take; None: as long as it takes


class Service:
    """Knows the jobs that are open, and ends them when the server stops."""

    def __init__(self, driver: Driver, metrics: Metrics, limits: ServerLimits) -> None:
        self.driver = driver
        self.metrics = metrics
        self.limits = limits
        self.is_closing = False
        self.num_streams = 0
        self._jobs: set[Job] = set()

    @property
    def error(self) -> str | None:
        """Why nothing is served."""
        return "the server is stopping" if self.is_closing else self.driver.error

    def open(self, job: Job) -> None:
        """Give it to the cluster. Raises ApiError where the server itself can't take it."""
        if self.error is not None:
            raise unavailable(self.error)
        if job.streams and self.num_streams >= self.limits.max_streams:
            raise overloaded(f"{self.num_streams} answers are being streamed, and no more are let in: try again when some have ended")
        self._jobs.add(job)
        self._count_stream(job, 1)
        self.driver.submit(job)

    def close(self, job: Job, arrival: float) -> None:
        """Nobody waits for it any more."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._count_stream(job, -1)
            if not job.finished:
                self.driver.cancel(job)
            for output in job.outputs.values():
                self.metrics.observe(output, arrival)

    def stop(self, grace: float) -> None:
        """Take nothing in any more; after `grace` seconds, end what is still open."""
        self.is_closing = True
        asyncio.get_running_loop().call_later(grace, self._end_all)

    def _end_all(self) -> None:
        for job in self._jobs:
            if not job.ended:
                job.fail(unavailable("the server is stopping"))

    def _count_stream(self, job: Job, change: int) -> None:
        if job.streams:
            self.num_streams += change
            self.metrics.streams.inc(change)


class Answer(Response):
    """Asks the cluster and writes what it says, whole or in chunks. Where the client leaves, the cluster is told.

    Raises ApiError where no answer has begun; once one has, an error is the last of its chunks.
    """

    def __init__(self, service: Service, job: Job, form: Form, include_usage: bool) -> None:
        super().__init__()
        self._service, self._job, self._form, self._include_usage = service, job, form, include_usage
        self._is_last = False  # whether the last bytes are being sent: a client may leave when it has them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = visit_of(scope)
        try:
            self._service.open(self._job)
            writing = asyncio.create_task(self._write_chunks(send, visit) if self._job.streams else self._write_whole(send))
            leaving = asyncio.create_task(_disconnect(receive))
            try:
                await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if writing.done() or self._is_last:
                    await writing
                else:
                    visit.outcome = "cancelled"
            finally:
                await _end(writing, leaving)
        finally:
            self._service.close(self._job, visit.begun)

    async def _write_whole(self, send: Send) -> None:
        outputs = await self._job.done()
        for output in outputs:
            self._check(output)
        response = Response(to_json(self._form.whole(outputs)), media_type="application/json")
        await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
        self._is_last = True
        await send({"type": "http.response.body", "body": response.body})

    async def _write_chunks(self, send: Send, visit: Visit) -> None:
        await self._job.accepted()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            opening = self._form.opening(len(self._job.prompts))
            if opening:
                await self._write(send, self._chunks(opening))
            while events := await self._job.events():
                await self._write(send, self._chunks(self._form.news(events)))
            for output in self._job.outputs.values():
                self._check(output)
            last = [self._form.chunk([], usage=usage(self._job.outputs.values()))] if self._include_usage else []
        except ApiError as error:
            visit.outcome = "failed"
            last = [error.body()]
        self._is_last = True
        body = b"".join(map(_event, last)) + DONE
        await send({"type": "http.response.body", "body": body})

    def _chunks(self, choices: Iterable[dict]) -> bytes:
        """One for each choice: clients look at the first alone."""
        more = {"usage": None} if self._include_usage else {}
        return b"".join(_event(self._form.chunk([choice], **more)) for choice in choices)

    @staticmethod
    async def _write(send: Send, body: bytes) -> None:
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})

    def _check(self, output: RequestOutput) -> None:
        """Raises ApiError where it ended with an error."""
        if output.error is not None:
            timeout = self._job.timeout
            times = output.metrics
            if timeout is not None and times.finish_time is not None and times.finish_time - times.arrival_time >= timeout:
                raise timed_out(output.error)
            raise failed(output.error)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, ApiError):
            await task


def _event(data: dict) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"
