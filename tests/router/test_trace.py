"""The Chrome trace of a cluster's timelines and histories: what Perfetto asks of one, and that it tells the truth."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from workers.fake_cluster import FakeCluster

from nanopd.core import Request, RowRecord, SamplingParams, StepRecord, TransferRecord
from nanopd.messages import History
from nanopd.router.timeline import Timeline
from nanopd.router.trace import chrome_trace, save_trace


def timeline(*marks, jobs=("a",)):
    return Timeline(path=["P0", "D0"], jobs=list(jobs), marks=list(marks))


def step(number, start, duration, *rows):
    return StepRecord(number, start, tuple(RowRecord(*row) for row in rows), (), 0, 7, 0, duration)


@pytest.fixture
def trace():
    """Request "a": its first attempt failed. P0 steps twice for it, and its KV travels while it computes and after."""
    timelines = {"a": timeline(("queued", 10.0), ("sent to P0", 10.001), ("D0 was lost", 10.002), ("sent to P0", 10.003),
                               ("KV transferred", 10.006), ("finished", 10.01), jobs=("a", "a/1"))}
    histories = {
        "P0": History([step(0, 10.0011, 0.0004, ("a", 0, "prefill", 5, 0)),
                       step(1, 10.0032, 0.002, ("a/1", 0, "prefill", 5, 0)),
                       step(2, 10.0051, 0.001, ("b", 0, "decode", 1, 9), ("c", 0, "prefill", 4, 0))],
                      [TransferRecord("a/1", "D1", "peer", 5, 640, 10.004, 10.0052, 10.006)]),
        "D1": History([], [])}
    return chrome_trace(timelines, histories)["traceEvents"]


def spans(events, **wanted):
    """(name, begin, end) of async spans, in microseconds, by begin."""
    events = [event for event in events if event["ph"] in "be" and wanted.items() <= event.items()]
    begun, found = {}, []
    for event in events:
        if event["ph"] == "b":
            begun[event["name"]] = event["ts"]
        else:
            found.append((event["name"], begun.pop(event["name"]), event["ts"]))
    assert not begun
    return sorted(found, key=lambda span: (span[1], -span[2]))


def test_a_request_is_a_span_with_its_stages_inside(trace):
    assert spans(trace, cat="request", id="a") == [
        ("request a", 0, 10_000), ("queued", 0, 1000), ("sent to P0", 1000, 1100), ("prefill started", 1100, 2000),
        ("D0 was lost", 2000, 3000), ("sent to P0", 3000, 3200), ("prefill started", 3200, 6000),
        ("KV transferred", 6000, 10_000)]
    begin = next(event for event in trace if event["name"] == "request a")
    assert begin["args"] == {"path": "P0 -> D0", "refusals": 0, "attempts": 2}


def test_steps_have_a_lane_for_each_worker_and_never_overlap(trace):
    steps = [event for event in trace if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in steps] == [
        ("prefill 5", 1100, 400), ("prefill 5", 3200, 2000), ("prefill 4 + decode 1", 5200, 900)]
    assert steps[1]["args"]["rows"] == ["a: prefill 0 + 5"]  # by the name the client knows it
    assert len({(event["pid"], event["tid"]) for event in steps}) == 1
    names = {event["pid"]: event["args"]["name"] for event in trace if event["name"] == "process_name"}
    assert list(names.values()) == ["requests", "P0", "D1"] and names[steps[0]["pid"]] == "P0"


def test_a_transfer_says_what_travelled_and_how_much_of_it_was_exposed(trace):
    assert spans(trace, cat="transfer") == [("KV to D1", 4000, 6000)]
    begin, _ = (event for event in trace if event.get("cat") == "transfer")
    assert begin["args"] == {"request": "a", "transport": "peer", "tokens": 5, "bytes": 640,
                             "after the prompt was computed (us)": 800}


def test_an_empty_cluster_has_a_trace_too():
    assert chrome_trace({}, {})["traceEvents"] == [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "requests"}},
        {"ph": "M", "name": "process_sort_index", "pid": 1, "args": {"sort_index": 1}}]


def test_what_a_cluster_did_is_valid_sorted_and_nests(tmp_path):
    cluster = FakeCluster("C:cpu P:cpu P:cpu D:cpu D:cpu", is_late=lambda: False)
    for number in range(20):
        cluster.submit(Request(str(number), [1, 2, 3, number % 12], SamplingParams(n=1 + number % 2, max_tokens=6)),
                       "collocated" if number % 3 == 0 else "disaggregated")
        cluster.step()
        cluster.clock.now += 0.001
        if number == 10:
            cluster.lose("D0")
    cluster.settle()
    histories = {worker_id: History(list(worker.engine.history), list(worker.sent))
                 for worker_id, worker in cluster.living.items()}
    save_trace(tmp_path / "trace.json", cluster.central.timelines, histories)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    timed = [event for event in events if event["ph"] != "M"]
    assert all(isinstance(event["ts"], int) and event["ts"] >= 0 for event in timed)
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    assert sum(event["ph"] == "X" for event in timed) == sum(len(history.steps) for history in histories.values())
    assert_spans_nest(timed)
    assert_steps_do_not_overlap(timed)


def assert_spans_nest(events):
    open_spans = defaultdict(list)
    for event in events:
        if event["ph"] == "b":
            open_spans[event["cat"], event["id"]].append(event["name"])
        elif event["ph"] == "e":
            assert open_spans[event["cat"], event["id"]].pop() == event["name"]
    assert len(open_spans) > 20 and not any(open_spans.values())


def assert_steps_do_not_overlap(events):
    until = defaultdict(int)
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= until[event["pid"]] and event["dur"] >= 0
            until[event["pid"]] = event["ts"] + event["dur"]
