"""Where a request's time went, as far as the workers remember."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nanopd.benchmark.load.record import PHASES, ClientRecord
from nanopd.messages import History
from nanopd.router.timeline import Timeline


def note_phases(ended: Iterable[tuple[ClientRecord, Timeline]], histories: Mapping[str, History], start: float) -> None:
    """Say of each completed request how many seconds it was in each of PHASES, which add up to its end-to-end time; of none whose
    first step the workers no longer know. `start` of the load, on the monotonic clock."""
    began: dict[str, float] = {}
    for history in histories.values():
        for step in history.steps:
            for row in step.rows:
                began[row.request_id] = min(step.start, began.get(row.request_id, step.start))
    for record, timeline in ended:
        if record.status == "completed" and timeline.jobs[-1] in began:
            record.phases = _phases(record, began[timeline.jobs[-1]] - start, dict(timeline.marks).get("KV transferred"), start)


def _phases(record: ClientRecord, began: float, transferred: float | None, start: float) -> dict[str, float]:
    """A transfer counts from the first token on: what was under way before cost nobody any time."""
    first, last = record.tokens[0], record.tokens[-1]
    began = min(max(began, record.arrival), first)
    there = first if transferred is None else min(max(first, transferred - start), last)
    return dict(zip(PHASES, (began - record.arrival, first - began, there - first, last - there)))
