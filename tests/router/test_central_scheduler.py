"""The central scheduler alone, with the workers' parts spoken by the test: every message in every order it may arrive."""

from __future__ import annotations

import pytest
from workers.fake_cluster import assert_nothing_in_hand

from nanopd.core import FinishReason, InvalidRequest, Request, SamplingParams, TokenEvent
from nanopd.engine.limits import Limits
from nanopd.messages import (
    Cancel,
    Destination,
    Granted,
    Prefill,
    Prefilled,
    Refused,
    ReleaseLease,
    Reserve,
    Resume,
    Serve,
    Tokens,
    WriteEnded,
    Written,
)
from nanopd.router.central_scheduler import CentralScheduler, Stage


class Script:
    """An executor whose workers say what the test lets them say. `sent` is what they were told since last asked."""

    def __init__(self, roles, mode="disaggregated"):
        self.roles = {worker_id: worker_id[0] for worker_id in roles.split()}
        self.sent = []
        self.says = []
        self.central = CentralScheduler(self, mode, Limits(100, 64, 32, 4, 8))
        self._leases = iter(range(100))

    def send(self, worker_id, message):
        self.sent.append((worker_id, message))

    def poll(self, timeout=0.0):
        says, self.says = self.says, []
        return says

    idle = True

    def submit(self, *names, **params):
        for name in names:
            self.central.submit(Request(name, [1, 2, 3], SamplingParams(**params)))

    def step(self, *says):
        """One step in which the workers say `says`, (worker id, message) each. Returns the events."""
        self.says = list(says)
        return self.central.step()

    def told(self):
        """(worker id, message type, request id or lease id) of what was sent since the last call."""
        sent, self.sent = self.sent, []
        return [(worker_id, type(message).__name__, name_of(message)) for worker_id, message in sent]

    def grant(self, worker_id, name):
        return worker_id, Granted(name, Destination(worker_id, next(self._leases), [7], 0))

    def refuse(self, worker_id, name):
        return worker_id, Refused(name)

    def stage(self, name):
        return self.central._entries[name].stage

    def assert_empty(self):
        assert_nothing_in_hand(self.central)


def name_of(message):
    if isinstance(message, (Serve, Reserve, Prefill, Resume)):
        return message.request.request_id
    return message.lease_id if isinstance(message, ReleaseLease) else message.request_id


def destination(script, name):
    return script.central._entries[name].destination


def tokens(name, token=5, end=None, index=0):
    return Tokens([TokenEvent(name, index, token, finish_reason=end)])


def prefilled(where, name, *firsts):
    return Prefilled(name, where, [Written(index, [5], [-1.0], end) for index, end in firsts or ((0, None),)])


STOP = FinishReason.STOP


def test_a_request_goes_from_d_to_p_to_d():
    script = Script("P0 D0")
    script.submit("a")
    script.step(script.grant("D0", "a"))
    assert script.told() == [("D0", "Reserve", "a"), ("P0", "Prefill", "a")]
    where = destination(script, "a")
    assert [event.token_id for event in script.step(("P0", tokens("a")), ("P0", prefilled(where, "a")))] == [5]
    assert script.told() == [("D0", "Resume", "a")] and script.stage("a") is Stage.DECODE
    assert [event.token_id for event in script.step(("D0", tokens("a", 6)), ("D0", tokens("a", 7, STOP)))] == [6, 7]
    assert script.told() == []
    script.assert_empty()
    assert str(script.central.timelines["a"]) == "P0 -> D0"


def test_requests_are_spread_over_the_workers_of_a_role():
    script = Script("P0 P1 D0 D1 D2")
    script.submit(*"abcdef")
    script.step()
    reserved = [worker_id for worker_id, kind, _ in script.told()]
    assert reserved == ["D0", "D1", "D2"] * 2
    script.step(*(script.grant(worker_id, name) for worker_id, name in zip(reserved, "abcdef")))
    assert [worker_id for worker_id, kind, _ in script.told()] == ["P0", "P1"] * 3
    script.central.cancel("b")  # P1 and D1 have the least to do now, once P1 says that it has stopped
    script.step(("P1", WriteEnded("b", Destination("D1", 1, [7], 0))))
    script.told()
    script.submit("g")
    script.step(script.grant("D1", "g"))
    assert script.told() == [("D1", "Reserve", "g"), ("P1", "Prefill", "g")]


def test_collocated_requests_go_to_the_least_loaded():
    script = Script("C0 C1", "collocated")
    script.submit(*"abc")
    script.step()
    assert script.told() == [("C0", "Serve", "a"), ("C1", "Serve", "b"), ("C0", "Serve", "c")]
    script.step(("C0", tokens("a", end=STOP)), ("C0", tokens("c", end=STOP)))
    script.submit("d")
    script.step(("C0", tokens("d", end=STOP)), ("C1", tokens("b", end=STOP)))
    assert script.told() == [("C0", "Serve", "d")]
    script.assert_empty()


def test_a_refused_request_asks_the_next_worker_then_whoever_has_news():
    script = Script("P0 D0 D1")
    script.submit("a")
    script.step(script.refuse("D0", "a"))
    script.step(script.refuse("D1", "a"))
    assert [worker_id for worker_id, _, _ in script.told()] == ["D0", "D1"]
    script.step()
    assert script.told() == []  # neither has anything new: asking again would only spin
    script.step(("D1", tokens("another")))
    script.step(script.refuse("D1", "a"))
    assert script.told() == [("D1", "Reserve", "a")]
    assert script.central.timelines["a"].num_refusals == 3
    script.step(("D0", tokens("another")))
    script.step(script.grant("D0", "a"))
    script.central.cancel("a")
    script.step(("P0", WriteEnded("a", Destination("D0", 0, [7], 0))))
    script.assert_empty()


def test_what_a_worker_was_told_after_it_was_asked_is_news_too():
    """The blocks of one that is cancelled come back after the refusal, and D has nothing to say about that."""
    script = Script("P0 D0")
    where = in_prefill(script)
    script.submit("b")
    script.step()
    script.central.cancel("a")
    script.step(("P0", WriteEnded("a", where)))
    script.told()
    script.step(script.refuse("D0", "b"))
    script.step(script.grant("D0", "b"))
    assert script.told() == [("D0", "Reserve", "b"), ("P0", "Prefill", "b")]


def test_a_worker_is_asked_for_no_more_than_it_can_seat():
    script = Script("P0 D0")
    script.submit("a", n=5)
    script.submit("b", n=3)
    script.submit("c")
    script.step()
    assert script.told() == [("D0", "Reserve", "a"), ("D0", "Reserve", "b")]
    script.central.cancel("b")
    script.step(script.refuse("D0", "b"))
    script.step()
    assert script.told() == [("D0", "Reserve", "c")]


def test_a_refused_request_holds_back_those_behind_it_until_it_is_granted():
    script = Script("P0 D0")
    script.submit("a")
    script.step(script.refuse("D0", "a"))
    script.submit("b")
    script.step(("D0", tokens("another")))
    script.step(script.refuse("D0", "a"))
    script.step(("D0", tokens("another")))
    assert script.told() == [("D0", "Reserve", "a")] * 2
    script.step(script.grant("D0", "a"))
    script.told()
    script.step()
    assert script.told() == [("D0", "Reserve", "b")]


def test_cancelled_while_queued():
    script = Script("P0 D0")
    script.submit("a")
    assert [event.finish_reason for event in script.central.cancel("a")] == [FinishReason.ABORT]
    script.step()
    assert script.told() == []
    script.assert_empty()


@pytest.mark.parametrize("granted", [True, False])
def test_cancelled_while_reserving(granted):
    script = Script("P0 D0")
    script.submit("a")
    script.step()
    script.central.cancel("a")
    assert script.told() == [("D0", "Reserve", "a")]
    script.step(script.grant("D0", "a") if granted else script.refuse("D0", "a"))
    assert script.told() == ([("D0", "ReleaseLease", 0)] * 2 if granted else [])
    script.assert_empty()


def in_prefill(script, **params):
    script.submit("a", **params)
    script.step(script.grant("D0", "a"))
    script.told()
    return destination(script, "a")


def test_cancelled_in_prefill_each_holder_lets_go_for_itself():
    script = Script("P0 D0")
    where = in_prefill(script)
    script.central.cancel("a")
    assert script.sent == [("P0", Cancel("a")), ("D0", ReleaseLease(0, "request"))]
    script.told()
    assert script.step(("P0", tokens("a", None, FinishReason.ABORT)), ("P0", WriteEnded("a", where))) == []
    assert script.sent == [("D0", ReleaseLease(0, "writer"))]
    script.assert_empty()


def test_cancelled_in_prefill_while_prefilled_is_on_its_way():
    script = Script("P0 D0")
    where = in_prefill(script)
    script.central.cancel("a")
    script.told()
    assert script.step(("P0", tokens("a")), ("P0", prefilled(where, "a"))) == []
    assert script.sent == [("D0", ReleaseLease(0, "writer"))]
    script.assert_empty()


def test_cancelled_in_decode():
    script = Script("P0 D0")
    where = in_prefill(script)
    script.step(("P0", tokens("a")), ("P0", prefilled(where, "a")))
    script.told()
    script.central.cancel("a")
    assert script.sent == [("D0", Cancel("a"))]
    assert script.step(("D0", tokens("a", 6)), ("D0", tokens("a", None, FinishReason.ABORT))) == []
    script.assert_empty()


@pytest.mark.parametrize("end", [STOP, FinishReason.LENGTH, FinishReason.ERROR])
def test_what_ends_on_p_gives_its_lease_back(end):
    script = Script("P0 D0")
    where = in_prefill(script)
    events = script.step(("P0", tokens("a", end=end)), ("P0", WriteEnded("a", where)))
    assert [event.finish_reason for event in events] == [end]
    assert script.sent == [("D0", ReleaseLease(0, "request")), ("D0", ReleaseLease(0, "writer"))]
    script.assert_empty()


def test_of_several_answers_those_that_go_on_are_resumed():
    script = Script("P0 D0")
    where = in_prefill(script, n=3)
    assert script.central.cancel("a", 2) == []  # it has not begun
    events = script.step(("P0", tokens("a", index=0, end=STOP)), ("P0", tokens("a", index=1)), ("P0", tokens("a", index=2)))
    assert [event.index for event in events] == [0, 1, 2]
    cancelled = script.central.cancel("a", 2)
    assert [event.index for event in cancelled] == [2] and script.sent == [("P0", Cancel("a", 2))]
    script.told()
    script.step(("P0", prefilled(where, "a", (0, STOP), (1, None), (2, None))))
    (_, resume), = script.sent
    assert [(first.index, first.token_ids, first.finish_reason) for first in resume.written] == [(1, [5], None)]
    script.step(("D0", tokens("a", 6, STOP, index=1)))
    script.assert_empty()


def test_an_answer_ends_once_whatever_comes_later():
    script = Script("C0", "collocated")
    script.submit("a", n=2)
    script.step()
    late = tokens("a", 9, STOP)
    assert len(script.step(("C0", tokens("a", 8, STOP)), ("C0", late))) == 1
    assert [event.index for event in script.central.cancel("a")] == [1]
    assert script.central.cancel("a") == [] and script.step(("C0", late)) == []
    script.assert_empty()


def test_what_can_never_be_served_is_refused_at_once():
    script = Script("P0 D0")
    with pytest.raises(InvalidRequest, match="a batch holds 8"):
        script.submit("a", n=9)
    script.assert_empty()
