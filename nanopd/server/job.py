"""What one HTTP request wants of the cluster, and what has come of it. The driver's thread reads the first half, the event
loop alone writes the second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field

from nanopd.core import RequestOutput, SamplingParams, TokenEvent
from nanopd.server.errors import ApiError

MOST_UNREAD = 1024  # events; a client that is so far behind is given up

ReadPrompt = tuple[str | None, list[int]]  # text, if there is one, and token ids


@dataclass
class News:
    """Of a job, from the driver's thread. `events` and `outputs` come with the position of their prompt."""

    accepted: bool = False
    events: list[tuple[int, TokenEvent]] = field(default_factory=list)
    outputs: list[tuple[int, RequestOutput]] = field(default_factory=list)
    error: ApiError | None = None


class Job:
    """Prompts that are answered together, with the same sampling. Made and read in the event loop.

    Args:
        streams: tokens are wanted as they come; else the whole answers alone.
        timeout: seconds that each prompt's answers may take in the cluster.
    """

    def __init__(self, prompts: list[ReadPrompt], sampling: SamplingParams, *, streams: bool, timeout: float | None = None) -> None:
        self.prompts = prompts
        self.sampling = sampling
        self.streams = streams
        self.timeout = timeout
        self.outputs: dict[int, RequestOutput] = {}
        self.error: ApiError | None = None
        self._accepted = False
        self._unread: list[tuple[int, TokenEvent]] = []
        self._something = asyncio.Event()

    @property
    def finished(self) -> bool:
        return len(self.outputs) == len(self.prompts)

    @property
    def ended(self) -> bool:
        """Whether the cluster has nothing to do with it any more, or soon will not."""
        return self.finished or self.error is not None

    def take(self, news: News) -> None:
        if self.error is not None:
            return  # what was under way when it ended
        self._accepted |= news.accepted
        self._unread += news.events
        self.outputs |= news.outputs
        self.error = news.error
        if len(self._unread) > MOST_UNREAD and not self.finished:
            self.fail(ApiError(408, f"the answer was broken off: {MOST_UNREAD} tokens of it waited to be read", code="slow_reader"))
        self._something.set()

    def fail(self, error: ApiError) -> None:
        """End it here. What has not been read of it will not be."""
        self.error = error
        self._unread.clear()
        self._something.set()

    async def accepted(self) -> None:
        """Wait until the cluster has let it in. Raises ApiError where it does not."""
        while not self._accepted and self.error is None:
            await self._news()
        if self.error is not None:
            raise self.error

    async def events(self) -> list[tuple[int, TokenEvent]]:
        """What has come since the last call, at least one event; [] after the last. Raises ApiError where it ended before."""
        while not self._unread and not self.ended:
            await self._news()
        if self.error is not None:
            raise self.error
        events, self._unread = self._unread, []
        return events

    async def done(self) -> list[RequestOutput]:
        """Wait for all answers, in the prompts' order. Raises ApiError where it ended before."""
        while not self.ended:
            await self._news()
        if self.error is not None:
            raise self.error
        return [self.outputs[position] for position in range(len(self.prompts))]

    def _news(self) -> Awaitable[bool]:
        self._something.clear()
        return self._something.wait()
