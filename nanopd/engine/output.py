"""From token events to text: incremental detokenizing, stop strings, and the answers as the client sees them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nanopd.core import CompletionOutput, FinishReason, Request, RequestMetrics, RequestOutput, TokenEvent


class TextStream:
    """Turns one answer's tokens into text as they come.

    A token can end in the middle of a character, and how it is spelled can depend on the one before it. So a
    short tail of tokens is decoded with and without the new one, and text is given out once it is whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._tail = 0  # decoding starts here
        self._given = 0  # tokens before this one have been given out

    def push(self, token_id: int) -> str:
        """The text that became complete with this token."""
        self._token_ids.append(token_id)
        before, after = self._decode(self._given), self._decode(None)
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._tail, self._given = self._given, len(self._token_ids)
        return after[len(before) :]

    def flush(self) -> str:
        """What was held back, an unfinished character as the replacement character."""
        return self._decode(None)[len(self._decode(self._given)) :]

    def _decode(self, stop: int | None) -> str:
        return self._tokenizer.decode(self._token_ids[self._tail : stop], skip_special_tokens=True)


class Answer:
    """One answer in the making."""

    def __init__(self, request: Request, index: int, tokenizer: Any | None) -> None:
        self.output = CompletionOutput(index)
        if request.beam is None and request.sampling.logprobs is not None:
            self.output.logprobs = []
        self._stop = request.sampling.stop if request.beam is None else ()
        self._min_tokens = request.sampling.min_tokens
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._held = ""  # complete text that could be the beginning of a stop string

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def take(self, event: TokenEvent) -> bool:
        """Add a token, set the event's text. Returns True if a stop string was completed and ended the answer."""
        text = ""
        if event.token_id is not None:
            self._add_token(event)
            if self._stream and event.finish_reason is not FinishReason.STOP:  # what stops an answer is no part of its text
                text = self._stream.push(event.token_id)
        if event.finish_reason is not None and self._stream:
            text += self._stream.flush()
        text = self._held + text
        stopped_by = self._find_stop(text)
        if stopped_by is not None:
            was_running = event.finish_reason is None
            event.finish_reason, event.stop_reason = FinishReason.STOP, stopped_by
            text = text[: text.index(stopped_by)]
        keep = 0 if event.finish_reason else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        event.text = text[: len(text) - keep]
        self.output.text += event.text
        self.output.finish_reason, self.output.stop_reason = event.finish_reason, event.stop_reason
        return stopped_by is not None and was_running

    def _add_token(self, event: TokenEvent) -> None:
        assert event.token_id is not None
        self.output.token_ids.append(event.token_id)
        self.output.cumulative_logprob += event.logprob
        if self.output.logprobs is not None:
            self.output.logprobs.append({**dict(event.top_logprobs or ()), event.token_id: event.logprob})

    def _find_stop(self, text: str) -> str | None:
        """The stop string that comes first in the text, if any."""
        if len(self.output.token_ids) <= self._min_tokens:
            return None
        found = [(text.index(stop), stop) for stop in self._stop if stop in text]
        return min(found)[1] if found else None

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of the text that begins a stop string and isn't all of one."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        return next((length for length in range(min(longest, len(text)), 0, -1)
                     if any(len(stop) > length and stop.startswith(text[-length:]) for stop in self._stop)), 0)


@dataclass
class _OpenRequest:
    request: Request
    answers: list[Answer]
    metrics: RequestMetrics
    error: str | None = None

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self.answers)

    def take(self, event: TokenEvent) -> bool:
        stopped = self.answers[event.index].take(event)
        self.error = self.error or event.error
        if event.token_id is not None and self.metrics.first_token_time is None:
            self.metrics.first_token_time = event.time
        if event.finish_reason is not None:
            self.metrics.finish_time = event.time
        return stopped


class OutputProcessor:
    """The client's side of the engine: knows every open request's answers."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._open: dict[str, _OpenRequest] = {}

    def add(self, request: Request) -> None:
        answers = [Answer(request, index, self._tokenizer) for index in range(request.num_answers)]
        self._open[request.request_id] = _OpenRequest(request, answers, RequestMetrics(request.arrival_time))

    def process(self, events: Iterable[TokenEvent]) -> tuple[list[TokenEvent], list[tuple[str, int]]]:
        """Give events their text.

        Returns the events that still matter, and the (request id, answer) pairs that a stop string ended, which
        the engine has yet to be told. What comes after an answer's end is dropped.
        """
        kept: list[TokenEvent] = []
        stopped: list[tuple[str, int]] = []
        for event in events:
            entry = self._open.get(event.request_id)
            if entry is None or entry.answers[event.index].finished:
                continue
            if entry.take(event):
                stopped.append((event.request_id, event.index))
            kept.append(event)
        return kept, stopped

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def is_finished(self, request_id: str) -> bool:
        return self._open[request_id].finished

    def output(self, request_id: str) -> RequestOutput:
        """The request's answers so far."""
        entry = self._open[request_id]
        return RequestOutput(request_id, entry.request.prompt, entry.request.prompt_token_ids,
                             [answer.output for answer in entry.answers], entry.metrics, entry.error)

    def pop(self, request_id: str) -> RequestOutput:
        """The request's answers, and forget it."""
        output = self.output(request_id)
        del self._open[request_id]
        return output
