"""What a cluster has done, as a Chrome trace: open it in https://ui.perfetto.dev or chrome://tracing.

A process for the requests, each a span with its stages inside; and one for each worker, with a lane for its steps and one
for the transfers that left it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanopd.core import StepRecord, TransferRecord
from nanopd.messages import History
from nanopd.router.timeline import Timeline

Event = dict[str, Any]
REQUESTS, FIRST_WORKER = 1, 2  # process ids, as the trace has them
STEPS = 1  # thread id of a worker's steps


def chrome_trace(timelines: Mapping[str, Timeline], histories: Mapping[str, History]) -> dict[str, Any]:
    """Timelines by request id and histories by worker id, as events sorted by time, in microseconds since the first one.

    Those of the same time stay as they were made, so that spans nest.
    """
    names = {job: request_id for request_id, timeline in timelines.items() for job in timeline.jobs}
    begun = _begun(histories)
    events = [event for request_id, timeline in timelines.items() for event in _request(request_id, timeline, begun)]
    for pid, history in enumerate(histories.values(), FIRST_WORKER):
        events += _steps(pid, history.steps, names)
        for number, transfer in enumerate(history.transfers):
            events += _transfer(pid, f"{pid}.{number}", transfer, names)
    start = min((event["ts"] for event in events), default=0.0)
    for event in events:
        event["ts"] = _microseconds(event["ts"] - start)
        if "dur" in event:  # when it ended, until now: rounded like this, a step never overlaps the next
            event["dur"] = _microseconds(event["dur"] - start) - event["ts"]
    events.sort(key=lambda event: event["ts"])
    return {"displayTimeUnit": "ms", "traceEvents": [*_names(list(histories)), *events]}


def save_trace(path: str | Path, timelines: Mapping[str, Timeline], histories: Mapping[str, History]) -> None:
    """Write `chrome_trace` to a file."""
    Path(path).write_text(json.dumps(chrome_trace(timelines, histories)), encoding="utf-8")


def _names(worker_ids: list[str]) -> Iterator[Event]:
    for pid, name in enumerate(["requests", *worker_ids], REQUESTS):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        if pid >= FIRST_WORKER:
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": STEPS, "args": {"name": "steps"}}


def _begun(histories: Mapping[str, History]) -> dict[str, float]:
    """When the first step of each job began."""
    begun: dict[str, float] = {}
    for history in histories.values():
        for record in history.steps:
            for row in record.rows:
                begun[row.request_id] = min(begun.get(row.request_id, record.start), record.start)
    return begun


def _request(request_id: str, timeline: Timeline, begun: Mapping[str, float]) -> Iterator[Event]:
    """The request's span, and from each mark to the next one a span inside it that is named after the first."""
    event = {"cat": "request", "id": request_id, "pid": REQUESTS, "tid": REQUESTS}
    name = f"request {request_id}"
    marks = timeline.marks + [("prefill started", begun[job]) for job in timeline.jobs if job in begun]
    marks.sort(key=lambda mark: mark[1])
    path = {"path": str(timeline), "refusals": timeline.num_refusals, "attempts": len(timeline.jobs)}
    yield {**event, "ph": "b", "name": name, "ts": marks[0][1], "args": path}
    for (what, when), (_, until) in pairwise(marks):
        yield {**event, "ph": "b", "name": what, "ts": when}
        yield {**event, "ph": "e", "name": what, "ts": until}
    yield {**event, "ph": "e", "name": name, "ts": marks[-1][1]}


def _steps(pid: int, steps: list[StepRecord], names: Mapping[str, str]) -> Iterator[Event]:
    end = 0.0
    for record in steps:
        start = max(record.start, end)  # a step that was begun before the last one ended would hide behind it
        end = max(record.start + record.duration, end)
        new = {kind: sum(row.num_new for row in record.rows if row.kind == kind) for kind in ("prefill", "decode")}
        args = {"step": record.step, "waiting": record.num_waiting, "free blocks": record.num_free_blocks,
                "preempted": [names.get(job, job) for job in record.preempted],
                "rows": [f"{names.get(row.request_id, row.request_id)}: {row.kind} {row.num_cached} + {row.num_new}"
                         for row in record.rows]}
        yield {"ph": "X", "cat": "step", "name": " + ".join(f"{kind} {number}" for kind, number in new.items() if number),
               "pid": pid, "tid": STEPS, "ts": start, "dur": end, "args": args}


def _transfer(pid: int, name: str, transfer: TransferRecord, names: Mapping[str, str]) -> Iterator[Event]:
    """A span that others may overlap: a trace's threads allow for none."""
    event = {"cat": "transfer", "id": name, "pid": pid, "tid": STEPS, "name": f"KV to {transfer.destination}"}
    request_id = names.get(transfer.request_id, transfer.request_id)
    exposed = transfer.end - max(transfer.computed, transfer.start)
    yield {**event, "ph": "b", "ts": transfer.start, "args": {
        "request": request_id, "transport": transfer.transport, "tokens": transfer.num_tokens, "bytes": transfer.num_bytes,
        "after the prompt was computed (us)": _microseconds(exposed)}}
    yield {**event, "ph": "e", "ts": transfer.end}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
