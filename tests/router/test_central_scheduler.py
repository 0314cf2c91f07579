"""The central scheduler alone, with the workers' parts spoken by the test: every message in every order it may arrive."""

from __future__ import annotations

import pytest
from router.script import STOP, Script, destination, in_decode, in_prefill, prefilled, tokens

from nanopd.config import ConfigError
from nanopd.core import BeamSearchParams, FinishReason, InvalidRequest, Overloaded
from nanopd.messages import Cancel, Destination, ReleaseLease, WriteEnded
from nanopd.router.central_scheduler import Stage


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


# ---------------------------------------------------------------------------------- admission and two pipelines


def test_collocated_requests_wait_here_once_a_worker_has_its_seats_full_and_a_few_in_line():
    script = Script("C0", "collocated")
    script.submit("a", n=8)
    script.submit("b", n=3)
    script.submit("c", n=1)
    script.submit("d", n=2)
    script.step()
    assert script.told() == [("C0", "Serve", "a"), ("C0", "Serve", "b")]  # 8 seats and 3 in line
    script.step(("C0", tokens("a", end=STOP)))  # one of the eight answers
    script.step()
    assert script.told() == [("C0", "Serve", "c")]
    script.step(("C0", tokens("c", end=STOP)))
    assert script.told() == []  # two don't fit yet
    script.step(("C0", tokens("b", end=STOP)))
    script.step()
    assert script.told() == [("C0", "Serve", "d")]


def test_too_many_open_requests_are_not_let_in():
    script = Script("C0", "collocated", max_queued=2)
    script.submit("a", "b")
    with pytest.raises(Overloaded, match="2 requests are open.*raise max_queued"):
        script.submit("c")
    script.central.cancel("a")
    script.submit("c")


def test_each_request_may_have_its_own_pipeline_and_the_lines_do_not_wait_for_one_another():
    script = Script("P0 D0 C0")
    script.submit("a")
    script.step(script.refuse("D0", "a"))
    script.submit("b")
    script.submit("c", mode="collocated")
    script.step()
    assert script.told() == [("D0", "Reserve", "a"), ("C0", "Serve", "c")]


@pytest.mark.parametrize(("mode", "message"), [("collocated", "needs workers of role C; this cluster has D P"),
                                               ("adaptive", "needs a router, and this cluster was made without one")])
def test_a_pipeline_that_is_not_there(mode, message):
    with pytest.raises(InvalidRequest, match=message):
        Script("P0 D0").submit("a", mode=mode)


def test_answers_are_no_longer_than_any_worker_can_hold():
    script = Script("C0", "collocated")
    script.submit("a", max_tokens=None, min_tokens=70)
    script.submit("b", max_tokens=61)
    script.submit("c", beam=BeamSearchParams(2, 99))
    script.step()
    a, b, c = (message.request for _, message in script.sent)
    assert (a.sampling.max_tokens, a.sampling.min_tokens, b.sampling.max_tokens, c.beam.max_tokens) == (61, 61, 61, 61)


# ------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("stage", list(Stage)[:-1])
def test_a_request_past_its_deadline_is_ended_wherever_it_is(stage):
    script = Script("P0 D0")
    script.submit("z", n=8)
    script.step(script.grant("D0", "z"))
    where = destination(script, "z")
    if stage is not Stage.QUEUED:
        script.central.cancel("z")
    script.submit("a", timeout=2)
    script.step(*([script.grant("D0", "a")] if stage in (Stage.PREFILL, Stage.DECODE) else []))
    if stage is Stage.DECODE:
        script.step(("P0", tokens("a")), ("P0", prefilled(destination(script, "a"), "a")))
    assert script.stage("a") is stage
    script.clock.now += 1.9
    assert script.step() == []
    script.told()
    script.clock.now += 0.1
    event, = script.step()
    assert event.finish_reason is FinishReason.ERROR and event.error == "timed out after 2 s (deadline given at submission)"
    told = {Stage.PREFILL: [("P0", "Cancel", "a"), ("D0", "ReleaseLease", 1)], Stage.DECODE: [("D0", "Cancel", "a")]}
    assert script.told() == told.get(stage, [])
    script.central.cancel("z")
    late = {Stage.RESERVING: [script.refuse("D0", "a")], Stage.PREFILL: [("P0", WriteEnded("a", Destination("D0", 1, [7], 0)))]}
    script.step(("P0", WriteEnded("z", where)), *late.get(stage, []))
    script.assert_empty()


def test_a_step_waits_no_longer_than_until_the_next_deadline():
    script = Script("C0", "collocated")
    script.submit("a", timeout=2)
    script.submit("b", timeout=0.25)
    script.step(timeout=0.5)
    assert script.waited == 0.25
    script.clock.now += 0.25
    script.step(timeout=0.5)
    assert script.waited == 0.0  # there is an end to tell
    script.step(timeout=0.5)
    assert script.waited == 0.5
    script.central.cancel("a")
    script.clock.now += 1.5
    script.step(timeout=0.5)
    assert script.waited == 0.5  # whose deadline that was has ended


# ---------------------------------------------------------------------------------------------- role switches


def test_a_worker_changes_its_role_when_it_has_ended_what_it_has():
    script = Script("P0 D0 D1")
    in_decode(script)
    script.central.set_role("D0", "P")
    script.submit("b", "c")
    script.step()
    assert script.told() == [("D1", "Reserve", "b"), ("D1", "Reserve", "c")]
    script.step(script.grant("D1", "b"))
    assert script.told() == [("P0", "Prefill", "b")]
    script.step(("D0", tokens("a", 6, STOP)))
    assert script.told() == [("D0", "SetRole", "P")] and script.roles["D0"] == "P"
    script.step(script.grant("D1", "c"))
    assert script.told() == [("D0", "Prefill", "c")]


def test_an_idle_worker_changes_its_role_at_once_and_a_change_can_be_taken_back():
    script = Script("P0 D0 D1")
    script.central.set_role("D1", "C")
    assert script.told() == [("D1", "SetRole", "C")]
    script.central.set_role("D1", "D")
    in_decode(script)
    script.central.set_role("D0", "P")
    script.central.set_role("D0", "D")
    script.step(("D0", tokens("a", 6, STOP)))
    assert [told for told in script.told() if told[1] == "SetRole"] == [] and script.roles == {"P0": "P", "D0": "D", "D1": "D"}


@pytest.mark.parametrize(("worker_id", "role", "message"), [
    ("P0", "D", "P0 is the last prefill worker"), ("C0", "P", "C0 is the last collocated worker"),
    ("D7", "P", "no worker 'D7'; workers are P0, D0, D1, C0"), ("D0", "X", "unknown role 'X'"),
])
def test_a_role_switch_that_would_leave_requests_without_a_worker_is_refused(worker_id, role, message):
    script = Script("P0 D0 D1 C0")
    script.submit("a", mode="collocated")
    with pytest.raises(ConfigError, match=message):
        script.central.set_role(worker_id, role)
    script.central.set_role("D0", "P")
    with pytest.raises(ConfigError, match="D1 is the last decode worker"):
        script.central.set_role("D1", "P")
    script.central.set_role("P0", "D")  # D0 computes prompts now


def test_a_worker_whose_loss_is_not_told_yet_does_not_come_back_by_changing_its_role():
    script = Script("P0 D0 D1")
    del script.roles["D1"]
    script.central.set_role("D1", "P")
    assert "D1" not in script.roles and script.told() == []
