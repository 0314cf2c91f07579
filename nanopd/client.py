"""The client's side: prompts become requests, token events become text and outputs. `LLM` and `Cluster` are clients."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from nanopd.core import (
    BeamSearchParams,
    InvalidRequest,
    Overloaded,
    Request,
    RequestOutput,
    SamplingParams,
    TokenEvent,
)
from nanopd.engine.limits import Limits
from nanopd.engine.output import OutputProcessor
from nanopd.interrupts import uninterrupted

if TYPE_CHECKING:
    from typing_extensions import Self

Prompt = str | dict[str, Any]
Messages = list[dict[str, str]]
MESSAGE_FORM = '{"role": "user", "content": "..."}'


class Stream:
    """One request's events as they come. Iterating drives the engine; `close` cancels the request."""

    def __init__(self, client: Client, request_id: str) -> None:
        self.request_id = request_id
        self._client = client
        self._events: deque[TokenEvent] = deque()
        self._output: RequestOutput | None = None

    def __iter__(self) -> Iterator[TokenEvent]:
        while self._events or self._output is None:
            if self._events:
                yield self._events.popleft()
            else:
                self._client.step()

    @property
    def finished(self) -> bool:
        return self._output is not None

    def result(self) -> RequestOutput:
        """Run until the request has ended and return all of it."""
        while self._output is None:
            self._client.step()
        return self._output

    def close(self) -> None:
        self._client.cancel(self.request_id)

    def _take(self, event: TokenEvent) -> None:
        self._events.append(event)


class PromptReader:
    """What clients give as prompts becomes token ids. `tokenizer` may be None: then only token ids are taken."""

    def __init__(self, tokenizer: Any | None) -> None:
        self.tokenizer = tokenizer

    def read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, where there is one, and its token ids. Raises InvalidRequest for what is no prompt."""
        if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
            token_ids = prompt["prompt_token_ids"]
            if not isinstance(token_ids, (list, tuple)):
                raise InvalidRequest("prompt_token_ids must be a list of integers, "
                                     f"got {type(token_ids).__name__}: {token_ids!r:.80}")
            return prompt.get("prompt"), list(token_ids)
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(text, str):
            raise InvalidRequest('a prompt must be a text or {"prompt_token_ids": [...]}, '
                                 f"got {type(prompt).__name__}: {prompt!r:.80}")
        if self.tokenizer is None:
            raise InvalidRequest('this model has no tokenizer: give the prompt as {"prompt_token_ids": [...]}')
        return text, self._token_ids(text)

    def read_chat(self, messages: Messages) -> tuple[str, list[int]]:
        """A conversation in the model's chat template, and its token ids. Raises InvalidRequest for what is none."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template: use generate() with a plain prompt")
        for message in messages or [None]:
            if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise InvalidRequest(f"a conversation is a list of {MESSAGE_FORM}; got {message!r:.80}")
        text = self._apply_template(messages)
        return text, self._token_ids(text, add_special_tokens=False)

    def _apply_template(self, messages: Messages) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # some take no system message, or want roles in turn
            raise InvalidRequest(f"the model's chat template does not take this conversation: {error}") from error

    def _token_ids(self, text: str, **options: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the prompt is not valid Unicode text: {error}") from error
        return self.tokenizer(text, **options)["input_ids"]


class Client(ABC):
    """What `LLM` and `Cluster` share: prompts become requests, token events become text and outputs."""

    def __init__(self, tokenizer: Any | None, seed: int) -> None:
        self.tokenizer = tokenizer
        self._reader = PromptReader(tokenizer)
        self._outputs = OutputProcessor(tokenizer)
        self._streams: dict[str, Stream] = {}
        self._request_ids = count()
        self._random = random.Random(seed)

    # -------------------------------------------------------------------------------- one request at a time

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Queue one prompt, a text or {"prompt_token_ids": [...]}. Returns its stream at once.

        Raises InvalidRequest if it can't be served, and says why.
        """
        return self._submit(self._make_request(prompt, sampling_params or SamplingParams()))

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any) -> Iterator[TokenEvent]:
        """The answer's events as they are drawn. Leaving the loop early cancels the request. `options` are `submit`'s.

        Raises InvalidRequest if it can't be served, and says why.
        """
        return self._events_of(self.submit(prompt, sampling_params, **options))

    @staticmethod
    def _events_of(stream: Stream) -> Iterator[TokenEvent]:
        try:
            yield from stream
        finally:
            stream.close()

    def step(self) -> list[TokenEvent]:
        """Advance by one step. Returns the events of all requests; they also reach their streams."""
        with uninterrupted():  # but for the engine's own work, or what processes have said would be lost
            drawn = self._advance()
            events, stopped = self._outputs.process(drawn)
            for request_id, index in stopped:
                self._stop_answer(request_id, index)
            self._deliver(events)
        return events

    def cancel(self, request_id: str) -> None:
        """End a request wherever it is. No effect on one that has ended."""
        with uninterrupted():
            if request_id in self._outputs:
                events, _ = self._outputs.process(self._cancel(request_id))
                self._deliver(events)

    @property
    def has_work(self) -> bool:
        return bool(self._streams)

    def shutdown(self) -> None:
        """Cancel what is open and give the memory back."""
        for request_id in list(self._streams):
            self.cancel(request_id)
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    # ----------------------------------------------------------------------------------- many at a time

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched together. Outputs come in the prompts' order.

        Raises InvalidRequest if any of them can't be served; then none has been started.
        """
        prompt_list = prompts if isinstance(prompts, list) else [prompts]
        params = _one_for_each(sampling_params, len(prompt_list))
        requests = [self._make_request(prompt, p) for prompt, p in zip(prompt_list, params, strict=True)]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Messages | list[Messages],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of {"role": ..., "content": ...}, through the model's chat template."""
        if not messages:
            raise InvalidRequest(f"messages is empty: give at least one {MESSAGE_FORM}")
        if not isinstance(messages, list):
            raise InvalidRequest(f"messages must be a list of {MESSAGE_FORM}; got {messages!r:.80}")
        conversations = messages if isinstance(messages[0], list) else [messages]
        read = [self._reader.read_chat(conversation) for conversation in conversations]
        prompts: list[Prompt] = [{"prompt": text, "prompt_token_ids": token_ids} for text, token_ids in read]
        return self.generate(prompts, sampling_params, use_tqdm)

    def beam_search(self, prompts: Prompt | list[Prompt], params: BeamSearchParams,
                    use_tqdm: bool = True) -> list[RequestOutput]:
        """The `beam_width` best answers to each prompt, best first."""
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequest(f"params must be BeamSearchParams, got {type(params).__name__}: {params!r:.80}")
        prompt_list = prompts if isinstance(prompts, list) else [prompts]
        sampling = SamplingParams(temperature=0, max_tokens=params.max_tokens)
        return self._run([self._make_request(prompt, sampling, params) for prompt in prompt_list], use_tqdm)

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        for request in requests:
            self.limits.check(request)
        waiting, streams = deque(requests), list[Stream]()
        progress = _Progress(len(requests), enabled=use_tqdm)
        try:
            self._submit_first(waiting, streams)
            while waiting or not all(stream.finished for stream in streams):
                before = sum(stream.finished for stream in streams)
                events = self.step()
                progress.update(streams, sum(stream.finished for stream in streams) - before, events)
                self._submit_first(waiting, streams)
        finally:  # an interrupt must not leave requests behind, nor one whose stream it kept from being returned
            progress.close()
            for request in requests:
                self.cancel(request.request_id)
        return [stream.result() for stream in streams]

    def _submit_first(self, waiting: deque[Request], streams: list[Stream]) -> None:
        """As many as are let in now."""
        with suppress(Overloaded):
            while waiting:
                streams.append(self._submit(waiting[0]))
                waiting.popleft()

    # ---------------------------------------------------------------------------------------------- parts

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """What a request has to keep to."""

    @abstractmethod
    def _release(self) -> None: ...

    @abstractmethod
    def _start(self, request: Request, **options: Any) -> None:
        """Let a request in. `options` are those of `submit` that are not part of the request."""

    @abstractmethod
    def _advance(self) -> list[TokenEvent]: ...

    @abstractmethod
    def _cancel(self, request_id: str) -> list[TokenEvent]: ...

    @abstractmethod
    def _stop_answer(self, request_id: str, index: int) -> None: ...

    def _submit(self, request: Request, **options: Any) -> Stream:
        with uninterrupted():
            self._start(request, **options)
            self._outputs.add(request)
            stream = self._streams[request.request_id] = Stream(self, request.request_id)
        return stream

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            self._streams[event.request_id]._take(event)
        for request_id in dict.fromkeys(event.request_id for event in events):
            if self._outputs.is_finished(request_id):
                self._streams.pop(request_id)._output = self._outputs.pop(request_id)

    def _make_request(self, prompt: Prompt, sampling: SamplingParams, beam: BeamSearchParams | None = None,
                      timeout: float | None = None) -> Request:
        text, token_ids = self._reader.read(prompt)
        if not isinstance(sampling, SamplingParams):
            raise InvalidRequest(f"sampling_params must be SamplingParams, got {type(sampling).__name__}: {sampling!r:.80}")
        if sampling.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model has none: use stop_token_ids")
        seed = sampling.seed if sampling.seed is not None else self._random.getrandbits(64)
        request = Request(str(next(self._request_ids)), token_ids, sampling, text, beam, seed=seed)
        return request if timeout is None else replace(request, deadline=request.arrival_time + _seconds(timeout))


def _seconds(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise InvalidRequest(f"timeout must be a number of seconds above 0, or None, got {timeout!r}")
    return timeout


def _one_for_each(params: SamplingParams | list[SamplingParams] | None, number: int) -> list[SamplingParams]:
    if not isinstance(params, list):
        return [params or SamplingParams()] * number
    if len(params) != number:
        raise InvalidRequest(f"{number} prompts came with {len(params)} sampling params: give one for each, or one for all")
    return params


class _Progress:
    """A bar over requests, with the token rates as vLLM shows them."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._bar = None
        if enabled:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc="Processed prompts", dynamic_ncols=True,
                             postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s")
        self._start = time.perf_counter()
        self._num_input = self._num_output = 0
        self._counted: set[str] = set()

    def update(self, streams: list[Stream], num_finished: int, events: list[TokenEvent]) -> None:
        if self._bar is None:
            return
        self._num_output += sum(event.token_id is not None for event in events)
        for stream in streams:
            if stream.finished and stream.request_id not in self._counted:
                self._counted.add(stream.request_id)
                self._num_input += len(stream.result().prompt_token_ids)
        if num_finished:
            seconds = time.perf_counter() - self._start
            self._bar.set_postfix_str(f"est. speed input: {self._num_input / seconds:.2f} toks/s, "
                                      f"output: {self._num_output / seconds:.2f} toks/s")
            self._bar.update(num_finished)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
