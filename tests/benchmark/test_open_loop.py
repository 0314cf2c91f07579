"""An open loop, on a cluster that takes its time and by a clock that the test keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanopd.benchmark import open_loop
from nanopd.benchmark.open_loop import LONGEST_WAIT, Measured, serve_open_loop
from nanopd.core import FinishReason, TokenEvent
from nanopd.simulator import Arrival

STEP = 0.03  # seconds that a busy cluster takes for a step, whatever it is asked to wait


class SlowCluster:
    """Every answer has begun after `delay` seconds, and has a token more with each step. Every other one goes through two
    workers."""

    limits = SimpleNamespace(vocab_size=50)

    def __init__(self, delay: float, error: str | None = None) -> None:
        self.now, self.delay, self.error = 1000.0, delay, error
        self.submitted, self.waits = [], []
        self.open = {}

    def monotonic(self) -> float:
        return self.now

    def submit(self, prompt, sampling, mode=None):
        name = str(len(self.submitted))
        self.submitted.append((self.now, prompt["prompt_token_ids"], sampling, mode))
        self.open[name] = [self.now + self.delay, sampling.max_tokens]
        return SimpleNamespace(request_id=name)

    def step(self, timeout):
        self.waits.append(timeout)
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

    def timeline(self, name):
        return SimpleNamespace(path=["C0"] if int(name) % 2 else ["P0", "D0"])


@pytest.fixture
def slow(monkeypatch):
    def make(delay: float = 0.0, error: str | None = None) -> SlowCluster:
        cluster = SlowCluster(delay, error)
        monkeypatch.setattr(open_loop, "time", cluster)
        return cluster
    return make


ARRIVALS = [Arrival(0.1 * number, 5 + number, 3) for number in range(10)]


def test_requests_are_sent_when_they_are_due_though_none_is_answered(slow):
    cluster = slow(delay=5.0)
    served = serve_open_loop(cluster, ARRIVALS)
    assert len(served) == 10
    for arrival, one in zip(ARRIVALS, served):
        assert one.arrival == 1000.0 + arrival.time
        assert 0 <= one.sent - one.arrival <= STEP  # at the next step's end, not at an answer's
    assert max(one.sent for one in served) < min(one.tokens[0] for one in served)
    assert all(one.ttft >= 5.0 and one.ttft == one.tokens[0] - one.arrival for one in served)


def test_what_is_sent_is_what_was_to_come(slow):
    cluster = slow()
    served = serve_open_loop(cluster, ARRIVALS, mode="collocated", seed=3)
    prompts = [prompt for _, prompt, _, _ in cluster.submitted]
    assert [len(prompt) for prompt in prompts] == [arrival.prompt_len for arrival in ARRIVALS]
    assert len(set(map(tuple, prompts))) == 10 and all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert {(sampling.max_tokens, sampling.ignore_eos, mode) for _, _, sampling, mode in cluster.submitted} == {(3, True, "collocated")}
    assert [one.num_tokens for one in served] == [3] * 10
    assert [one.mode for one in served] == ["disaggregated", "collocated"] * 5


def test_it_waits_neither_past_the_next_request_nor_longer_than_ctrl_c_may(slow):
    cluster = slow()
    serve_open_loop(cluster, [Arrival(0.02, 4, 1), Arrival(1.0, 4, 1)])
    assert cluster.waits[0] == pytest.approx(0.02) and max(cluster.waits) == LONGEST_WAIT
    assert cluster.submitted[1][0] == pytest.approx(1001.0, abs=1e-3)


def test_an_answer_that_fails_is_no_result(slow):
    with pytest.raises(RuntimeError, match="the worker is gone"):
        serve_open_loop(slow(error="the worker is gone"), ARRIVALS)


def test_times_of_one_request():
    one = Measured(arrival=10.0, sent=10.5, tokens=[11.0, 11.5, 13.0])
    assert (one.num_tokens, one.ttft, one.tpot, one.e2e) == (3, 1.0, 1.0, 3.0)
    assert Measured(10.0, 10.0, tokens=[11.0]).tpot is None
