"""What the length predictor is compared with: the mean of the last answers, and a constant."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque

from nanopd.router.length_predictor import check_answer, check_probability, check_question


class SampleForecast:
    """As long as one of a sample of answers, each as likely; one share more stands for lengths never seen, spread evenly over
    their logarithm, or no length outside the sample would be possible."""

    def __init__(self, ordered: list[int], max_tokens: int, written: int) -> None:
        self._ordered, self.max_tokens, self.written = ordered, max_tokens, written
        self._left = self._above(written)

    def _above(self, length: int) -> float:
        beyond = len(self._ordered) - bisect_right(self._ordered, length)
        unseen = 1 - math.log1p(length) / math.log1p(self.max_tokens)
        return (beyond + unseen) / (len(self._ordered) + 1)

    def exceeds(self, length: float) -> float:
        length = math.floor(length)
        if length <= self.written:
            return 1.0
        return 0.0 if length >= self.max_tokens else self._above(length) / self._left

    def quantile(self, probability: float) -> int:
        check_probability(probability)
        return bisect_length(self, probability)

    def mean(self) -> float:
        rest = [min(length, self.max_tokens) for length in self._ordered if length > self.written]
        return sum(rest) / len(rest) if rest else self.written + 1.0
