"""An open loop, on a cluster that takes its time and by a clock that the test keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanopd.benchmark.load import Schedule, Stopped, serve_cluster
from nanopd.benchmark.load import cluster as cluster_load
from nanopd.benchmark.load.cluster import LONGEST_WAIT
from nanopd.core import FinishReason, Overloaded, TokenEvent
from nanopd.simulator import Arrival

STEP = 0.03  # seconds that a busy cluster takes for a step, whatever it is asked to wait


class SlowCluster:
    """Every answer has begun after `delay` seconds, and has a token more with each step. Every other one goes through two
    workers."""

    limits = SimpleNamespace(vocab_size=50)

    def __init__(self, delay: float, error: str | None = None) -> None:
        self.now, self.delay, self.error = 1000.0, delay, error
        self.submitted, self.waits = [], []
        self.open, self.most_open = {}, 100
        self.cancelled, self.interrupted_at = [], float("inf")

    def monotonic(self) -> float:
        return self.now

    def submit(self, prompt, sampling, mode=None):
        if len(self.open) >= self.most_open:
            raise Overloaded(f"{self.most_open} request is open")
        name = str(len(self.submitted))
        self.submitted.append((self.now, prompt["prompt_token_ids"], sampling, mode))
        self.open[name] = [self.now + self.delay, sampling.max_tokens]
        return SimpleNamespace(request_id=name)

    def step(self, timeout):
        self.waits.append(timeout)
        if self.now >= self.interrupted_at:
            raise KeyboardInterrupt
        self.now += STEP if self.open else timeout + 1e-6
        events = []
        for name, (begins, left) in list(self.open.items()):
            if self.now >= begins:
                self.open[name][1] -= 1
                reason = FinishReason.LENGTH if left == 1 else None
                events.append(TokenEvent(name, 0, 7, finish_reason=reason, error=self.error, time=self.now))
                if reason:
                    del self.open[name]
        return events

    def cancel(self, name):
        self.cancelled.append(name)

    def timeline(self, name):
        if int(name) < len(self.submitted) - 1:
            raise KeyError("timelines are kept of the latest request only")
        return SimpleNamespace(path=["C0"] if int(name) % 2 else ["P0", "D0"], jobs=[name], marks=[])

    def history(self, since):
        return {}  # its workers forget at once


@pytest.fixture
def slow(monkeypatch):
    def make(delay: float = 0.0, error: str | None = None) -> SlowCluster:
        cluster = SlowCluster(delay, error)
        monkeypatch.setattr(cluster_load, "time", cluster)
        return cluster
    return make


SCHEDULE = Schedule([Arrival(0.1 * number, 5 + number, 3) for number in range(10)], begin=0.2, end=0.8)


def test_requests_are_sent_when_they_are_due_though_none_is_answered(slow):
    load = serve_cluster(slow(delay=5.0), SCHEDULE)
    assert [one.arrival for one in load.records] == [arrival.time for arrival in SCHEDULE.arrivals]
    assert all(0 <= one.lateness <= STEP for one in load.records)  # at the next step's end, not at an answer's
    assert max(one.sent for one in load.records) < min(one.tokens[0] for one in load.records)
    assert all(one.ttft >= 5.0 and one.ttft == one.tokens[0] - one.arrival for one in load.records)


def test_what_is_sent_is_what_was_to_come(slow):
    cluster = slow()
    load = serve_cluster(cluster, SCHEDULE, mode="collocated", seed=3)
    prompts = [prompt for _, prompt, _, _ in cluster.submitted]
    assert [len(prompt) for prompt in prompts] == [arrival.prompt_len for arrival in SCHEDULE.arrivals]
    assert len(set(map(tuple, prompts))) == 10 and all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert {(sampling.max_tokens, sampling.ignore_eos, mode) for _, _, sampling, mode in cluster.submitted} == {(3, True, "collocated")}
    assert [(one.num_tokens, one.status) for one in load.records] == [(3, "completed")] * 10
    assert [one.mode for one in load.records] == ["disaggregated", "collocated"] * 5


def test_those_in_the_window_count(slow):
    assert [one.arrival for one in serve_cluster(slow(), SCHEDULE).counted] == [arrival.time for arrival in SCHEDULE.arrivals[2:8]]


def test_it_waits_neither_past_the_next_request_nor_longer_than_ctrl_c_may(slow):
    cluster = slow()
    serve_cluster(cluster, Schedule([Arrival(0.02, 4, 1), Arrival(1.0, 4, 1)], 0, 2))
    assert cluster.waits[0] == pytest.approx(0.02) and max(cluster.waits) == LONGEST_WAIT
    assert cluster.submitted[1][0] == pytest.approx(1001.0, abs=1e-3)


def test_an_answer_that_fails_is_a_failure_of_its_own(slow):
    load = serve_cluster(slow(error="the worker is gone"), SCHEDULE)
    assert {(one.status, one.error) for one in load.records} == {("failed", "the worker is gone")}


def test_a_request_that_is_refused_is_dropped_and_the_others_go_on(slow):
    cluster = slow()
    cluster.most_open = 1
    load = serve_cluster(cluster, Schedule([Arrival(0.0, 4, 3), Arrival(0.01, 4, 3), Arrival(1.0, 4, 3)], 0, 2))
    assert [one.status for one in load.records] == ["completed", "dropped", "completed"]
    assert load.records[1].error == "1 request is open" and not load.records[1].tokens


def test_how_far_it_is_is_told_every_second(slow):
    tallies = []
    serve_cluster(slow(delay=2.5), SCHEDULE, progress=tallies.append)
    assert [int(tally.seconds) for tally in tallies] == [1, 2, 3]
    assert [(tally.sent, tally.open, tally.ended) for tally in tallies] == [(10, 10, 0), (10, 10, 0), (10, 5, 5)]


def test_ctrl_c_gives_what_there_is_and_leaves_nothing_open(slow):
    cluster = slow(delay=0.25)
    cluster.interrupted_at = 1000.5
    with pytest.raises(Stopped) as stopped:
        serve_cluster(cluster, SCHEDULE)
    load = stopped.value.load
    assert [one.status for one in load.records] == ["completed"] * 2 + ["failed"] * 4
    assert load.records[-1].error == "the load was stopped" and cluster.cancelled == ["2", "3", "4", "5"]
    assert (load.begin, load.end) == (0.2, pytest.approx(0.5, abs=2 * STEP))
