"""What requests come, and when."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from nanopd.config import ConfigError
from nanopd.simulator.cost_runner import END, TOKEN

Lengths = Callable[[Random], tuple[int, int]]

PIECE = 512  # tokens for which a name in a prefix stands
FIRST_NAME = END + 1  # a token; those from here on are names of pieces (even) and of requests (odd)
PROMPTS = {"short": ((64, 256),), "long": ((1024, 2048),), "mixed": ((64, 256), (1024, 2048))}  # tokens, from and to


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, in seconds from the start, and how long prompt and answer are, in tokens.

    `output_len` is where the answer ends by itself. Nobody but the simulation knows it; all that the cluster sees is
    `max_tokens`, where the answer is cut (None: the room that is left). Prompts whose `prefix` begins with the same names
    begin with the same tokens, PIECE for each name.
    """

    time: float
    prompt_len: int
    output_len: int
    max_tokens: int | None = None
    prefix: tuple[int, ...] = ()

    def prompt(self, number: int) -> list[int]:
        """Its tokens: those of the prefix, and for the rest some that no prompt of another number has."""
        token_ids: list[int] = []
        for name in self.prefix[: -(-self.prompt_len // PIECE)]:
            token_ids += [FIRST_NAME + 2 * name] * PIECE
        if len(token_ids) < self.prompt_len:
            token_ids.append(FIRST_NAME + 2 * number + 1)
        return token_ids[: self.prompt_len] + [TOKEN] * (self.prompt_len - len(token_ids))


def poisson(rate: float, num_requests: int, lengths: Lengths, seed: int = 0) -> list[Arrival]:
    """`num_requests` requests, `rate` a second on average, at independent moments.

    `lengths(random)` draws (prompt_len, output_len) of one. Raises ConfigError for a rate or a number that is not above 0.
    """
    if num_requests < 1:
        raise ConfigError(f"num_requests must be at least 1, got {num_requests!r}")
    return list(islice(poisson_forever(rate, lengths, seed), num_requests))


def poisson_forever(rate: float, lengths: Lengths, seed: int = 0, burstiness: float = 1.0) -> Iterator[Arrival]:
    """Requests without end, `rate` a second on average. `burstiness` is the shape of the Gamma distribution of the gaps
    between them: 1 for independent moments (Poisson), less for bursts, more for even gaps.

    Raises ConfigError, at once, for a rate or a burstiness that is not above 0.
    """
    for name, value in (("rate is a number of requests a second", rate), ("burstiness is a number", burstiness)):
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} above 0, got {value!r}")
    return _arrivals(rate, lengths, Random(seed), burstiness)


def _arrivals(rate: float, lengths: Lengths, random: Random, burstiness: float) -> Iterator[Arrival]:
    now = 0.0
    while True:
        now += random.expovariate(rate) if burstiness == 1 else random.gammavariate(burstiness, 1 / (burstiness * rate))
        yield Arrival(now, *lengths(random))


def lengths(prompts: str = "mixed", outputs: str = "128") -> Lengths:
    """How long prompts and answers are: a number of tokens, or "64-256", of which all are equally likely. A prompt may also
    be "short", "long", or "mixed", of which half are short and half long.

    Raises ConfigError where a text is none of these.
    """
    kinds = PROMPTS.get(prompts) or (_span("prompts", prompts, *PROMPTS),)
    answer = _span("outputs", outputs)
    return lambda random: (random.randint(*random.choice(kinds)), random.randint(*answer))


def _span(name: str, text: str, *words: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ConfigError(f"{name} is {', '.join([*words, 'a number of tokens'])} or a span of them such as 64-256, got {text!r}")
    return low, high


def checked(workload: Iterable[Arrival], max_len: int) -> list[Arrival]:
    """The workload as a list. Raises ConfigError where it can't be run, saying which request is the matter."""
    arrivals = list(workload)
    if not arrivals:
        raise ConfigError("the workload is empty: give at least one request")
    before = 0.0
    for number, arrival in enumerate(arrivals):
        if not (arrival.time >= before and math.isfinite(arrival.time)):
            raise ConfigError(f"request {number} arrives at {arrival.time} s, the one before it at {before} s: times are "
                              "seconds from 0 on, in order; sort the workload by time")
        if arrival.prompt_len < 1 or arrival.output_len < 1:
            raise ConfigError(f"request {number} has a prompt of {arrival.prompt_len} and an answer of "
                              f"{arrival.output_len} tokens: both must have at least one")
        if arrival.max_tokens is not None and arrival.max_tokens < 1:
            raise ConfigError(f"request {number} allows an answer of {arrival.max_tokens} tokens: it must allow at least one")
        output_len = min(arrival.output_len, arrival.max_tokens or max_len)
        if arrival.prompt_len + output_len > max_len:
            raise ConfigError(f"request {number} has {arrival.prompt_len} + {output_len} tokens, and a worker takes "
                              f"up to {max_len}: raise max_model_len, give the cache more blocks, or cut the request")
        before = arrival.time
    return arrivals
