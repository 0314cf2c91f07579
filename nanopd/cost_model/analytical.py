"""What a step, a prompt, an answer and a transfer take, and what they cost the others on the same worker.

One step of the engine is one pass over the model for all of its tokens, be they a prompt's or one of each answer. So a
step's time follows from what it holds (`StepWork`), and nothing is charged twice. A pass takes the longer of two times: a
floor that does not depend on the tokens (reading the weights, launching) and what the tokens compute. How sharply one
takes over from the other is measured too: on a CPU the two almost add up, on a GPU they run beside each other.
Reading the keys and values of the contexts comes on top, for attention waits for the layer before it.

Queueing is not here: the router knows what waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from nanopd.cost_model.checks import Checked, CostModelError

LINK_SHARPNESS = 3.0  # of transfers; not fitted, for there are few sizes


def attended_pairs(new_tokens: int, cached_tokens: int = 0) -> float:
    """(query, key) pairs of causal attention: new tokens see all cached ones, those before them, and themselves."""
    return new_tokens * (cached_tokens + (new_tokens + 1) / 2)


def soft_max(a: float, b: float, sharpness: float) -> float:
    """a + b with sharpness 1; with more it comes down to the larger of the two. Both at least 0, not both 0."""
    return (a**sharpness + b**sharpness) ** (1 / sharpness)


class Row(Protocol):
    """A row of a plan or of a step's record."""

    num_new: int
    num_cached: int


class StepWork(NamedTuple):
    """What a step holds, summed over its rows. Add up to put more into a step."""

    prompt_tokens: int = 0  # new ones, of rows with more than one
    pairs: float = 0.0  # (query, key) pairs of those rows
    decodes: int = 0  # rows of one token
    context_tokens: int = 0  # in all of them together, the new token included

    def __add__(self, other: StepWork) -> StepWork:  # type: ignore[override]  # a tuple's would append
        return StepWork(self.prompt_tokens + other.prompt_tokens, self.pairs + other.pairs,
                        self.decodes + other.decodes, self.context_tokens + other.context_tokens)

    @classmethod
    def chunk(cls, new_tokens: int, cached_tokens: int = 0) -> StepWork:
        """A part of a prompt, after so many that have been computed."""
        return cls(new_tokens, attended_pairs(new_tokens, cached_tokens))

    @classmethod
    def of(cls, rows: Iterable[Row]) -> StepWork:
        """A row of one new token is a decode also where it is the rest of a prompt: the arithmetic is the same."""
        prompt_tokens, pairs, decodes, context_tokens = 0, 0.0, 0, 0
        for row in rows:
            if row.num_new == 1:
                decodes += 1
                context_tokens += row.num_cached + 1
            else:
                prompt_tokens += row.num_new
                pairs += attended_pairs(row.num_new, row.num_cached)
        return cls(prompt_tokens, pairs, decodes, context_tokens)


NOTHING = StepWork()


# --------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameters(Checked):
    """Measured constants. Those that may be 0 can be too small to be seen."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"pair_seconds": 0, "context_token_seconds": 0, "latency_seconds": 0, "sharpness": 1}


@dataclass(frozen=True)
class PrefillCost(Parameters):
    """A step with tokens of prompts: linear in tokens, and quadratic by the pairs that attention looks at."""

    floor_seconds: float
    token_seconds: float
    pair_seconds: float
    sharpness: float

    def seconds(self, tokens: float, pairs: float) -> float:
        return soft_max(self.floor_seconds, tokens * self.token_seconds + pairs * self.pair_seconds, self.sharpness)


@dataclass(frozen=True)
class DecodeCost(Parameters):
    """A step of decodes alone: a roofline in the batch, and the contexts on top."""

    floor_seconds: float
    sequence_seconds: float
    context_token_seconds: float
    sharpness: float

    def seconds(self, decodes: float, context_tokens: float) -> float:
        """`context_tokens`: of all sequences together."""
        return (soft_max(self.floor_seconds, decodes * self.sequence_seconds, self.sharpness)
                + context_tokens * self.context_token_seconds)


@dataclass(frozen=True)
class MixedCost(Parameters):
    """A step with a prompt's tokens and decodes: one pass for all, in which each decode is a token too, and what the decodes
    add to it.

    Its pass is not that of a prompt alone: a worker that decodes has queued the step before the last one has ended, while a
    lone prompt waits for its launch.
    """

    AT_LEAST: ClassVar[Mapping[str, float]] = Parameters.AT_LEAST | {"sequence_seconds": 0}

    floor_seconds: float
    token_seconds: float
    pair_seconds: float
    sequence_seconds: float
    context_token_seconds: float
    sharpness: float

    def seconds(self, tokens: float, pairs: float, decodes: float, context_tokens: float) -> float:
        """`tokens`: of the pass, so of the prompt and one for each decode."""
        return (soft_max(self.floor_seconds, tokens * self.token_seconds + pairs * self.pair_seconds, self.sharpness)
                + decodes * self.sequence_seconds + context_tokens * self.context_token_seconds)

    @classmethod
    def on_top(cls, prefill: PrefillCost, sequence_seconds: float, context_token_seconds: float) -> MixedCost:
        """As a prompt alone, and so much more for each decode and its context."""
        return cls(prefill.floor_seconds, prefill.token_seconds, prefill.pair_seconds, sequence_seconds, context_token_seconds,
                   prefill.sharpness)

    @classmethod
    def assumed(cls, prefill: PrefillCost, decode: DecodeCost) -> MixedCost:
        """Where it was not measured: sequences and contexts take what they take in steps of decodes."""
        return cls.on_top(prefill, max(0.0, decode.sequence_seconds - prefill.token_seconds), decode.context_token_seconds)


@dataclass(frozen=True)
class TransferCost(Parameters):
    """Keys and values on their way from one device to another."""

    source: str  # device, such as "cuda:0"
    destination: str
    transport: str
    latency_seconds: float
    bytes_per_second: float

    def seconds(self, num_bytes: float) -> float:
        """What a send takes at least, or what its bytes do: most of the one passes while the other does."""
        return soft_max(self.latency_seconds, num_bytes / self.bytes_per_second, LINK_SHARPNESS)

    def exposed_seconds(self, num_bytes: float, computing_seconds: float, pieces: int) -> float:
        """From the end of computing until all has arrived, where each of `pieces` equal parts leaves once it is computed.

        Either the link keeps up, and the last piece alone is left, or it is busy from the first piece on. What a send takes at
        least is added whole: how much of it passes while other pieces move was not measured.
        """
        moving = num_bytes / self.bytes_per_second
        last, behind = moving / pieces, moving - computing_seconds * (1 - 1 / pieces)
        return self.latency_seconds + (last if last > behind else behind)


# ------------------------------------------------------------------------------------------------- the model


class RequestCost(NamedTuple):
    """What a request takes on a worker, and by how much it holds up each sequence that decodes there; seconds over its
    whole stay."""

    prefill_seconds: float
    decode_seconds: float
    delay_by_prefill_seconds: float
    delay_by_decode_seconds: float


@dataclass(frozen=True)
class Shape(Checked):
    """What a transfer depends on of the model."""

    num_layers: int
    kv_bytes_per_token: int  # over all layers


@dataclass(frozen=True)
class CostModel:
    """A model on a kind of device. All times in seconds. `message_seconds`: from the central scheduler until a worker that has
    nothing to do begins a step."""

    prefill: PrefillCost
    decode: DecodeCost
    mixed: MixedCost
    transfers: tuple[TransferCost, ...]
    shape: Shape
    message_seconds: float = 0.0

    def step_seconds(self, work: StepWork) -> float:
        """One step. More work never takes less time, but for decodes beside a prompt: it does not wait for its launch then."""
        return self._step_seconds(work.prompt_tokens, work.pairs, work.decodes, work.context_tokens)

    def _step_seconds(self, prompt_tokens: float, pairs: float, decodes: float, context_tokens: float) -> float:
        if not prompt_tokens:
            return self.decode.seconds(decodes, context_tokens) if decodes else 0.0
        if not decodes:
            return self.prefill.seconds(prompt_tokens, pairs)
        return self.beside_seconds(prompt_tokens, pairs, decodes, context_tokens, self.decode.seconds(decodes, context_tokens))

    def beside_seconds(self, prompt_tokens: float, pairs: float, decodes: float, context_tokens: float, alone: float) -> float:
        """One step with a prompt's tokens and decodes, where it is known what these take alone."""
        seconds = self.mixed.seconds(prompt_tokens + decodes, pairs, decodes, context_tokens)
        return seconds if seconds > alone else alone  # what is fitted to few rows may say that a prompt speeds decodes up

    def request(self, new_tokens: int, cached_tokens: int, output_tokens: float, running: StepWork = NOTHING,
                chunk_tokens: int | None = None) -> RequestCost:
        """A request beside what is running, the queue before it left out.

        Args:
            new_tokens: of its prompt that are to be computed here; 0 where another worker does that.
            cached_tokens: of its prompt that are there.
            output_tokens: steps that it decodes, so one less than its answer has: the prompt's last step gives the first.
            running: the steps of the worker without it, as a rule its decodes. Their contexts are taken to stay as they
                are: where some grow, others end.
            chunk_tokens: of its prompt in a step at most; None: all.
        """
        alone = self.step_seconds(running)
        prefill, steps = 0.0, 0
        for count, chunk, pairs in chunks(new_tokens, cached_tokens, chunk_tokens):
            steps += count
            prefill += count * self._step_seconds(running.prompt_tokens + chunk, running.pairs + pairs,
                                                  running.decodes, running.context_tokens)
        # A step's time is linear in the context, so that the mean context gives the mean step.
        context = new_tokens + cached_tokens + (output_tokens + 1) / 2
        decode = output_tokens * self._step_seconds(running.prompt_tokens, running.pairs, running.decodes + 1,
                                                    running.context_tokens + context)
        if not running.decodes:
            return RequestCost(prefill, decode, 0.0, 0.0)
        return RequestCost(prefill, decode, prefill - steps * alone, decode - output_tokens * alone)

    def transfer(self, source: str, destination: str, transport: str | None = None) -> TransferCost:
        """The transfers' constants between two devices. A pair that was not measured is taken to be as slow as the
        slowest that was by the same transport. `transport` None: the quickest.

        Raises:
            CostModelError: nothing was measured for this transport.
        """
        fitting = [each for each in self.transfers if transport in (None, each.transport)]
        if not fitting:
            there = ", ".join(sorted({each.transport for each in self.transfers})) or "none"
            raise CostModelError(f"no transfers{f' by {transport!r}' if transport else ''} were measured; measured: {there}")
        of_pair = [each for each in fitting if (each.source, each.destination) == (source, destination)]
        if of_pair:
            return max(of_pair, key=lambda each: each.bytes_per_second)
        slowest: dict[str, TransferCost] = {}
        for each in fitting:
            if each.transport not in slowest or each.bytes_per_second < slowest[each.transport].bytes_per_second:
                slowest[each.transport] = each
        return max(slowest.values(), key=lambda each: each.bytes_per_second)

    def transfer_seconds(self, link: TransferCost, num_tokens: int, prefill_seconds: float, num_chunks: int = 1) -> float:
        """How long after its prefill a prompt's KV has arrived, layer by layer behind the computing."""
        return link.exposed_seconds(num_tokens * self.shape.kv_bytes_per_token, prefill_seconds,
                                    num_chunks * self.shape.num_layers)


def chunks(new_tokens: int, cached_tokens: int = 0, chunk_tokens: int | None = None) -> list[tuple[int, int, float]]:
    """The steps of a prompt as (how many, tokens, pairs): the full ones, with the mean of their pairs, and the last."""
    if not new_tokens:
        return []
    size = min(chunk_tokens or new_tokens, new_tokens)
    full, rest = divmod(new_tokens, size)
    parts = [(full, size, attended_pairs(full * size, cached_tokens) / full)]
    if rest:
        parts.append((1, rest, attended_pairs(rest, cached_tokens + full * size)))
    return parts
