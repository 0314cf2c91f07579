"""What the length predictor is compared with: the last answers, as their mean with a normal spread or as they were, and a
constant. None of them looks at the prompt, or minds that an answer was cut."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from statistics import NormalDist, fmean, pstdev

from nanopd.router.length_predictor import LengthForecast, check_answer, check_probability, check_question


class _Forecast(ABC):
    """From `_above`, the probability that an answer without a limit is longer than a length and its inverse `_at`."""

    def __init__(self, max_tokens: int, written: int) -> None:
        self.max_tokens, self.written = max_tokens, written

    @abstractmethod
    def _above(self, length: int) -> float: ...

    @abstractmethod
    def _at(self, share: float) -> float: ...

    def exceeds(self, length: float) -> float:
        length = math.floor(length)
        if length <= self.written:
            return 1.0
        left = self._above(self.written)
        return 0.0 if length >= self.max_tokens or left <= 0 else self._above(length) / left

    def quantile(self, probability: float) -> int:
        check_probability(probability)
        left = self._above(self.written)
        length = self._at((1 - probability) * left) if left > 0 else 0.0
        return math.ceil(self.within(length))

    def within(self, length: float) -> float:
        return min(max(length, self.written + 1.0), float(self.max_tokens))


class NormalForecast(_Forecast):
    def __init__(self, normal: NormalDist, max_tokens: int, written: int) -> None:
        super().__init__(max_tokens, written)
        self._normal = normal

    def _above(self, length: int) -> float:
        return math.erfc((length + 0.5 - self._normal.mean) / (self._normal.stdev * math.sqrt(2))) / 2

    def _at(self, share: float) -> float:
        return 2 * self._normal.mean - self._normal.inv_cdf(share) - 0.5 if 0 < share < 1 else math.inf * (0.5 - share)

    def mean(self) -> float:
        return self.within(self._normal.mean)


class SampleForecast(_Forecast):
    """As long as one of the sample, each as likely. One share more is for lengths never seen, spread evenly over their
    logarithm: else none could be."""

    def __init__(self, ordered: list[int], max_tokens: int, written: int) -> None:
        super().__init__(max_tokens, written)
        self._ordered = ordered

    def _above(self, length: int) -> float:
        unseen = 1 - math.log1p(length) / math.log1p(self.max_tokens)
        return (len(self._ordered) - bisect_right(self._ordered, length) + unseen) / (len(self._ordered) + 1)

    def _at(self, share: float) -> float:
        low, high = self.written, self.max_tokens  # the least length that no more than the share exceeds is in (low, high]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._above(middle) <= share else (middle, high)
        return high

    def mean(self) -> float:
        beyond = [self.within(length) for length in self._ordered if length > self.written]
        return fmean(beyond) if beyond else self.within(0)


class GeometricForecast(_Forecast):
    """Every token is as likely to be the last one as any other."""

    def __init__(self, length: float, max_tokens: int, written: int) -> None:
        super().__init__(max_tokens, written)
        self._length, self._decay = length, math.log1p(-1 / length)

    def _above(self, length: int) -> float:
        return math.exp(self._decay * length)

    def _at(self, share: float) -> float:
        return math.log(share) / self._decay if share > 0 else math.inf

    def mean(self) -> float:
        return self.written + self._length * -math.expm1(self._decay * (self.max_tokens - self.written))


class WindowedMean:
    """The earlier system's: the mean of the last answers, with their standard deviation."""

    FIRST = NormalDist(128, 128)  # before anything has ended

    def __init__(self, window: int = 100) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 answer, got {window!r}")
        self.lengths: deque[int] = deque(maxlen=window)

    def update(self, prompt_len: int, output_len: int, cut: bool = False) -> None:
        check_answer(prompt_len, output_len)
        self.lengths.append(output_len)

    def predict(self, prompt_len: int, max_tokens: int, written: int = 0) -> LengthForecast:
        check_question(prompt_len, max_tokens, written)
        normal = NormalDist(fmean(self.lengths), max(pstdev(self.lengths), 0.5)) if self.lengths else self.FIRST
        return NormalForecast(normal, max_tokens, written)


class WindowedSample(WindowedMean):
    """The same answers, each as one that may come again."""

    def predict(self, prompt_len: int, max_tokens: int, written: int = 0) -> LengthForecast:
        check_question(prompt_len, max_tokens, written)
        return SampleForecast(sorted(self.lengths), max_tokens, written)


class ConstantLength:
    """The same mean for all, and the least that one can say beside a mean: that any token may be the last."""

    def __init__(self, length: float = 128.0) -> None:
        if not 1 < length < math.inf:
            raise ValueError(f"length must be a number of tokens above 1, got {length!r}")
        self.length = length

    def update(self, prompt_len: int, output_len: int, cut: bool = False) -> None:
        check_answer(prompt_len, output_len)

    def predict(self, prompt_len: int, max_tokens: int, written: int = 0) -> LengthForecast:
        check_question(prompt_len, max_tokens, written)
        return GeometricForecast(self.length, max_tokens, written)
