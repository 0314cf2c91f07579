"""The nouns every other module speaks: requests, sequences, plans and events. Pure Python, no torch.

One arithmetic serves both phases. A sequence knows its tokens and how many of them already have their
keys and values in the cache (`num_computed`). What is left to run is the difference: many tokens while the
prompt is being read (prefill), exactly one while tokens are being written (decode).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import NamedTuple


class InvalidRequest(ValueError):
    """The request can't be served as asked. The message says what was wrong and what is allowed."""


class Overloaded(RuntimeError):
    """As many requests are open as may be. The message says how many; the same request may be let in a little later."""


# ------------------------------------------------------------------------------------------------ sampling


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names and defaults follow vLLM's.

    Raises:
        InvalidRequest: a value is out of its range, or two options contradict each other.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] | str | None = ()
    stop_token_ids: tuple[int, ...] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the context limit
    min_tokens: int = 0
    logprobs: int | None = None  # how many alternatives to report for each token

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        if self.top_k == -1:  # vLLM's older spelling of "all tokens"
            object.__setattr__(self, "top_k", 0)
        self._check_ranges()
        self._check_contradictions()

    def _check_ranges(self) -> None:
        _require(_is_int(self.n) and self.n >= 1, f"n must be an integer of at least 1, got {self.n!r}")
        _require(_is_number(self.temperature) and self.temperature >= 0,
                 f"temperature must be a number >= 0 (0 means greedy), got {self.temperature!r}")
        _require(_is_int(self.top_k) and self.top_k >= 0, f"top_k must be an integer >= 0 (0 means all), got {self.top_k!r}")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p!r}")
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p!r}")
        _require(_is_number(self.repetition_penalty) and self.repetition_penalty > 0,
                 f"repetition_penalty must be > 0 (1 means none), got {self.repetition_penalty!r}")
        _require(self.seed is None or _is_int(self.seed), f"seed must be an integer or None, got {self.seed!r}")
        _require(all(isinstance(text, str) and text for text in self.stop),
                 f"stop must hold non-empty strings, got {self.stop!r}")
        _require(all(_is_int(token) and token >= 0 for token in self.stop_token_ids),
                 f"stop_token_ids must be integers >= 0, got {self.stop_token_ids!r}")
        _require(self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
                 f"max_tokens must be an integer of at least 1, or None for the context limit, got {self.max_tokens!r}")
        _require(_is_int(self.min_tokens) and self.min_tokens >= 0,
                 f"min_tokens must be an integer >= 0, got {self.min_tokens!r}")
        _require(self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= 64),
                 f"logprobs must be an integer from 0 to 64, or None, got {self.logprobs!r}")

    def _check_contradictions(self) -> None:
        _require(self.max_tokens is None or self.min_tokens <= self.max_tokens,
                 f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        _require(self.temperature > 0 or self.n == 1,
                 "n > 1 with temperature 0 would give the same answer n times: raise the temperature, "
                 "set n=1, or use beam search")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search: keep the `beam_width` likeliest continuations, score them by
    cumulative_logprob / length ** length_penalty.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.beam_width) and 1 <= self.beam_width <= 64,
                 f"beam_width must be an integer from 1 to 64, got {self.beam_width!r}")
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1,
                 f"max_tokens must be an integer of at least 1, got {self.max_tokens!r}")
        _require(_is_number(self.length_penalty) and abs(self.length_penalty) <= 10,
                 f"length_penalty must be a number from -10 to 10, got {self.length_penalty!r}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequest(message)


def _as_tuple(name: str, value: object) -> tuple:
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    _require(isinstance(value, Iterable), f"{name} must be a list, got {value!r}")
    return tuple(value)  # type: ignore[arg-type]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------ sequences


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # queued: holds no blocks (fresh, or preempted and to be recomputed)
    PREFILL = "prefill"  # holds blocks; more than one of its tokens still has to be run
    DECODE = "decode"  # holds blocks; one token a step
    TRANSFER = "transfer"  # its prompt is computed and its KV is on the way to another worker
    FINISHED = "finished"


FINISHED = Phase.FINISHED  # asked for very often, and an enum's names are slow to look up

LEGAL_TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.PREFILL, Phase.DECODE, Phase.FINISHED}),
    Phase.PREFILL: frozenset({Phase.DECODE, Phase.TRANSFER, Phase.WAITING, Phase.FINISHED}),
    Phase.DECODE: frozenset({Phase.WAITING, Phase.FINISHED}),
    Phase.TRANSFER: frozenset({Phase.FINISHED}),
    Phase.FINISHED: frozenset(),
}


class FinishReason(str, Enum):
    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"  # cancelled
    ERROR = "error"  # something broke; the event's `error` says what

    def __str__(self) -> str:
        return self.value


_sequence_ids = count()


class Sequence:
    """One stream of tokens: a prompt and what has been written after it.

    `num_computed` counts the leading tokens whose keys and values are in the cache.
    """

    def __init__(self, prompt_token_ids: SequenceABC[int], *, request_id: str = "", index: int = 0) -> None:
        self.seq_id = next(_sequence_ids)
        self.request_id = request_id
        self.index = index  # which of the request's n answers
        self.token_ids: list[int] = list(prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.num_computed = 0
        self.max_len = sys.maxsize  # tokens it may have, prompt and answer: for the scheduler to say
        self.phase = Phase.WAITING
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[float] = []  # one for each output token

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return (f"Sequence({self.seq_id}, {self.phase.value}, prompt={self.prompt_len}, "
                f"output={self.num_output}, computed={self.num_computed})")

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_remaining(self) -> int:
        """Tokens known but not yet run through the model."""
        return len(self.token_ids) - self.num_computed

    @property
    def finished(self) -> bool:
        return self.phase is FINISHED

    @property
    def cumulative_logprob(self) -> float:
        return sum(self.logprobs)

    @property
    def awaits_token(self) -> bool:
        """Whether the last token is still being drawn by a step that runs."""
        return self.token_ids[-1] < 0

    def await_token(self, draw: int) -> None:
        """Make room for the token that the running step draws as its `draw`-th. Until it is known a negative number
        stands for it: -1 - draw."""
        self.token_ids.append(-1 - draw)

    def append_token(self, token_id: int, logprob: float = 0.0) -> None:
        if self.token_ids[-1] < 0:
            self.token_ids[-1] = token_id
        else:
            self.token_ids.append(token_id)
        self.logprobs.append(logprob)

    def forget_awaited(self) -> None:
        """The running step's token will not come."""
        if self.awaits_token:
            self.token_ids.pop()

    def move_to(self, phase: Phase) -> None:
        """Enter `phase`. Raises RuntimeError for a step that LEGAL_TRANSITIONS does not know."""
        if phase is self.phase:
            return
        if phase not in LEGAL_TRANSITIONS[self.phase]:
            raise RuntimeError(f"sequence {self.seq_id} can't go from {self.phase.value} to {phase.value}")
        self.phase = phase

    def finish(self, reason: FinishReason) -> None:
        self.move_to(Phase.FINISHED)
        self.finish_reason = reason

    def fork(self, index: int) -> Sequence:
        """A second sequence with the same tokens and the same computed prefix; its blocks are the manager's affair."""
        child = Sequence(self.token_ids, request_id=self.request_id, index=index)
        child.prompt_len = self.prompt_len
        child.num_computed = self.num_computed
        child.max_len = self.max_len
        child.phase = self.phase
        child.logprobs = list(self.logprobs)
        return child


# ------------------------------------------------------------------------------------------------- requests


@dataclass
class Request:
    """What a client asked for, once tokenized. Sent between workers as it is."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    beam: BeamSearchParams | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    seed: int = 0  # the request's own random seed, drawn at submission where the client gave none
    deadline: float | None = None  # seconds, monotonic clock: a cluster gives the request up then

    @property
    def num_answers(self) -> int:
        return self.beam.beam_width if self.beam else self.sampling.n

    @property
    def max_tokens(self) -> int | None:
        return self.beam.max_tokens if self.beam else self.sampling.max_tokens


class SequenceGroup:
    """A request being served: the sequences that answer it. They share the prompt's blocks by fork.

    With `handoff` the group ends its stay on this worker at its first token: its blocks are kept until the
    KV cache has travelled to the worker that decodes.
    """

    def __init__(self, request: Request, *, handoff: bool = False) -> None:
        self.request = request
        self.handoff = handoff
        self.sequences = [Sequence(request.prompt_token_ids, request_id=request.request_id)]

    @classmethod
    def resume(cls, request: Request, written: list[tuple[int, list[int], list[float]]]) -> SequenceGroup:
        """A request that was begun elsewhere. `written`: (answer, its token ids, their logprobs) of each answer that
        goes on."""
        group = cls(request)
        group.sequences = []
        for index, token_ids, logprobs in written:
            sequence = Sequence(request.prompt_token_ids, request_id=request.request_id, index=index)
            sequence.token_ids += token_ids
            sequence.logprobs += logprobs
            group.sequences.append(sequence)
        return group

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def live(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.finished]

    @property
    def finished(self) -> bool:
        return not self.live

    @property
    def is_whole(self) -> bool:
        """True until the prompt has been read: several answers are still one sequence."""
        return self.request.num_answers > 1 and self.sequences[0].num_output == 0 and len(self.sequences) == 1

    @property
    def open_answers(self) -> list[int]:
        """Which of the request's answers have not ended, also those that have not begun."""
        ended = set() if self.request.beam else {sequence.index for sequence in self.sequences if sequence.finished}
        return [index for index in range(self.request.num_answers) if index not in ended]


# --------------------------------------------------------------------------------------------- plans, events


@dataclass(slots=True)
class PlanRow:
    """One sequence's share of a step: run `num_new` tokens after the `num_cached` already in the cache.

    `num_samples` tokens are drawn after the last of them: 0 for a chunk that is not the prompt's last, n for
    the prompt's last chunk of a request that wants n answers, otherwise 1. `num_top` of the likeliest tokens
    are reported beside them. The last `num_drafts` of the new tokens are guesses: then one token is drawn after each
    of them and one before the first, num_drafts + 1 in all, to tell which guesses were right. `sequence` is then a fork
    of the one that is answered, with the guesses as its last tokens.
    """

    sequence: Sequence
    request: Request
    num_new: int
    num_cached: int
    block_table: list[int]  # the sequence's own, not a copy: to be read before the next step is planned
    copies: list[tuple[int, int]] = field(default_factory=list)  # copy-on-write (source, destination)
    num_samples: int = 0
    num_top: int = 0
    num_drafts: int = 0
    num_accepted: int = 0  # of the drafts, known when the step is over

    @property
    def num_logits(self) -> int:
        """After how many of its tokens the row draws."""
        return self.num_drafts + 1 if self.num_samples else 0

    @property
    def num_draws(self) -> int:
        return self.num_drafts + self.num_samples

    @property
    def kind(self) -> str:
        """ "prefill" while the row reads a prompt, or recomputes a preempted sequence; else "decode"."""
        reads_prompt = self.num_cached < self.sequence.prompt_len
        return "prefill" if reads_prompt or self.num_new > 1 + self.num_drafts else "decode"

    @property
    def token_ids(self) -> list[int]:
        """The row's new tokens. -1 - i stands for the i-th token that the step before draws, where that still runs."""
        return self.sequence.token_ids[self.num_cached : self.num_cached + self.num_new]


@dataclass
class StepPlan:
    """What one step of the engine does: varlen rows, prefill chunks and decodes alike.

    The copies of all rows are carried out before any row writes, as if every source were read before any
    destination is written.
    """

    rows: list[PlanRow] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)  # request ids sent back to wait while planning
    run_ahead: bool = False  # the next step was planned on top of this one before its result was known

    @property
    def copies(self) -> list[tuple[int, int]]:
        return [pair for row in self.rows for pair in row.copies]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_new for row in self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)


@dataclass
class RowResult:
    """What a row drew: token ids, their log-probabilities, and the likeliest alternatives where asked for.

    `top_logprobs` holds (token id, logprob) pairs, likeliest first. For a beam they are its candidates.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)
    error: str | None = None  # the row could not be sampled, and why


@dataclass
class StepResult:
    """One RowResult per row of the plan, in its order. `duration` in seconds (virtual under a cost runner)."""

    rows: list[RowResult]
    duration: float = 0.0


@dataclass
class TokenEvent:
    """One step of one answer, as the client sees it. The last event of an answer has a `finish_reason`."""

    request_id: str
    index: int = 0
    token_id: int | None = None  # None: nothing new, only the end
    text: str = ""
    logprob: float = 0.0
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it
    error: str | None = None
    time: float = field(default_factory=time.monotonic)


class RowRecord(NamedTuple):
    """A row of a step that has run, as the batch timeline shows it."""

    request_id: str
    index: int
    kind: str  # "prefill" or "decode"
    num_new: int
    num_cached: int


@dataclass(frozen=True)
class TransferRecord:
    """A prompt's KV that has travelled to another worker. Times in seconds, monotonic clock."""

    request_id: str
    destination: str  # worker id
    transport: str
    num_tokens: int  # sent; less than the prompt has where the destination held the rest
    num_bytes: int
    start: float  # when the first blocks were handed to the transport
    computed: float  # when the prompt's last step had ended
    end: float  # when all had arrived


@dataclass(frozen=True)
class StepRecord:
    """A step that has run. `start` on the monotonic clock, `duration`, both in seconds."""

    step: int
    start: float
    rows: tuple[RowRecord, ...]
    preempted: tuple[str, ...]
    num_waiting: int
    num_free_blocks: int
    num_copies: int
    duration: float
    num_drafts: int = 0  # tokens guessed beforehand
    num_accepted: int = 0  # those of them that the model would have drawn


@dataclass
class RequestMetrics:
    """Times on the monotonic clock, in seconds. TTFT and TPOT in seconds too."""

    arrival_time: float
    first_token_time: float | None = None
    finish_time: float | None = None

    @property
    def ttft(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    def tpot(self, num_tokens: int) -> float | None:
        """Mean time per output token after the first."""
        if num_tokens < 2 or self.first_token_time is None or self.finish_time is None:
            return None
        return (self.finish_time - self.first_token_time) / (num_tokens - 1)


@dataclass
class CompletionOutput:
    """One answer. `logprobs[t]` maps token id to log-probability at position t, where asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """A request with all its answers so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    error: str | None = None

    @property
    def finished(self) -> bool:
        return bool(self.outputs) and all(output.finish_reason is not None for output in self.outputs)
