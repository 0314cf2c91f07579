"""A load on any server that speaks OpenAI's /v1/completions, over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from nanopd.benchmark.load.http import HttpError, post
from nanopd.benchmark.load.prompts import prompts
from nanopd.benchmark.load.record import ClientRecord, Load, Stopped, Tally
from nanopd.benchmark.load.schedule import Schedule

API_KEY = "OPENAI_API_KEY"  # the environment variable that holds it, for servers that want one
REFUSED = (429, 503)  # what a server answers that has too much to do
WORDS = tuple("one two three four five six seven eight nine ten red blue green black white big small old new good".split())


class EndpointError(ValueError):
    """A server can't be measured. The message says what it answered."""


class _Refused(Exception):
    """It has too much to do."""


class _Failed(Exception):
    """With the server's words, or what became of the connection."""


@dataclass(frozen=True)
class PromptForm:
    """How a server takes prompts: as ids of tokens below `vocab_size`; None: as text, of words that are about a token each."""

    vocab_size: int | None

    def of(self, token_ids: np.ndarray) -> list[int] | str:
        return token_ids.tolist() if self.vocab_size else " ".join(WORDS[number] for number in token_ids)

    @property
    def num_words(self) -> int:
        return self.vocab_size or len(WORDS)


FORMS = (PromptForm(32_000), PromptForm(1_000), PromptForm(None))  # to try, the best one first


def serve_endpoint(url: str, schedule: Schedule, model: str, form: PromptForm = FORMS[0], seed: int = 0, timeout: float = 600.0,
                   progress: Callable[[Tally], None] | None = None) -> Load:
    """Send random prompts to `url`/v1/completions when they are due, however many are open, and wait until all have ended.

    A request that is refused (429, 503) is dropped. One that gets another error, a broken stream, or no end within `timeout`
    seconds has failed. An answer's tokens are counted by the pieces in which they come, and by what the server says at its end.
    `progress` is told every second how far it is, by another thread. Works in a notebook too.

    Raises Stopped, with what there is by then, on Ctrl-C.
    """
    driver = _Driver(_Client(url, model, timeout), schedule, form, seed, progress or (lambda tally: None))
    _in_a_thread(driver.run(), lambda: Stopped(driver.so_far()))
    return Load(driver.records, schedule.begin, schedule.end)


def find_form(url: str, model: str) -> PromptForm:
    """How this server takes prompts, by trying. Raises EndpointError where it answers none, saying what it said."""
    return _in_a_thread(_find_form(_Client(url, model, timeout=120.0)), KeyboardInterrupt)


async def _find_form(client: _Client) -> PromptForm:
    said = []
    for form in FORMS:
        try:
            await client.ask(ClientRecord(0.0, 2, 1), form.of(np.array([0, form.num_words - 1])), lambda: 0.0)
        except (_Refused, _Failed) as error:
            said.append(str(error))
        else:
            return form
    raise EndpointError(f"{client.url} does not answer for the model {client.model!r}: {'; '.join(dict.fromkeys(said))}")


def _in_a_thread(work: Any, stopped: Callable[[], BaseException]) -> Any:
    """A coroutine's result. In a thread of its own, for in a notebook this one has a loop already, and so that Ctrl-C comes
    between no two lines of it."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(_run, loop, task)
        try:
            return future.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            with suppress(CancelledError, asyncio.CancelledError):
                future.result()
            raise stopped() from None


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task) -> Any:
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(task)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


class _Driver:
    def __init__(self, client: _Client, schedule: Schedule, form: PromptForm, seed: int, progress: Callable[[Tally], None]) -> None:
        self.client, self.form, self.schedule, self.progress = client, form, schedule, progress
        self.prompts = prompts(schedule.arrivals, form.num_words, seed)
        self.records = schedule.records()
        self.num_sent = self.num_ended = 0

    async def run(self) -> None:
        self.start = time.monotonic()
        tasks = [asyncio.create_task(self._tell())]
        try:
            for record, token_ids in zip(self.records, self.prompts):
                await asyncio.sleep(record.arrival - self._now())
                tasks.append(asyncio.create_task(self._send(record, token_ids)))
            await asyncio.gather(*tasks[1:])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def so_far(self) -> Load:
        return Load(self.records, self.schedule.begin, self.schedule.end).so_far(self._now())

    async def _send(self, record: ClientRecord, token_ids: np.ndarray) -> None:
        prompt = self.form.of(token_ids)
        record.sent = self._now()
        self.num_sent += 1
        try:
            await self.client.ask(record, prompt, self._now)
        except _Refused as error:
            record.end(self._now(), "dropped", str(error))
        except _Failed as error:
            record.end(self._now(), "failed", str(error))
        except asyncio.CancelledError:
            record.end(self._now(), "failed", "the load was stopped")
            raise
        finally:
            self.num_ended += 1

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(1 - self._now() % 1)
            self.progress(Tally(self._now(), len(self.records), self.num_sent, self.num_sent - self.num_ended))

    def _now(self) -> float:
        return time.monotonic() - self.start


class _Client:
    """Of one server and model."""

    def __init__(self, url: str, model: str, timeout: float) -> None:
        self.url, self.model, self.timeout = completions_url(url), model, timeout
        key = os.environ.get(API_KEY)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    async def ask(self, record: ClientRecord, prompt: list[int] | str, now: Callable[[], float]) -> None:
        """Ends the record where all goes well. Raises _Refused or _Failed."""
        try:
            await asyncio.wait_for(self._stream(record, prompt, now), self.timeout)
        except asyncio.TimeoutError:
            raise _Failed(f"no end within {self.timeout:g} s") from None
        except HttpError as error:
            raise _Failed(str(error)) from None

    async def _stream(self, record: ClientRecord, prompt: list[int] | str, now: Callable[[], float]) -> None:
        body = {"model": self.model, "prompt": prompt, "max_tokens": record.output_len, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}
        async with post(self.url, self._headers, json.dumps(body).encode()) as answer:
            if answer.status != 200:
                words = f"HTTP {answer.status}: {_words(b''.join([piece async for piece in answer.pieces]))}"
                raise _Refused(words) if answer.status in REFUSED else _Failed(words)
            await _read(_events(answer.pieces), record, now)
        record.end(now(), "completed")


def completions_url(url: str) -> str:
    """Of "http://host:8000", also with /v1 or all of the path. Raises EndpointError where it is no URL."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise EndpointError(f"an endpoint is a URL such as http://localhost:8000, got {url!r}")
    base = url.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    return f"{base}/v1/completions"


async def _read(events: AsyncIterator[dict[str, Any]], record: ClientRecord, now: Callable[[], float]) -> None:
    has_ended = False
    async for event in events:
        if event.get("error"):
            raise _Failed(_error(event))
        for choice in event.get("choices") or ():
            has_ended = has_ended or choice.get("finish_reason") is not None
            if choice.get("text") or choice.get("finish_reason") is None:
                record.tokens.append(now())
        record.num_reported = (event.get("usage") or {}).get("completion_tokens", record.num_reported)
    if not has_ended:
        raise _Failed(f"the stream broke off after {len(record.tokens)} pieces of the answer")
    if not record.tokens:
        raise _Failed("the answer has no tokens")


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, until "[DONE]" or its end; what else there is in it is passed over."""
    buffer = b""
    async for piece in pieces:
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                if data:
                    yield _json(data)


def _json(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise _Failed(f"the stream has something that is no JSON object: {data[:80]!r}")
    return event


def _words(body: bytes) -> str:
    try:
        return _error(json.loads(body))
    except ValueError:
        return body.decode(errors="replace").strip()[:200]


def _error(data: Any) -> str:
    """OpenAI's {"error": {"message": ...}}, FastAPI's {"detail": ...}, or whatever it is."""
    said = data.get("error") or data.get("detail") or data.get("message") if isinstance(data, dict) else data
    said = said.get("message", said) if isinstance(said, dict) else said
    return str(said)[:200]
