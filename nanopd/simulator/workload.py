"""What requests come, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from nanopd.config import ConfigError

Lengths = Callable[[Random], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, in seconds from the start, and how long prompt and answer are, in tokens."""

    time: float
    prompt_len: int
    output_len: int


def poisson(rate: float, num_requests: int, lengths: Lengths, seed: int = 0) -> list[Arrival]:
    """`num_requests` requests, `rate` a second on average, at independent moments.

    `lengths(random)` draws (prompt_len, output_len) of one. Raises ConfigError for a rate or a number that is not above 0.
    """
    if not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"rate is a number of requests a second above 0, got {rate!r}")
    if num_requests < 1:
        raise ConfigError(f"num_requests must be at least 1, got {num_requests!r}")
    random, now, arrivals = Random(seed), 0.0, []
    for _ in range(num_requests):
        now += random.expovariate(rate)
        arrivals.append(Arrival(now, *lengths(random)))
    return arrivals


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
        if arrival.prompt_len + arrival.output_len > max_len:
            raise ConfigError(f"request {number} has {arrival.prompt_len} + {arrival.output_len} tokens, and a worker takes "
                              f"up to {max_len}: raise max_model_len, give the cache more blocks, or cut the request")
        before = arrival.time
    return arrivals
