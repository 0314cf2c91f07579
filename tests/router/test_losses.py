"""When an attempt comes to nothing: who is told what, and that the answers go on from what is written."""

from __future__ import annotations

import pytest
from router.script import STOP, Script, destination, in_decode, in_prefill, lost, prefilled, tokens

from nanopd.core import BeamSearchParams, FinishReason
from nanopd.messages import (
    Cancel,
    Corrupted,
    Prefill,
    ReleaseLease,
    Reserve,
    Resume,
    Serve,
    TransferFailed,
    WriteEnded,
)
from nanopd.router.central_scheduler import Stage


def written(message):
    """What a Serve or Resume says is written: {answer: its token ids}."""
    return {answer.index: answer.token_ids for answer in message.written}


def only(events):
    """(answer, token, reason) of each."""
    return [(event.index, event.token_id, event.finish_reason) for event in events]


def test_a_lost_collocated_worker_hands_its_requests_to_another_with_what_is_written():
    script = Script("C0 C1", "collocated")
    script.submit("a", n=2)
    script.step(("C0", tokens("a", 5)), ("C0", tokens("a", 6, index=1)), ("C0", tokens("a", 7, STOP)))
    script.told()
    assert script.step(("C0", tokens("a", 8, index=1)), lost("C0"))[0].token_id == 8  # said before it died
    script.step()
    (worker_id, serve), = script.sent
    assert worker_id == "C1" and serve.request.request_id == "a/1" and written(serve) == {1: [6, 8]}
    events = script.step(("C1", tokens("a/1", 9, STOP, index=1)))
    assert [(event.request_id, event.index, event.token_id) for event in events] == [("a", 1, 9)]
    script.assert_empty()
    assert str(script.central.timelines["a"]) == "C0 -> C1"


def test_nothing_written_begins_anew_and_so_does_a_beam_search():
    script = Script("C0 C1", "collocated")
    script.submit("a", beam=BeamSearchParams(2, 4))
    script.step(lost("C0"))
    script.told()
    script.step()
    assert script.sent == [("C1", Serve(script.central._entries["a"].job_request))]
    script.central.cancel("a")
    script.assert_empty()


def test_a_retried_request_keeps_its_place_in_line():
    script = Script("C0 C1", "collocated")
    script.submit(*"abcdefghijklmnopqrstuvwxyz")
    script.step(lost("C0"))
    on_c1 = [name for worker_id, _, name in script.told() if worker_id == "C1"]
    assert on_c1 == list("bdfhjlnprtv") and script.stage("w") is Stage.QUEUED
    script.step(*(("C1", tokens(name, end=STOP)) for name in on_c1))
    script.step()
    assert [name for _, _, name in script.told()] == [f"{name}/1" for name in "acegikmoqsu"]


def test_p_lost_in_prefill_the_lease_goes_back_and_the_prompt_is_computed_elsewhere():
    script = Script("P0 P1 D0")
    where = in_prefill(script)
    script.step(lost("P0"))
    assert script.sent == [("D0", ReleaseLease(where.lease_id, "writer")), ("D0", ReleaseLease(where.lease_id, "request"))]
    script.told()
    script.step(script.grant("D0", "a/1"))
    assert script.told() == [("D0", "Reserve", "a/1"), ("P1", "Prefill", "a/1")]
    again = destination(script, "a")
    assert only(script.step(("P1", tokens("a/1")), ("P1", prefilled(again, "a/1")))) == [(0, 5, None)]
    script.step(("D0", tokens("a/1", 6, STOP)))
    script.assert_empty()


def test_p_lost_after_a_cancel_and_before_it_stopped_writing():
    script = Script("P0 D0")
    where = in_prefill(script)
    script.central.cancel("a")
    script.told()
    script.step(lost("P0"))
    assert script.sent == [("D0", ReleaseLease(where.lease_id, "writer"))]
    script.assert_empty()


def test_first_tokens_said_before_p_was_lost_are_not_said_again():
    """P draws them again, whatever they are asked to be: nobody sees that."""
    script = Script("P0 P1 D0")
    in_prefill(script, n=2, stop_token_ids=[5])
    events = script.step(("P0", tokens("a", 5, STOP)), ("P0", tokens("a", 6, index=1)), lost("P0"))
    assert only(events) == [(0, 5, STOP), (1, 6, None)]
    script.told()
    script.step(script.grant("D0", "a/1"))
    (_, reserve), (_, prefill) = script.sent
    assert isinstance(reserve, Reserve) and reserve.request.sampling.n == 2 and isinstance(prefill, Prefill)
    sampling = prefill.request.sampling
    assert (sampling.n, sampling.stop_token_ids, sampling.ignore_eos) == (1, (), True) and sampling.max_tokens > 1
    again = destination(script, "a")
    script.told()
    assert script.step(("P1", tokens("a/1", 5)), ("P1", prefilled(again, "a/1"))) == []
    (_, resume), = script.sent
    assert isinstance(resume, Resume) and written(resume) == {1: [6]}
    assert only(script.step(("D0", tokens("a/1", 7, STOP, index=1)))) == [(1, 7, STOP)]
    script.assert_empty()


def recomputing(script, **params):
    """As in_decode, then D0 is lost, and P0 computes the prompt of "a/1" again. Returns where."""
    in_decode(script, **params)
    script.step(("D0", tokens("a", 6)), lost("D0"))
    script.step(script.grant("D1", "a/1"))
    script.told()
    return destination(script, "a")


def test_d_lost_in_decode():
    script = Script("P0 D0 D1")
    where = recomputing(script)
    script.step(("P0", tokens("a/1")), ("P0", prefilled(where, "a/1")))
    (worker_id, resume), = script.sent
    assert worker_id == "D1" and written(resume) == {0: [5, 6]}
    script.step(("D1", tokens("a/1", 7, STOP)))
    script.assert_empty()
    timeline = script.central.timelines["a"]
    assert str(timeline) == "P0 -> D0 -> P0 -> D1" and timeline.jobs == ["a", "a/1"]
    assert "D0 was lost (killed by SIGKILL)" in [what for what, _ in timeline.marks]


def test_a_fault_while_the_prompt_is_computed_again_ends_every_answer():
    script = Script("P0 D0 D1")
    where = recomputing(script)
    broken = tokens("a/1", None, FinishReason.ERROR)
    broken.events[0].error = "out of luck"
    events = script.step(("P0", broken), ("P0", WriteEnded("a/1", where)))
    assert [(event.index, event.finish_reason, event.error) for event in events] == [(0, FinishReason.ERROR, "out of luck")]
    script.assert_empty()


def test_one_of_several_answers_is_cancelled_while_the_prompt_is_computed_again():
    """P has a single answer in hand, which stands for all: it is not the one to be cancelled."""
    script = Script("P0 P1 D0")
    in_prefill(script, n=2)
    script.step(("P0", tokens("a", 5)), ("P0", tokens("a", 6, index=1)), lost("P0"))
    script.step(script.grant("D0", "a/1"))
    where = destination(script, "a")
    script.told()
    assert only(script.central.cancel("a", 0)) == [(0, None, FinishReason.ABORT)]
    assert script.told() == []
    script.step(("P1", tokens("a/1", 5)), ("P1", prefilled(where, "a/1")))
    (_, resume), = script.sent
    assert written(resume) == {1: [6]}
    script.step(("D0", tokens("a/1", 7, STOP, index=1)))
    script.assert_empty()


def test_d_lost_in_prefill_p_is_told_to_stop():
    script = Script("P0 D0 D1")
    where = in_prefill(script)
    script.step(lost("D0"))
    assert script.sent == [("P0", Cancel("a"))]
    script.told()
    script.step(("P0", WriteEnded("a", where)), script.grant("D1", "a/1"))
    assert script.told() == [("D1", "Reserve", "a/1"), ("P0", "Prefill", "a/1")]
    script.step(("P0", tokens("a/1", end=STOP)), ("P0", WriteEnded("a/1", destination(script, "a"))))
    script.assert_empty()


def test_d_lost_while_it_was_asked_for_blocks():
    script = Script("P0 D0 D1")
    script.submit("a")
    script.step(lost("D0"))
    script.told()
    script.step(script.grant("D1", "a/1"))
    assert script.told() == [("D1", "Reserve", "a/1"), ("P0", "Prefill", "a/1")]


def test_a_grant_that_comes_before_the_loss_of_the_last_p_goes_back():
    script = Script("P0 D0")
    script.submit("a")
    script.step()
    script.step(lost("P0"), script.grant("D0", "a"))
    assert script.told() == [("D0", "Reserve", "a"), ("D0", "ReleaseLease", 0), ("D0", "ReleaseLease", 0)]
    event, = script.step()
    assert event.error == "no prefill worker is left: P0 was lost (killed by SIGKILL)"
    script.assert_empty()


def test_what_is_said_about_an_earlier_attempt_is_passed_over():
    script = Script("P0 D0 D1")
    where = in_prefill(script)
    script.step(lost("D0"))
    script.told()
    script.step(("P0", tokens("a", 9)), ("P0", prefilled(where, "a")), script.grant("D1", "a/1"))
    assert script.told() == [("D1", "Reserve", "a/1"), ("P0", "Prefill", "a/1")]
    assert script.stage("a") is Stage.PREFILL
    script.central.cancel("a")
    script.step(("P0", WriteEnded("a/1", destination_of(script, "D1"))))
    script.assert_empty()


def destination_of(script, worker_id):
    """Of the only prompt that is on its way."""
    where, = script.central.fleet.workers["P0"].writes.values()
    assert where.worker_id == worker_id
    return where


def test_a_failed_transfer_is_tried_again():
    script = Script("P0 D0")
    where = in_prefill(script)
    events = script.step(("P0", tokens("a")), ("P0", TransferFailed("a", where, "the link broke")))
    assert only(events) == [(0, 5, None)]
    assert script.told() == [("D0", "ReleaseLease", where.lease_id), ("P0", "Cancel", "a"), ("D0", "ReleaseLease", where.lease_id)]
    script.step(script.grant("D0", "a/1"))
    where = destination(script, "a")
    script.told()
    script.step(("P0", tokens("a/1")), ("P0", prefilled(where, "a/1")))
    assert written(script.sent[0][1]) == {0: [5]}


def test_what_arrived_corrupted_is_sent_again():
    script = Script("P0 D0")
    in_decode(script)
    assert script.step(("D0", Corrupted("a"))) == []
    script.step(script.grant("D0", "a/1"))
    assert script.told()[-2:] == [("D0", "Reserve", "a/1"), ("P0", "Prefill", "a/1")]


def test_a_transfer_that_fails_after_the_request_has_ended_only_gives_the_lease_back():
    script = Script("P0 D0")
    where = in_prefill(script)
    script.step(("P0", tokens("a", end=STOP)), ("P0", TransferFailed("a", where, "the link broke")))
    assert script.sent == [("D0", ReleaseLease(0, "request")), ("D0", ReleaseLease(0, "writer"))]
    script.assert_empty()


def test_attempts_are_bounded_and_the_error_tells_all_of_them():
    script = Script("P0 D0")
    script.submit("a")
    for job in ("a", "a/1", "a/2"):
        script.step(script.grant("D0", job))
        assert script.step(("P0", TransferFailed(job, destination(script, "a"), "the link broke"))) == []
    script.step(script.grant("D0", "a/3"))
    event, = script.step(("P0", TransferFailed("a/3", destination(script, "a"), "no memory")))
    what = "the transfer from P0 to D0 failed"
    assert event.finish_reason is FinishReason.ERROR
    assert event.error == "gave up after 4 attempts: " + f"{what} (the link broke); " * 3 + f"{what} (no memory)"
    script.assert_empty()
    assert script.central.timelines["a"].jobs == ["a", "a/1", "a/2", "a/3"]


@pytest.mark.parametrize(("role", "name"), [("P", "prefill"), ("D", "decode")])
def test_with_the_last_worker_of_a_role_go_the_requests_that_need_it(role, name):
    script = Script("P0 D0 C0")
    script.submit("a", n=2)
    script.submit("c", mode="collocated")
    script.step(lost(f"{role}0"))
    events = script.step()
    assert only(events) == [(0, None, FinishReason.ERROR), (1, None, FinishReason.ERROR)]
    assert {event.error for event in events} == {f"no {name} worker is left: {role}0 was lost (killed by SIGKILL)"}
    script.submit("b")  # is let in, as before the loss, and told the same
    assert [event.error for event in script.step()] == [events[0].error]
    script.step(("C0", tokens("c", end=STOP)))
    if role == "P":
        script.step(script.refuse("D0", "a"))
    script.assert_empty()


def test_requests_in_decode_need_no_p_any_more():
    script = Script("P0 D0")
    in_decode(script)
    script.step(lost("P0"))
    assert only(script.step(("D0", tokens("a", 6, STOP)))) == [(0, 6, STOP)]
    script.assert_empty()
