"""Guessing the next tokens, so that one step of the model can confirm several. Pure Python, no torch.

A decode step reads all of the model's weights for one token of each sequence; a few more tokens hardly make it
longer. So likely ones are drafted and run along, and the model says how far they are right. Text that quotes, lists
or corrects what stands before it repeats itself: what followed the last time is a good guess, and costs no model.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Protocol

from nanopd.config import ConfigError
from nanopd.core import Sequence


class Proposer(Protocol):
    """Guesses how a sequence goes on. Nothing depends on it but speed."""

    def propose(self, sequence: Sequence, limit: int) -> list[int]:
        """Up to `limit` tokens, none where there is no good guess."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""


@dataclass
class DraftCounters:
    """Totals since the start, in tokens."""

    proposed: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """The share of the drafts that were right."""
        return self.accepted / self.proposed if self.proposed else 0.0


class PromptLookup:
    """Proposes what followed the last time that the sequence's latest tokens stood in it.

    Args:
        num_tokens: the most that are proposed at a time.
        longest, shortest: how many of the latest tokens must have stood together before. More are tried first.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, num_tokens: int, longest: int = 4, shortest: int = 2) -> None:
        if num_tokens < 1:
            raise ConfigError(f"num_speculative_tokens must be at least 1, got {num_tokens}")
        if not 1 <= shortest <= longest:
            raise ConfigError("prompt_lookup_min must be from 1 to prompt_lookup_max, "
                              f"got prompt_lookup_min={shortest}, prompt_lookup_max={longest}")
        self.num_tokens = num_tokens
        self.lengths = range(longest, shortest - 1, -1)
        self._indices: dict[int, _Index] = {}

    def propose(self, sequence: Sequence, limit: int) -> list[int]:
        index = self._indices.get(sequence.seq_id)
        if index is None:
            index = self._indices[sequence.seq_id] = _Index(self.lengths)
        start = index.find_latest(sequence.token_ids)
        return [] if start is None else _copy(sequence.token_ids, start, min(self.num_tokens, limit))

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence.seq_id, None)


class _Index:
    """Where each run of a few tokens last stood. It grows with its sequence, by a few entries a token.

    It keeps the runs' hashes and not the runs: two that share one cost a bad guess, no more.
    """

    def __init__(self, lengths: range) -> None:
        self._lengths = lengths
        self._after: dict[int, int] = {}  # hash of a run -> the position that follows it
        self._indexed = 0  # runs that end before here are known

    def find_latest(self, tokens: SequenceABC[int]) -> int | None:
        """The position after the latest earlier place of the longest run that `tokens` ends with."""
        for end in range(self._indexed + 1, len(tokens)):
            for length in self._lengths:
                if length <= end:
                    self._after[hash(tuple(tokens[end - length : end]))] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for length in self._lengths:
            if length < len(tokens):
                found = self._after.get(hash(tuple(tokens[-length:])))
                if found is not None:
                    return found
        return None


def _copy(tokens: SequenceABC[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on, and round again where they end: so a loop is written on."""
    span = tokens[start : start + count]
    return [span[i % len(span)] for i in range(count)]
