"""How good a length predictor is: every answer is forecast from those that ended before it, then learned (prequential)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from nanopd.router.length_predictor import LengthForecast, LengthPredictor, shortest_interval


class Answer(NamedTuple):
    """One that has ended, after as many tokens as said. `cut`: at max_tokens, which it would have passed."""

    prompt_len: int
    output_len: int
    cut: bool
    max_tokens: int


@dataclass(frozen=True)
class LengthScores:
    """Means over all answers scored.

    Lengths are whole numbers, and where the shortest are also frequent (6 tokens: every twelfth answer), an interval of whole
    lengths between equal tails holds far more than 90%, though the forecast be true. So `central_coverage` counts a length at
    the interval's edge by the part of its probability that belongs inside (Czado, Gneiting and Held 2009): 0.9 for
    true forecasts of any lengths. `coverage` counts plainly, in the shortest interval that holds 90%.
    """

    num_answers: int
    coverage: float
    central_coverage: float
    log_score: float  # nats: log probability of what happened; higher is better
    pinball: float  # tokens: loss of the 5%, 25%, 50%, 75% and 95% quantiles, their mean; lower is better
    bias: float  # tokens: mean forecast less what happened


LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
LEAST = 1e-12  # probability below which a forecast is not blamed further


def score(predictor: LengthPredictor, answers: Iterable[Answer], *, skip: int = 0) -> LengthScores:
    """Let a fresh predictor go through answers in the order in which they ended. The first `skip` are learned, not scored.

    Raises ValueError where none is left to score.
    """
    rows = []
    for number, answer in enumerate(answers):
        if number >= skip:
            rows.append(_score(predictor.predict(answer.prompt_len, answer.max_tokens), answer))
        predictor.update(answer.prompt_len, answer.output_len, answer.cut)
    if not rows:
        raise ValueError(f"there must be more answers than the {skip} that are learned unscored")
    return LengthScores(len(rows), *(fmean(column) for column in zip(*rows)))


def _score(forecast: LengthForecast, answer: Answer) -> tuple[float, ...]:
    length = answer.output_len
    longer = 0.0 if answer.cut else forecast.exceeds(length)
    as_long = forecast.exceeds(length - 1)
    quantiles = [forecast.quantile(level) for level in LEVELS]
    losses = [(length - q) * (level - (length < q)) for level, q in zip(LEVELS, quantiles)]
    first, last = shortest_interval(forecast, 0.9)
    return (first <= length <= last, _share_inside(longer, as_long),
            math.log(max(as_long - longer, LEAST)), fmean(losses), forecast.mean() - length)


def _share_inside(longer: float, as_long: float) -> float:
    """Of the probability between two tails, the part that lies in the 90% interval."""
    if as_long - longer < LEAST:
        return float(0.05 <= as_long <= 0.95)
    return max(0.0, min(as_long, 0.95) - max(longer, 0.05)) / (as_long - longer)
