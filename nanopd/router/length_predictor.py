"""How long an answer will be: a posterior over log length, learned while requests end. Pure Python, no torch.

Two conjugate parts share the work. A normal-inverse-gamma posterior for each bucket of prompt lengths, whose prior is the
posterior of all prompts together, says where the log length lies and how far it spreads: its forecast is a Student-t. Real
lengths are not log-normal (no answer has fewer than a few tokens, a few are very long), so a Dirichlet posterior over the
t's quantiles, one for all buckets, learns the true shape: where answers fall more often than the t says it puts more mass.
Both forget slowly by a discount, and at once where the evidence for a shift is strong.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from statistics import NormalDist
from typing import NamedTuple, Protocol

_NORMAL = NormalDist()
_FARTHEST = 37.0  # standard deviations: beyond, a normal's tail is no longer a float


class LengthForecast(Protocol):
    """The length of one answer, in tokens: the whole answer, with what is written, ended by `max_tokens` at the latest."""

    def mean(self) -> float: ...

    def quantile(self, probability: float) -> int:
        """The least length that is not exceeded with this probability. Raises ValueError outside [0, 1]."""

    def exceeds(self, length: float) -> float:
        """Probability that the answer has more than `length` tokens."""


class LengthPredictor(Protocol):
    """Learns from answers that have ended and forecasts those that have not. Lengths in tokens."""

    def update(self, prompt_len: int, output_len: int, cut: bool = False) -> None:
        """An answer has ended; `cut`: by max_tokens, so it would have had at least `output_len`. Raises ValueError."""

    def predict(self, prompt_len: int, max_tokens: int, written: int = 0) -> LengthForecast:
        """Of an answer that goes on after `written` tokens. Raises ValueError."""


# ------------------------------------------------------------------------------------------------ level and spread


class StudentT(NamedTuple):
    """A Student-t of log lengths, by Wallace's normal score (1959): within 0.002 of the exact probability for 4 degrees
    of freedom, closer for more, and with an inverse in closed form."""

    mean: float
    scale: float
    dof: int

    def tail(self, x: float) -> float:
        """Probability of more than `x`. Never 0."""
        t = (x - self.mean) / self.scale
        size = math.sqrt(self.dof * math.log1p(t * t / self.dof)) * (8 * self.dof + 1) / (8 * self.dof + 3)
        return math.erfc(math.copysign(min(size, _FARTHEST), t) / math.sqrt(2)) / 2

    def at_tail(self, tail: float) -> float:
        """The x that is exceeded with probability `tail`."""
        if not 0 < tail < 1:
            return math.inf if tail <= 0 else -math.inf
        return self.mean + self.scale * _t_score(-_NORMAL.inv_cdf(tail), self.dof)


def _t_score(z: float, dof: int) -> float:
    """The t that lies as far out as the normal's `z`."""
    size = z * (8 * dof + 3) / (8 * dof + 1)
    return math.copysign(math.sqrt(dof * math.expm1(size * size / dof)), z)


class Belief(NamedTuple):
    """A normal-inverse-gamma posterior: the mean is known as from `kappa` observations, the variance as from `dof`."""

    mean: float
    variance: float
    kappa: float
    dof: float

    def predictive(self) -> StudentT:
        return StudentT(self.mean, math.sqrt(self.variance * (1 + 1 / self.kappa)), math.floor(self.dof))

    def prior_of_one(self, weight: float) -> Belief:
        """What it says beforehand of one of many kinds of observation, whose own come to count as much as it when there are
        `weight` of them."""
        return Belief(self.mean, self.variance * (1 + 1 / self.kappa), weight, min(self.dof, weight))

    def beyond(self, x: float) -> tuple[float, float]:
        """Mean and variance of an observation of which is known only that it is over `x`."""
        scale = math.sqrt(self.variance)
        start = (x - self.mean) / scale
        if start > 8:  # the ratio below is about to be 0 / 0
            return x + scale / start, (scale / start) ** 2
        hazard = math.exp(-start * start / 2) / math.sqrt(2 * math.pi) / (math.erfc(start / math.sqrt(2)) / 2)
        return self.mean + scale * hazard, self.variance * max(0.0, 1 + start * hazard - hazard * hazard)


class Evidence:
    """What observations say of a normal's mean and variance: their weight, mean and squared deviations."""

    __slots__ = ("mean", "squares", "weight")

    def __init__(self) -> None:
        self.weight = self.mean = self.squares = 0.0

    def add(self, x: float, weight: float = 1.0, variance: float = 0.0) -> None:
        """An observation, or one of which only mean and variance are known."""
        self.weight += weight
        step = (x - self.mean) * weight / self.weight
        self.squares += step * (x - self.mean) * (self.weight - weight) + weight * variance
        self.mean += step

    def fit(self, belief: Belief) -> float:
        """Mean log density of what was seen, less a constant."""
        squares = self.squares / self.weight + (self.mean - belief.mean) ** 2
        return -(math.log(belief.variance) + squares / belief.variance) / 2

    def scale(self, factor: float) -> None:
        self.weight *= factor
        self.squares *= factor

    def posterior(self, prior: Belief, unit: float = 1.0) -> Belief:
        """After this evidence, of which the weight `unit` counts as one observation."""
        weight = self.weight / unit
        kappa, dof = prior.kappa + weight, prior.dof + weight
        shift = self.mean - prior.mean
        squares = prior.dof * prior.variance + self.squares / unit + shift * shift * prior.kappa * weight / kappa
        return Belief(prior.mean + shift * weight / kappa, squares / dof, kappa, dof)


# ----------------------------------------------------------------------------------------------------------- shape

_SCORES = [k / 6 for k in range(18, -19, -1)]  # a normal's scores where the shape's bins meet, the highest first
_TAILS = [0.0, *(math.erfc(score / math.sqrt(2)) / 2 for score in _SCORES), 1.0]  # how much of a t lies above
_BINS = len(_TAILS) - 1


class Shape:
    """What share of the answers falls where a Student-t says `tail` of them do: a Dirichlet posterior over bins of the
    t's tail, with the t itself as its prior. `shares[k]`: of the answers that lie over the bins' k-th border."""

    PRIOR = 20.0  # answers that the t's own shape counts as

    def __init__(self) -> None:
        self.counts = [0.0] * _BINS
        self.shares: Sequence[float] = _TAILS

    def add(self, tails: tuple[float, float], shares: tuple[float, float], unit: float) -> None:
        """An answer somewhere between two tails, above which lie these shares: divided among the bins as answers there are
        expected to be."""
        start, top = shares
        whole, first, last = top - start, _bin_of(tails[0]), _bin_of(tails[1])
        for k in range(first, last + 1) if whole > 0 else ():
            end = top if k == last else self.shares[k + 1]
            self.counts[k] += unit * (end - start) / whole
            start = end
        self._settle(unit)

    def scale(self, factor: float) -> None:
        self.counts = [count * factor for count in self.counts]

    def shorten(self) -> None:
        """Weigh what was seen no more than the prior. For counts whose unit is 1."""
        self.scale(self.PRIOR / max(self.PRIOR, sum(self.counts)))
        self._settle(1.0)

    def _settle(self, unit: float) -> None:
        prior = self.PRIOR * unit
        whole = prior + sum(self.counts)
        self.shares = [(prior * tail + above) / whole for tail, above in zip(_TAILS, accumulate(self.counts, initial=0.0))]


def _bin_of(tail: float) -> int:
    return bisect_right(_TAILS, tail, 0, _BINS) - 1


def share_above(shares: Sequence[float], tail: float) -> float:
    """The share of answers above the point that a t exceeds with probability `tail`."""
    k = _bin_of(tail)
    return shares[k] + (shares[k + 1] - shares[k]) * (tail - _TAILS[k]) / (_TAILS[k + 1] - _TAILS[k])


def tail_of(shares: Sequence[float], share: float) -> float:
    """The inverse of `share_above`."""
    k = max(bisect_left(shares, share, 0, _BINS), 1) - 1
    return _TAILS[k] + (_TAILS[k + 1] - _TAILS[k]) * (share - shares[k]) / (shares[k + 1] - shares[k])


# -------------------------------------------------------------------------------------------------------- forecast


class BayesianForecast:
    """Log length is a Student-t whose quantiles the shape has moved; a length is the nearest whole number of tokens."""

    __slots__ = ("_left", "_shares", "_t", "max_tokens", "written")

    def __init__(self, t: StudentT, shares: Sequence[float], max_tokens: int, written: int) -> None:
        self._t, self._shares, self.max_tokens, self.written = t, shares, max_tokens, written
        self._left = self._above(written) if written else 1.0  # answers that go on after what is written

    def _above(self, length: float) -> float:
        return share_above(self._shares, self._t.tail(math.log(length + 0.5)))

    def exceeds(self, length: float) -> float:
        length = math.floor(length)
        if length <= self.written:
            return 1.0
        return 0.0 if length >= self.max_tokens else self._above(length) / self._left

    def quantile(self, probability: float) -> int:
        check_probability(probability)
        x = self._t.at_tail(tail_of(self._shares, (1 - probability) * self._left))
        if x > math.log(self.max_tokens):
            return self.max_tokens
        return min(max(math.ceil(math.exp(x) - 0.5), self.written + 1), self.max_tokens)

    def mean(self) -> float:
        """Summed over strips of log length, in each of which it is taken to lie evenly: within about 2%."""
        bottom, top = math.log(self.written + 0.5), math.log(self.max_tokens - 0.5)
        if bottom >= top:
            return float(self.max_tokens)
        x, length, share = top, self.max_tokens - 0.5, self._above(self.max_tokens - 1)
        total = share * self.max_tokens
        for next_x, next_share in self._strips(bottom):
            if next_x >= top:
                continue
            if next_x <= bottom:
                break
            next_length = math.exp(next_x)
            total += (next_share - share) * (length - next_length) / (x - next_x)
            x, length, share = next_x, next_length, next_share
        total += (self._left - share) * (length - self.written - 0.5) / (x - bottom)
        return min(max(total / self._left, self.written + 1.0), float(self.max_tokens))

    def _strips(self, bottom: float) -> Iterator[tuple[float, float]]:
        """Log lengths from the greatest, each with the share of answers above: the shape's borders and some farther out, or
        parts of what is left where that lies beyond them."""
        if self._left < self._shares[1]:
            tail = self._t.tail(bottom)
            return ((self._t.at_tail(part * tail), part * self._left) for part in _PARTS)
        level, scale, dof = self._t
        thinned = self._shares[1] / _TAILS[1]
        shares = chain((thinned * tail for tail in _FAR_TAILS), self._shares[1:_BINS])
        return ((level + scale * score, share) for score, share in zip(_t_scores(dof), shares))


_FAR_SCORES = [8.0, 7.0, 6.0, 5.5, 5.0, 4.5, 4.0, 3.5]
_FAR_TAILS = [math.erfc(score / math.sqrt(2)) / 2 for score in _FAR_SCORES]
_PARTS = [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, *(k * k / 400 for k in range(2, 20))]


@lru_cache(maxsize=4096)
def _t_scores(dof: int) -> list[float]:
    return [_t_score(score, dof) for score in _FAR_SCORES + _SCORES]


# ------------------------------------------------------------------------------------------------------ predictors


class ShiftAlarm:
    """Weighs the evidence that lengths have shifted, and keeps what has ended since they may have.

    Where an answer fell in its forecast, as a normal score, is standard normal while forecasts hold. Against that stands a
    normal of unknown mean and variance, learned since the evidence last favoured the forecasts. The log odds are summed and
    never fall below 0 (a CUSUM; West and Harrison monitor forecasts so). If the forecasts are right, it rings falsely less
    than once in exp(THRESHOLD) answers.
    """

    THRESHOLD = 8.0
    PRIOR = Belief(mean=0.0, variance=0.4, kappa=1.0, dof=4.0)  # a first score near 0 must count for it, or no narrowing is seen
    STRIDE = (math.sqrt(5) - 1) / 2

    def __init__(self) -> None:
        self.place = 0.0
        self.forget()

    def forget(self) -> None:
        self.log_odds = 0.0
        self.scores, self.lengths = Evidence(), Evidence()

    def rings(self, longer: float, as_long: float, x: float, variance: float) -> bool:
        """Whether an answer makes the evidence suffice.

        Args:
            longer: the share of answers that was forecast to be longer.
            as_long: the share that was forecast to be at least as long.
            x, variance: its log length, and how uncertain that is.
        """
        self.place = (self.place + self.STRIDE) % 1.0  # an answer may have been anywhere between: even, but not by chance
        share = min(max(longer + self.place * (as_long - longer), 1e-4), 1 - 1e-4)
        score = -_NORMAL.inv_cdf(share)
        self.log_odds += _log_odds(score, self.scores.posterior(self.PRIOR).predictive())
        self.scores.add(score)
        self.lengths.add(x, variance=variance)
        if self.log_odds <= 0:
            self.forget()
        return self.log_odds > self.THRESHOLD


def _log_odds(score: float, t: StudentT) -> float:
    """Of a score under a Student-t against a standard normal."""
    deviation, half = (score - t.mean) / t.scale, (t.dof + 1) / 2
    return (_log_peak(t.dof) - math.log(t.scale) - half * math.log1p(deviation * deviation / t.dof)
            + (score * score + math.log(2 * math.pi)) / 2)


@lru_cache(maxsize=4096)
def _log_peak(dof: int) -> float:
    """Logarithm of a t's highest density."""
    return math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - math.log(math.pi * dof) / 2


class BayesianLengthPredictor:
    """See the module.

    An answer that was cut counts with what is expected of it, being at least as long (online EM, Cappé and Moulines 2009):
    the mean and variance of a log length beyond, and a share of every bin beyond.

    Args:
        memory: answers after which an old one has lost all but 1/e of its weight; math.inf for never.
    """

    PRIOR = Belief(mean=math.log(128), variance=0.7, kappa=0.5, dof=4.0)  # before anything has ended: 6 to 2,800 tokens
    WORSE = 0.1  # nats an answer
    POOLED = 8.0  # answers of its own that a bucket needs to count as much as all the others

    def __init__(self, memory: float = 1000.0) -> None:
        if not memory >= 1:
            raise ValueError(f"memory must be at least 1 answer, got {memory!r}")
        self._growth = math.exp(1 / memory)
        self._unit = 1.0  # weight of the newest answer: it grows, which is cheaper than to shrink all the others
        self._all = Evidence()
        self._buckets: dict[int, Evidence] = {}
        self._shape = Shape()
        self._alarm = ShiftAlarm()
        self.shifts = 0  # how often the alarm has rung

    def belief(self, prompt_len: int) -> Belief:
        """The posterior of log length after prompts of about this length: between two powers of 2."""
        return self._own(prompt_len, self._all.posterior(self.PRIOR, self._unit))

    def _own(self, prompt_len: int, pooled: Belief) -> Belief:
        own = self._buckets.get(prompt_len.bit_length())
        return own.posterior(pooled.prior_of_one(self.POOLED), self._unit) if own else pooled

    def predict(self, prompt_len: int, max_tokens: int, written: int = 0) -> BayesianForecast:
        check_question(prompt_len, max_tokens, written)
        return BayesianForecast(self.belief(prompt_len).predictive(), self._shape.shares, max_tokens, written)

    def update(self, prompt_len: int, output_len: int, cut: bool = False) -> None:
        check_answer(prompt_len, output_len)
        pooled = self._all.posterior(self.PRIOR, self._unit)
        belief, least = self._own(prompt_len, pooled), math.log(output_len - 0.5)
        t = belief.predictive()
        high = t.tail(least) if output_len > 1 else 1.0
        low = 0.0 if cut else t.tail(math.log(output_len + 0.5))
        x, variance = belief.beyond(least) if cut else (math.log(output_len), 0.0)
        shares = share_above(self._shape.shares, low), share_above(self._shape.shares, high)
        if self._alarm.rings(*shares, x, variance):
            return self._start_anew(pooled)
        self._unit *= self._growth
        self._shape.add((low, high), shares, self._unit)
        self._buckets.setdefault(prompt_len.bit_length(), Evidence()).add(x, self._unit, variance)
        if cut:
            x, variance = pooled.beyond(least)
        self._all.add(x, self._unit, variance)
        if self._unit > 1e100:
            self._rescale()

    def _start_anew(self, pooled: Belief) -> None:
        """Know the level only from what has ended since the shift, and the shape little better than from the prior. But not
        where that fits worse than `pooled`, which is then on its way there: so it is while the prior's spread wears off."""
        recent = self._alarm.lengths
        self._alarm.forget()
        if recent.fit(recent.posterior(self.PRIOR)) < recent.fit(pooled) - self.WORSE:
            return
        self.shifts += 1
        self._rescale()
        self._shape.shorten()
        self._buckets.clear()
        self._all = recent

    def _rescale(self) -> None:
        for part in (self._all, self._shape, *self._buckets.values()):
            part.scale(1 / self._unit)
        self._unit = 1.0


def shortest_interval(forecast: LengthForecast, probability: float) -> tuple[int, int]:
    """The first and the last of the fewest lengths that hold at least this probability, to a twentieth of what is left out.
    Raises ValueError outside [0, 1]."""
    check_probability(probability)
    below = [(1 - probability) * k / 20 for k in range(21)]
    return min(((forecast.quantile(share), forecast.quantile(min(share + probability, 1.0))) for share in below),
               key=lambda ends: ends[1] - ends[0])


def check_question(prompt_len: int, max_tokens: int, written: int) -> None:
    """Raises ValueError for what `LengthPredictor.predict` can't answer."""
    _check_tokens("prompt_len", prompt_len)
    _check_tokens("max_tokens", max_tokens)
    if not (isinstance(written, int) and 0 <= written < max_tokens):
        raise ValueError(f"written must be a whole number from 0 to {max_tokens - 1}, one less than max_tokens, for an answer "
                         f"that goes on, got {written!r}")


def check_answer(prompt_len: int, output_len: int) -> None:
    """Raises ValueError for what `LengthPredictor.update` can't learn."""
    _check_tokens("prompt_len", prompt_len)
    _check_tokens("output_len", output_len)


def _check_tokens(name: str, value: int) -> None:
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name} must be a whole number of at least 1 token, got {value!r}")


def check_probability(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"a probability must be from 0 to 1, got {probability!r}")
