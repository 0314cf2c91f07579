"""The thread that serves a cluster, and alone touches it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from nanopd.client import Stream
from nanopd.cluster import Cluster
from nanopd.core import InvalidRequest, Overloaded, TokenEvent
from nanopd.server.errors import ApiError, failed, invalid, overloaded, unavailable
from nanopd.server.job import Job, News

STEP_WAIT = 0.005  # seconds a step waits for workers; as long may a new request wait for the step
WATCH_EVERY = 1.0  # seconds between two looks at whether all workers live, while there is nothing to do


@dataclass
class _Open:
    """A prompt that the cluster has."""

    job: Job
    position: int
    stream: Stream
    begun: bool = False  # whether it has a token


class Driver:
    """Takes jobs from an event loop, and tells it what comes of them: once a step, however many there are.

    Args:
        make_cluster: called in the thread.
    """

    def __init__(self, make_cluster: Callable[[], Cluster]) -> None:
        self.error: str | None = None  # why nothing is let in any more
        self.num_prompt_tokens = self.num_tokens = 0  # taken in, and written, since the start
        self._make_cluster = make_cluster
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="nanopd-serve", daemon=True)
        self._ready: Future[None] = Future()
        self._stopping = False
        # of the thread:
        self._cluster: Cluster
        self._is_broken = False  # an exception came out of the cluster: it is not to be asked again
        self._open: dict[str, _Open] = {}
        self._news: defaultdict[Job, News] = defaultdict(News)

    def start(self) -> None:
        """Return when the cluster is up. Raises what kept it from coming up."""
        self._thread.start()
        self._ready.result()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Jobs come from there."""
        self._loop = loop

    def submit(self, job: Job) -> None:
        self._commands.put(lambda: self._submit(job))

    def cancel(self, job: Job) -> None:
        """End what is open of it. Nothing more is told of it."""
        self._commands.put(lambda: self._cancel(job))

    def call(self, function: Callable[[Cluster], Any]) -> Future[Any]:
        """What a function of the cluster returns, called where and when nobody else touches it."""
        future: Future[Any] = Future()
        self._commands.put(lambda: self._settle(future, function))
        return future

    def shutdown(self) -> None:
        """End what is open, and give the memory back."""
        self._stopping = True
        self._commands.put(lambda: None)  # wakes it
        if self._thread.ident is not None:
            self._thread.join()

    def num_open(self) -> tuple[int, int]:
        """Prompts in the cluster without a token and with one. From any thread."""
        begun = [entry.begun for entry in list(self._open.values())]
        return begun.count(False), begun.count(True)

    # ------------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        try:
            self._cluster = self._make_cluster()
        except BaseException as error:  # whoever started it gets it
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while not self._stopping:
            try:
                self._turn()
            except Exception as error:  # else the thread would end, and all would wait for it for ever
                self._break(error)
            self._tell()
        self._end_all(unavailable("the server is stopping"))
        self._tell()
        with suppress(Exception):  # of a cluster that has failed
            self._cluster.shutdown()

    def _turn(self) -> None:
        if not self._is_broken and self._cluster.has_work:
            self._obey()
            self._take(self._cluster.step(STEP_WAIT))
        else:
            self._await_command()
            self._obey()
        self._look_for_the_dead()

    def _await_command(self) -> None:
        try:
            self._commands.get(timeout=WATCH_EVERY)()
        except Empty:
            if not self._is_broken:
                self._cluster.step(0.0)  # hears of workers that have died

    def _obey(self) -> None:
        with suppress(Empty):
            while True:
                self._commands.get_nowait()()

    def _look_for_the_dead(self) -> None:
        if self.error is None and (lack := self._cluster.lack):
            self.error = f"{lack}; restart the server"

    def _submit(self, job: Job) -> None:
        if self.error is not None:
            self._news[job].error = unavailable(self.error)
            return
        error: ApiError | None = None
        try:
            for position, (text, token_ids) in enumerate(job.prompts):
                prompt = {"prompt": text, "prompt_token_ids": token_ids}
                stream = self._cluster.submit(prompt, job.sampling, timeout=job.timeout)
                self._open[stream.request_id] = _Open(job, position, stream)
        except InvalidRequest as refusal:
            error = invalid(str(refusal))
        except Overloaded as refusal:
            error = overloaded(str(refusal))
        except Exception as bug:  # of this request: the others go on
            logging.getLogger(__name__).exception("a request could not be submitted")
            error = failed(f"{type(bug).__name__}: {bug}")
        if error is None:
            self._news[job].accepted = True
            self.num_prompt_tokens += sum(len(token_ids) for _, token_ids in job.prompts)
        else:
            self._cancel(job)
            self._news[job].error = error

    def _cancel(self, job: Job) -> None:
        self._news.pop(job, None)
        for request_id in [request_id for request_id, entry in self._open.items() if entry.job is job]:
            del self._open[request_id]
            self._cluster.cancel(request_id)

    def _take(self, events: list[TokenEvent]) -> None:
        told = {event.request_id: entry for event in events if (entry := self._open.get(event.request_id))}
        for event in events:
            if entry := told.get(event.request_id):
                if event.token_id is not None:
                    self.num_tokens += 1
                    entry.begun = True
                if entry.job.streams:
                    self._news[entry.job].events.append((entry.position, event))
        for request_id, entry in told.items():
            if entry.stream.finished:
                del self._open[request_id]
                self._news[entry.job].outputs.append((entry.position, entry.stream.result()))

    def _break(self, error: Exception) -> None:
        self._is_broken = True
        self.error = f"the cluster has failed, restart the server: {type(error).__name__}: {error}"
        self._end_all(unavailable(self.error))

    def _end_all(self, error: ApiError) -> None:
        for entry in self._open.values():
            self._news[entry.job].error = error
        self._open.clear()

    def _settle(self, future: Future[Any], function: Callable[[Cluster], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # nobody waits for it any more
        try:
            if self._is_broken:
                raise RuntimeError(self.error)
            future.set_result(function(self._cluster))
        except Exception as error:  # whoever waits for it gets it
            future.set_exception(error)

    def _tell(self) -> None:
        if self._news and self._loop is not None:
            news, self._news = self._news, defaultdict(News)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._hand_out, news)

    # --------------------------------------------------------------------------------------- in the event loop

    def _hand_out(self, news: dict[Job, News]) -> None:
        for job, its in news.items():
            job.take(its)
            if job.error is not None and its.error is None:  # it has read too slowly
                self.cancel(job)
