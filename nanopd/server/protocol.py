"""What clients may ask, in the fields of OpenAI's API and, where it has none, of vLLM's.

A field that OpenAI knows and that could not change an answer here is ignored (IGNORED). One that would change it is refused
unless it holds what comes to the same as leaving it out (NEUTRAL). Any other is refused as unknown, as OpenAI does.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nanopd.client import Messages, Prompt
from nanopd.core import SamplingParams
from nanopd.server.errors import ApiError, invalid

MOST_PROMPTS = 128  # in one request
MOST_STOPS, LONGEST_STOP = 16, 256

IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],),
    "logit_bias": ({},), "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (),
    "presence_penalty": (0,), "reasoning_effort": ("none",), "response_format": ({"type": "text"},), "suffix": ("",),
    "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": (), "web_search_options": (),
}

Whole = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI pads its chunks; here nothing is padded


class Ask(BaseModel):
    """What both kinds of request have in common. None stands for the default of `SamplingParams`."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    n: Whole | None = None
    temperature: Annotated[float, Field(le=1e6)] | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Seed | None = None
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Whole], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @classmethod
    def parse(cls, body: object) -> Ask:
        """Raises ApiError for what is not served, and says why."""
        if not isinstance(body, dict):
            raise invalid(f"the body must be a JSON object such as {{{cls.example()}}}; got {type(body).__name__}")
        try:
            ask = cls.model_validate(body)
        except ValidationError as error:
            raise _said_kindly(error) from None
        ask._check_more_fields()
        if ask.stream_options is not None and not ask.stream:
            raise invalid("stream_options go with \"stream\": true only", "stream_options")
        return ask

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def logprobs_wanted(self) -> int | None:
        """How many alternatives to report for each token; None: not even the token's own logprob."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> str:
        raise NotImplementedError

    def sampling(self) -> SamplingParams:
        """Raises InvalidRequest for a value that is out of its range."""
        names = ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stop_token_ids",
                 "ignore_eos", "min_tokens")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(**given, **self._max_tokens(), logprobs=self.logprobs_wanted)

    def _max_tokens(self) -> dict[str, int | None]:
        return {} if self.max_tokens is None else {"max_tokens": self.max_tokens}

    def _check_more_fields(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name not in NEUTRAL:
                raise ApiError(400, f"unknown field {name!r:.80}: known are {', '.join(sorted(type(self).model_fields))}",
                               param=name[:80], code="unknown_parameter")
            if value not in NEUTRAL[name]:
                raise ApiError(400, f"{name} is not supported here: leave it out", param=name, code="unsupported_parameter")


class CompletionAsk(Ask):
    """POST /v1/completions"""

    prompt: Any
    echo: bool | None = None
    logprobs: Whole | None = None

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs

    @classmethod
    def example(cls) -> str:
        return '"prompt": "..."'

    def prompts(self) -> list[Prompt]:
        """One text, several, the token ids of one, or those of several. Raises ApiError for anything else."""
        if self.echo and self.logprobs is not None:
            raise invalid("echo with logprobs is not supported: there are no logprobs of prompts", "echo")
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(type(item) is int for item in prompt):
                return [{"prompt_token_ids": prompt}]
            if len(prompt) > MOST_PROMPTS:
                raise invalid(f"{len(prompt)} prompts in one request; {MOST_PROMPTS} are the most", "prompt")
            if all(isinstance(item, str) for item in prompt):
                return list(prompt)
            if all(isinstance(item, list) for item in prompt):
                return [{"prompt_token_ids": item} for item in prompt]
        raise invalid("prompt must be a text, a list of texts, a list of token ids or a list of such lists, none of them "
                      f"empty; got {prompt!r:.80}", "prompt")


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """Of a conversation. `name` and such are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str | list[ContentPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it. Raises ApiError for what is not text."""
        if isinstance(self.content, str):
            text = self.content
        else:
            other = [part.type for part in self.content if part.type != "text" or part.text is None]
            if other:
                raise invalid(f"only text is understood; a message has a part of type {other[0]!r:.80}", "messages")
            text = "".join(part.text or "" for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsk(Ask):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @classmethod
    def example(cls) -> str:
        return '"messages": [{"role": "user", "content": "..."}]'

    def conversation(self) -> Messages:
        """Raises ApiError where it is none."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs goes with \"logprobs\": true only", "top_logprobs")
        if not self.messages:
            raise invalid(f"messages is empty: give at least one, as in {self.example()}", "messages")
        return [message.plain() for message in self.messages]

    def _max_tokens(self) -> dict[str, int | None]:
        """Where nothing is said an answer may go on to the end of the context, as at OpenAI."""
        return {"max_tokens": self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens}


def _said_kindly(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    got = "" if first["type"] == "missing" else f"; got {first['input']!r:.80}"
    return invalid(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}{got}", str(first["loc"][0]) if first["loc"] else None)
