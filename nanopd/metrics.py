"""What clients felt of many requests, in a few numbers. The same for a simulation as for a measurement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanopd.config import SLO


class Outcome(Protocol):
    """A request that was served. Times in seconds."""

    arrival: float
    ttft: float
    tpot: float | None  # None for an answer of one token
    e2e: float
    num_tokens: int  # of its answer
    mode: str  # the pipeline that it went through


@dataclass(frozen=True)
class Quantiles:
    """In seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        return cls(*(quantile(values, share) for share in (0.5, 0.9, 0.99)))


@dataclass(frozen=True)
class Summary:
    """`attainment` is the share of the requests that met the SLO, and `goodput` how many of those there were a second; both
    None where none is set."""

    num_requests: int
    seconds: float  # from the first arrival to the last token
    requests_per_second: float
    tokens_per_second: float  # of answers
    ttft: Quantiles
    tpot: Quantiles | None  # None where no answer has two tokens
    e2e: Quantiles
    shares: dict[str, float]  # of the requests, by the pipeline they went through
    attainment: float | None
    goodput: float | None


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them does not exceed. Raises ValueError where there are none."""
    if not values:
        raise ValueError("there is no quantile of no values")
    return sorted(values)[rank(share, len(values))]


def rank(share: float, number: int) -> int:
    """Where the quantile stands among so many sorted values."""
    return max(0, math.ceil(share * number) - 1)


def summarize(outcomes: Iterable[Outcome], slo: SLO | None = None) -> Summary:
    """Raises ValueError where there are no requests."""
    outcomes = list(outcomes)
    if not outcomes:
        raise ValueError("there is nothing to summarize: no request was served")
    begin = min(one.arrival for one in outcomes)
    seconds = max(one.arrival + one.e2e for one in outcomes) - begin
    tpots = [one.tpot for one in outcomes if one.tpot is not None]
    num_met = sum(meets(one, slo) for one in outcomes) if slo else None
    modes = Counter(one.mode for one in outcomes)
    return Summary(
        num_requests=len(outcomes), seconds=seconds, requests_per_second=len(outcomes) / seconds,
        tokens_per_second=sum(one.num_tokens for one in outcomes) / seconds,
        ttft=Quantiles.of([one.ttft for one in outcomes]), tpot=Quantiles.of(tpots) if tpots else None,
        e2e=Quantiles.of([one.e2e for one in outcomes]),
        shares={mode: number / len(outcomes) for mode, number in sorted(modes.items())},
        attainment=None if num_met is None else num_met / len(outcomes),
        goodput=None if num_met is None else num_met / seconds)


def meets(outcome: Outcome, slo: SLO) -> bool:
    """An answer of one token has only its first to be late with."""
    return outcome.ttft <= slo.ttft and (outcome.tpot is None or outcome.tpot <= slo.tpot)
