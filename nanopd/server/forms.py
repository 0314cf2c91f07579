"""Answers as OpenAI's clients expect them: whole, and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nanopd.core import CompletionOutput, RequestOutput, TokenEvent

Json = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A token and the likeliest ones in its place, as (token id, logprob), likeliest first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Form(ABC):
    """Of one request's answers. Choices are numbered through its prompts, `n` for each.

    Args:
        logprobs: how many alternatives are wanted for each token; None: not even its own logprob.
    """

    kind: str  # "object" of a whole answer
    chunk_kind: str
    id_prefix: str

    def __init__(self, model: str, tokenizer: Any, n: int, logprobs: int | None) -> None:
        self.tokenizer = tokenizer
        self.n = n
        self.logprobs = logprobs
        self._head = {"id": self.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, outputs: list[RequestOutput]) -> Json:
        """The answer to a client that does not want it in chunks."""
        choices = [self._choice(position * self.n + answer.index, answer)
                   for position, output in enumerate(outputs) for answer in output.outputs]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage(outputs)}

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    @abstractmethod
    def opening(self, num_prompts: int) -> list[Json]:
        """What comes before all tokens, as choices."""

    def news(self, events: Iterable[tuple[int, TokenEvent]]) -> list[Json]:
        """Choices of a chunk for new events, (position of the prompt, event): one for each answer that they are of."""
        by_choice: defaultdict[int, list[TokenEvent]] = defaultdict(list)
        for position, event in events:
            by_choice[position * self.n + event.index].append(event)
        return [self._delta(index, its) for index, its in by_choice.items()]

    @abstractmethod
    def _choice(self, index: int, answer: CompletionOutput) -> Json: ...

    @abstractmethod
    def _content(self, index: int, text: str) -> Json:
        """A choice of a chunk."""

    @abstractmethod
    def _logprobs(self, index: int, drawn: list[Drawn]) -> Json: ...

    def _delta(self, index: int, events: list[TokenEvent]) -> Json:
        """Its text may be empty: a token can be half a character, or the beginning of a stop string. But clients may count."""
        text, reason = "".join(event.text for event in events), events[-1].finish_reason
        choice = {**self._content(index, text), "logprobs": None, "finish_reason": reason and str(reason)}
        if self.logprobs is not None:
            choice["logprobs"] = self._logprobs(index, [
                Drawn(event.token_id, event.logprob, event.top_logprobs or []) for event in events if event.token_id is not None])
        return choice

    def _whole_logprobs(self, index: int, answer: CompletionOutput) -> Json | None:
        if answer.logprobs is None:
            return None
        return self._logprobs(index, [
            Drawn(token_id, entry[token_id], sorted(entry.items(), key=lambda item: -item[1]))
            for token_id, entry in zip(answer.token_ids, answer.logprobs, strict=True)])

    def _text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id]) if self.tokenizer else str(token_id)


class CompletionForm(Form):
    """Args:
        echo: the prompts' texts, where they are to come before the answers.
    """

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, model: str, tokenizer: Any, n: int, logprobs: int | None, echo: list[str] | None = None) -> None:
        super().__init__(model, tokenizer, n, logprobs)
        self._echo = echo
        self._offsets: defaultdict[int, int] = defaultdict(int)  # by choice: characters of the tokens so far

    def opening(self, num_prompts: int) -> list[Json]:
        if self._echo is None:
            return []
        return [{**self._content(index, self._echo[index // self.n]), "logprobs": None, "finish_reason": None}
                for index in range(num_prompts * self.n)]

    def _choice(self, index: int, answer: CompletionOutput) -> Json:
        before = "" if self._echo is None else self._echo[index // self.n]
        return {"index": index, "text": before + answer.text, "logprobs": self._whole_logprobs(index, answer),
                "finish_reason": str(answer.finish_reason)}

    def _content(self, index: int, text: str) -> Json:
        return {"index": index, "text": text}

    def _logprobs(self, index: int, drawn: list[Drawn]) -> Json:
        tokens = [self._text(one.token_id) for one in drawn]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        tops = [{self._text(token_id): logprob for token_id, logprob in one.top} for one in drawn] if self.logprobs else None
        return {"tokens": tokens, "token_logprobs": [one.logprob for one in drawn], "top_logprobs": tops, "text_offset": offsets}


class ChatForm(Form):
    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def opening(self, num_prompts: int) -> list[Json]:
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                for index in range(num_prompts * self.n)]

    def _choice(self, index: int, answer: CompletionOutput) -> Json:
        return {"index": index, "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._whole_logprobs(index, answer), "finish_reason": str(answer.finish_reason)}

    def _content(self, index: int, text: str) -> Json:
        return {"index": index, "delta": {"content": text}}

    def _logprobs(self, index: int, drawn: list[Drawn]) -> Json:
        return {"content": [{**self._token(one.token_id, one.logprob),
                             "top_logprobs": [self._token(*other) for other in one.top[: self.logprobs]]} for one in drawn],
                "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        text = self._text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(outputs: Iterable[RequestOutput]) -> Json:
    prompt = answer = 0
    for output in outputs:
        prompt += len(output.prompt_token_ids)
        answer += sum(len(one.token_ids) for one in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
