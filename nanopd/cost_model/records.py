"""From what a worker recorded of its steps to rows of measurements. Pure Python.

A step's record has the device's time. What a cost model has to predict is the time from the end of a step to the end of the
next one, in a worker that always has work: a little passes in which the device waits for the worker. That is measured
over like steps in a row (`gap_between`), and added. The difference of two steps' recorded ends would not do for a single
step: a worker that queues the next one ahead sees the end of a step late where the next takes long to queue, and the end
of that one so much too early.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from nanopd.core import StepRecord
from nanopd.cost_model.measurements import DecodeRow, MixedRow, PrefillRow


class Chunk(NamedTuple):
    """A part of one prompt; of none, with 0 tokens."""

    new_tokens: int = 0
    cached_tokens: int = 0


class _Content(NamedTuple):
    """What a step held of at most one prompt and any number of decodes."""

    chunk: Chunk
    decodes: int
    context_tokens: int


def gap_between(steps: Sequence[StepRecord]) -> float:
    """The median seconds from the end of a step to the start of the next, over those in a row that held the same requests,
    and the same parts of them; 0 where no two did."""
    gaps = [after.start - before.start - before.duration for before, after in pairwise(steps) if _who(before) == _who(after)]
    return max(0.0, statistics.median(gaps)) if gaps else 0.0


def typical(seconds: Sequence[float]) -> float:
    """The median; the first of several is for warming up."""
    return statistics.median(seconds[1:] or seconds)


def prefill_rows(steps: Iterable[StepRecord], gap: float) -> list[PrefillRow]:
    """One for each length of chunk and of what was before it, of steps that held nothing else."""
    return [PrefillRow(seconds + gap, *chunk) for chunk, decodes, seconds, _ in _cells(steps) if chunk.new_tokens and not decodes]


def decode_rows(steps: Iterable[StepRecord], gap: float) -> list[DecodeRow]:
    """One for each size of batch, at the mean of its steps' contexts."""
    return [DecodeRow(seconds + gap, decodes, context) for chunk, decodes, seconds, context in _cells(steps)
            if not chunk.new_tokens]


def mixed_rows(steps: Iterable[StepRecord], gap: float) -> list[MixedRow]:
    """One for each chunk and size of batch, at the mean of its steps' contexts."""
    return [MixedRow(seconds + gap, *chunk, decodes, context) for chunk, decodes, seconds, context in _cells(steps)
            if chunk.new_tokens and decodes]


def _cells(steps: Iterable[StepRecord]) -> Iterator[tuple[Chunk, int, float, float]]:
    """Steps that held as much as each other: chunk, decodes, seconds of one, mean context of the decodes together."""
    cells: dict[tuple[Chunk, int], list[tuple[float, int]]] = defaultdict(list)
    for step in steps:
        content = _content(step)
        if content is not None:
            cells[content.chunk, content.decodes].append((step.duration, content.context_tokens))
    for (chunk, decodes), found in cells.items():
        if _is_kept(chunk):
            seconds, contexts = zip(*found)
            yield chunk, decodes, typical(seconds), statistics.mean(contexts)


def _content(step: StepRecord) -> _Content | None:
    """None where it held several prompts, or did something besides."""
    if step.num_drafts or step.num_copies or step.preempted:
        return None
    prompts = [Chunk(row.num_new, row.num_cached) for row in step.rows if row.num_new > 1]
    if len(prompts) > 1:
        return None
    contexts = [row.num_cached + 1 for row in step.rows if row.num_new == 1]
    return _Content(prompts[0] if prompts else Chunk(), len(contexts), sum(contexts))


def _is_kept(chunk: Chunk) -> bool:
    """Of a long prompt's many equal chunks only the 1st, 2nd, 3rd, 4th, 5th, 8th, 9th, 16th, ... : the others would outweigh
    all that is short."""
    if not chunk.new_tokens or chunk.cached_tokens % chunk.new_tokens:
        return True
    number = chunk.cached_tokens // chunk.new_tokens
    return number & (number - 1) == 0 or number & (number + 1) == 0


def _who(step: StepRecord) -> list[tuple[str, int, bool]]:
    return [(row.request_id, row.index, row.num_new > 1) for row in step.rows]
