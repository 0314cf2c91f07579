"""Adaptive mode: the router is asked, obeyed, asked again when things go wrong, and kept from doing harm."""

from __future__ import annotations

import pytest
from cost_model.models import MODEL
from router.script import STOP, Script, destination, in_prefill, lost, prefilled, tokens
from workers.serving import (
    MIX,
    Reference,
    assert_nothing_leaked,
    assert_tokens_equal_reference,
    greedy,
    prompt,
    serve_mix,
)

from nanopd.cluster import Cluster
from nanopd.config import SLO, ConfigError
from nanopd.core import BeamSearchParams, FinishReason, InvalidRequest, Request, SamplingParams
from nanopd.messages import Corrupted, Serve, TransferFailed
from nanopd.router.central_scheduler import Stage
from nanopd.router.policies import ROUTERS, AlwaysCollocated, AlwaysDisaggregated
from nanopd.router.routing import Decision, Route, Score


class Scripted:
    """Answers what it is told to, in turn, and then always the last; keeps what it was asked and told."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked, self.told = [], []

    def choose(self, question, workers):
        self.asked.append((question, {worker.worker_id: worker for worker in workers}))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            prefill, _, decode = answer.partition(">")
            return Decision(Route(prefill, decode or prefill))
        return answer

    def ended(self, answer):
        self.told.append(answer)


def adaptive(roles, *answers, **options):
    return Script(roles, "adaptive", router=Scripted(*answers), **options)


# ------------------------------------------------------------------------------------------- where it is sent


def test_it_goes_where_the_router_says():
    script = adaptive("C0 C1 P0 P1 D0 D1", "C1", "P1>D1")
    script.submit("a", "b")
    script.step(script.grant("D1", "b"))
    assert script.told() == [("C1", "Serve", "a"), ("D1", "Reserve", "b"), ("P1", "Prefill", "b")]
    question, seen = script.central.router.asked[0]
    assert (question.request_id, question.prompt_len, question.max_tokens, question.arrival) == ("a", 3, 16, script.clock.now)
    assert sorted(seen) == ["C0", "C1", "D0", "D1", "P0", "P1"]
    assert [str(script.central.timelines[name]) for name in "ab"] == ["C1", "P1"]


def test_a_collocated_worker_may_be_either_end_of_a_pair():
    script = adaptive("C0 C1 P0", "C0>C1", "P0>C1")
    script.submit("a", "b")
    script.step(script.grant("C1", "a"), script.grant("C1", "b"))
    assert script.told() == [("C1", "Reserve", "a"), ("C1", "Reserve", "b"), ("C0", "Prefill", "a"), ("P0", "Prefill", "b")]
    for worker_id, job in (("C0", "a"), ("P0", "b")):
        script.step((worker_id, tokens(job)), (worker_id, prefilled(destination(script, job), job)))
    assert [str(script.central.timelines[name]) for name in "ab"] == ["C0 -> C1", "P0 -> C1"]
    script.step(("C1", tokens("a", end=STOP)), ("C1", tokens("b", end=STOP)))
    script.assert_empty()


@pytest.mark.parametrize("what", ["granted", "refused", "cancelled"])
def test_a_prompt_is_in_line_from_the_moment_that_its_route_is_chosen(what):
    """Whoever comes at the same moment sees it there, though the room that it waits for has not been granted."""
    script = adaptive("P0 P1 D0", "P0>D0", None)
    book = script.central.fleet.workers["P0"].book
    script.submit("a")
    script.step()
    assert (book.queue_work.prompt_tokens, book.total.held) == (3, 3)
    if what == "cancelled":
        script.central.cancel("a")
    script.step(*{"granted": [script.grant("D0", "a")], "refused": [script.refuse("D0", "a")], "cancelled": []}[what])
    assert (book.queue_work.prompt_tokens, book.total.held) == ((3, 3) if what == "granted" else (0, 0))
    assert (book.prompts_per_second(script.clock.now)[0] > 0) == (what == "granted")


def finish(script, name, prefill, decode):
    script.step((prefill, tokens(name)), (prefill, prefilled(destination(script, name), name)))
    script.step((decode, tokens(name, end=STOP)))


@pytest.mark.parametrize("granted", [False, True])
def test_who_computes_for_others_keeps_no_room_for_others_until_that_is_done(granted):
    """From the moment on that it is to compute, though the room for that is not granted yet."""
    script = adaptive("C0 C1 P0", "C0>C1", "P0>C0")
    grant = [script.grant("C1", "a")]
    script.submit("a")
    script.step(*grant * granted)
    script.submit("b")
    script.step(*grant * (not granted))
    script.step()
    assert script.told() == [("C1", "Reserve", "a"), ("C0", "Prefill", "a")]
    finish(script, "a", "C0", "C1")
    script.step(script.grant("C0", "b"))
    assert script.told()[-2:] == [("C0", "Reserve", "b"), ("P0", "Prefill", "b")]
    finish(script, "b", "P0", "C0")
    script.assert_empty()


def test_who_keeps_room_for_others_computes_for_no_others():
    script = adaptive("C0 C1 P0", "P0>C0", "C0>C1")
    script.submit("a", "b")
    script.step(script.grant("C0", "a"))
    script.step()
    assert script.told() == [("C0", "Reserve", "a"), ("P0", "Prefill", "a")]
    finish(script, "a", "P0", "C0")
    script.step(script.grant("C1", "b"))
    assert script.told()[-2:] == [("C1", "Reserve", "b"), ("C0", "Prefill", "b")]


@pytest.mark.parametrize("what", ["refused", "cancelled", "lost"])
def test_who_is_to_compute_no_more_may_keep_room_again(what):
    script = adaptive("C0 C1 P0", "C0>C1", "P0>C0")
    script.submit("a")
    script.step()
    if what == "cancelled":
        script.central.cancel("a")
    script.submit("b")
    script.step(*{"refused": [script.refuse("C1", "a")], "cancelled": [], "lost": [lost("C1")]}[what])
    script.step()
    assert ("C0", "Reserve") in {told[:2] for told in script.told()}


def test_the_best_route_that_makes_no_circle_is_taken():
    """Of those that the router has scored."""
    def score(prefill, decode):
        return Score(Route(prefill, decode), {}, 0.0, 0.0, 0.0, 0.0)

    decision = Decision(Route("P0", "C0"), [score("P0", "C0"), score("P0", "C1"), score("C1", "C1")])
    script = adaptive("C0 C1 P0", "C0>C1", decision)
    script.submit("a", "b")
    script.step()
    assert script.told() == [("C1", "Reserve", "a"), ("C1", "Reserve", "b")]
    assert script.central.timelines["b"].decision.route == Route("P0", "C1")


def test_views_show_what_workers_have_in_hand():
    script = adaptive("C0 P0 D0", "C0", "P0>D0", None, devices={"C0": "cuda:3"})
    script.submit("a", "b")
    script.step(("C0", tokens("a")), script.grant("D0", "b"))
    script.submit("c")
    script.step()
    _, seen = script.central.router.asked[-1]
    assert (seen["C0"].device, seen["D0"].device, seen["C0"].role) == ("cuda:3", None, "C")
    assert (seen["C0"].running.decodes, seen["C0"].running.context_tokens, seen["C0"].queued.prompt_tokens) == (1, 4, 0)
    assert (seen["P0"].queued.prompt_tokens, seen["P0"].queued_since) == (3, script.clock.now)
    assert (seen["D0"].seats, seen["D0"].free_seats, seen["D0"].free_tokens) == (1, 7, 64 * 4 - 3)
    assert seen["P0"].sending_tokens == 0 and seen["P0"].cached_tokens == 0 and "D0" in repr(seen["D0"])
    assert seen["C0"].prompts_per_second[0] > 0


def test_none_is_to_wait_and_holds_back_those_behind():
    script = adaptive("C0", None, None, "C0")
    script.submit("a", "b")
    script.step()
    script.step()
    assert script.told() == []
    script.step()
    assert script.told() == [("C0", "Serve", "a"), ("C0", "Serve", "b")]


def test_nobody_is_asked_where_there_is_no_room():
    script = adaptive("C0", "C0")
    script.submit("a", n=8)
    script.submit("b", n=8)
    script.step()
    script.step()
    assert script.told() == [("C0", "Serve", "a")] and len(script.central.router.asked) == 1


def test_after_a_refusal_it_is_asked_anew_and_those_behind_wait():
    script = adaptive("C0 P0 D0", "P0>D0", "C0")
    script.submit("a", "b")
    script.step(script.refuse("D0", "a"))
    assert script.stage("b") is Stage.DECODE  # asked before the refusal was said
    script.step()
    assert script.told() == [("D0", "Reserve", "a"), ("C0", "Serve", "b"), ("C0", "Serve", "a")]


def test_the_prefill_worker_may_have_gone_meanwhile():
    script = adaptive("P0 P1 D0", "P1>D0")
    script.submit("a")
    script.step(lost("P1"), script.grant("D0", "a"))
    assert script.told()[-1] == ("P0", "Prefill", "a")
    assert str(script.central.timelines["a"]) == "P0"


def test_a_request_may_name_its_pipeline_all_the_same():
    script = adaptive("C0 P0 D0", "C0")
    script.submit("a", mode="disaggregated")
    script.step()
    assert script.told() == [("D0", "Reserve", "a")] and script.central.router.asked == []
    with pytest.raises(InvalidRequest, match="no router was asked about this request"):
        script.central.explain("a")


# -------------------------------------------------------------------------------------------- when things break


def test_a_loss_is_routed_anew_and_what_is_written_is_told():
    script = adaptive("C0 P0 D0", "P0>D0", "C0")
    where = in_prefill(script)
    script.step(("P0", tokens("a")), ("P0", prefilled(where, "a")))
    script.told()
    script.step(lost("D0"))
    script.step()
    (worker_id, serve), = script.sent
    assert worker_id == "C0" and isinstance(serve, Serve) and serve.written[0].token_ids == [5]
    question, seen = script.central.router.asked[-1]
    assert question.written == 1 and set(seen) == {"C0", "P0"}


@pytest.mark.parametrize("what", ["failed", "corrupted"])
def test_a_broken_transfer_is_routed_anew(what):
    script = adaptive("C0 P0 D0", "P0>D0", "C0")
    where = in_prefill(script)
    if what == "failed":
        script.step(("P0", TransferFailed("a", where, "the link broke")))
    else:
        script.step(("P0", tokens("a")), ("P0", prefilled(where, "a")))
        script.step(("D0", Corrupted("a")))
    script.told()
    script.step()
    assert script.told() == [("C0", "Serve", "a/1")]


def test_with_one_pipeline_left_it_goes_on_and_with_none_it_says_why():
    script = Script("C0 P0 D0", "adaptive", router=AlwaysDisaggregated())
    script.submit("a")
    script.step(lost("P0"), script.grant("D0", "a"))
    script.step()
    assert script.told()[-1] == ("C0", "Serve", "a")
    script.submit("b")
    script.step(lost("C0"))
    events = script.step()
    assert {event.error for event in events} == {
        "no collocated worker is left: C0 was lost (killed by SIGKILL); "
        "no prefill worker is left: P0 was lost (killed by SIGKILL)"}
    script.assert_empty()


def test_roles_may_change_as_long_as_one_pipeline_is_whole():
    script = Script("C0 P0 D0", "adaptive", router=AlwaysCollocated())
    script.central.set_role("P0", "C")
    with pytest.raises(ConfigError, match="C0 is the last collocated worker"):
        Script("C0 P0", "adaptive", router=AlwaysCollocated()).central.set_role("C0", "D")
    script.central.set_role("C0", "D")
    with pytest.raises(ConfigError, match="P0 is the last collocated worker"):
        script.central.set_role("P0", "D")


@pytest.mark.parametrize("answer, says", [
    ("X7", "the router Scripted sent it to X7, but there is no worker 'X7'; open are C0 .C., P0 .P., D0 .D.$"),
    ("P0", "sent it to P0, but P0 has role P, and role C is needed there"),
    ("D0>P0", "D0 -> P0, but D0 has role D, and role P or C is needed there"),
    ("C0>P0", "C0 -> P0, but P0 has role P, and role D or C is needed there"),
    (Decision(Route(3, 4)), "there is no worker 3"),
    (Route("P0", "D0"), r"answered Route\(.*it must be Decision\(Route\(...\)\), or None to wait"),
    (7, "answered 7"), (ZeroDivisionError("by nought"), "the router Scripted failed: ZeroDivisionError: by nought"),
])
def test_what_makes_no_sense_ends_that_request_and_no_other(answer, says):
    script = adaptive("C0 P0 D0", answer, "C0")
    script.submit("a", "b")
    events = script.step()
    assert [(event.request_id, event.finish_reason) for event in events] == [("a", FinishReason.ERROR)]
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(events[0].error)
    assert script.told() == [("C0", "Serve", "b")]
    script.central.cancel("b")
    script.assert_empty()


def test_a_closed_worker_is_no_answer():
    script = adaptive("C0 C1", "C0")
    script.submit("a", n=8)
    script.submit("b", n=8)
    event, *_ = script.step()
    assert event.request_id == "b" and "C0 is not open now; open are C1 (C)" in event.error


def test_a_router_that_fails_when_told_of_an_end_harms_nobody():
    class Forgetful(AlwaysCollocated):
        def ended(self, answer):
            raise KeyError("where was I")

    script = Script("C0", "adaptive", router=Forgetful())
    script.submit("a")
    with pytest.warns(UserWarning, match=r"Forgetful failed in ended\(\): KeyError: 'where was I'"):
        assert script.step(("C0", tokens("a", end=STOP)))[0].finish_reason is STOP


# ------------------------------------------------------------------------------------------- what it is told


def told(script):
    return [(each.request_id, each.prompt_len, each.output_len, each.cut) for each in script.central.router.told]


def test_the_router_is_told_of_every_answer_when_it_has_ended():
    script = adaptive("C0", "C0")
    script.submit("a", n=2)
    script.step(("C0", tokens("a")), ("C0", tokens("a", index=1)), ("C0", tokens("a", 6, STOP)))
    assert told(script) == [("a", 3, 2, False)]
    script.step(("C0", tokens("a", 6, FinishReason.LENGTH, index=1)))
    assert told(script) == [("a", 3, 2, False), ("a", 3, 2, True)]
    assert script.central.router.told[0].decision.route == Route("C0", "C0")


@pytest.mark.parametrize("num_written", [0, 2])
def test_an_answer_that_is_broken_off_would_have_been_longer_and_none_tells_nothing(num_written):
    script = adaptive("C0", "C0")
    script.submit("a")
    script.step(*[("C0", tokens("a"))] * num_written)
    script.central.cancel("a")
    assert told(script) == [("a", 3, 2, True)] * (num_written > 0)


def test_an_answer_that_its_client_stops_has_ended():
    """At a stop string, which only the client can see."""
    script = adaptive("C0", "C0")
    script.submit("a")
    script.step(("C0", tokens("a")), ("C0", tokens("a")))
    script.central.cancel("a", 0)
    assert told(script) == [("a", 3, 2, False)]


def test_answers_that_can_not_end_by_themselves_teach_nothing_and_their_length_is_known():
    script = adaptive("C0", "C0")
    script.submit("a", ignore_eos=True, max_tokens=7)
    script.submit("b", beam=BeamSearchParams(2, 5))
    script.submit("c", min_tokens=3)
    script.step(("C0", tokens("a", end=FinishReason.LENGTH)), ("C0", tokens("b", end=STOP)))
    assert told(script) == []
    assert [(question.min_tokens, question.max_tokens) for question, _ in script.central.router.asked] == [(7, 7), (1, 5), (3, 16)]


# ------------------------------------------------------------------------------------------------ for real


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("options", [
    dict(router="cost", profile=MODEL), dict(profile=MODEL, slo=SLO(0.5, 0.05)),
    *(dict(router=name) for name in ROUTERS if name != "cost")], ids=str)
def test_whatever_the_router_tokens_are_the_dense_model_s(reference, options):
    with reference.cluster("adaptive", "C:cpu P:cpu P:cpu D:cpu", **options) as cluster:
        outputs = serve_mix(cluster)
        assert_tokens_equal_reference(outputs, MIX, reference)
        assert_nothing_leaked(cluster)
        explanations = [cluster.explain(output.request_id) for output in outputs]
    assert all(each.measured.e2e > 0 and each.measured.path == str(cluster.timeline(each.question.request_id))
               for each in explanations)


def test_a_router_may_be_changed_while_requests_flow(reference):
    with reference.cluster("adaptive", "C:cpu P:cpu D:cpu", router="collocated") as cluster:
        serve_mix(cluster)
        cluster.router = AlwaysDisaggregated()
        stream = cluster.submit({"prompt_token_ids": list(prompt(9))}, greedy(4))
        stream.result()
        assert str(cluster.timeline(stream.request_id)) == "P0 -> D0"


@pytest.mark.parametrize("options, says", [
    (dict(topology="C:cpu P:cpu", router="best"), "unknown router 'best'; there are cost"),
    (dict(router=3), r"an object with a method choose\(question, workers\); got 3"),
    (dict(topology="P:cpu", router="threshold"), "mode 'adaptive' needs workers of role C, or D and P; the topology P:cpu has P"),
    (dict(mode="collocated", router="cost"), "router given, but mode 'collocated' asks no router: take mode='adaptive'"),
    (dict(mode="collocated", slo=SLO(1, 1), profile=MODEL), "slo and profile given, but mode 'collocated'.*leave them out"),
    (dict(router=AlwaysCollocated(), profile=MODEL), "profile given, but the router is an object of its own"),
    (dict(router="seed", slo=SLO(1, 1)), "slo given, but the router 'seed' has no use for it"),
    (dict(slo=1.0, profile=MODEL), r"slo must be SLO\(ttft, tpot\), in seconds, got 1.0"),
])
def test_what_is_not_understood_is_refused(reference, options, says):
    with pytest.raises(ConfigError, match=says):
        Cluster(reference.path, **{"topology": "C:cpu", "mode": "adaptive", **options})


def test_a_profile_that_is_not_there(reference, tmp_path):
    with pytest.raises(ValueError, match="can't read the profile"):
        reference.cluster("adaptive", "C:cpu", profile=tmp_path / "none.json")


def test_adaptive_needs_a_router():
    with pytest.raises(ConfigError, match="needs a router"):
        Script("C0", "adaptive")
    script = Script("C0", "collocated")
    with pytest.raises(ConfigError, match="made without a router"):
        script.central.router = AlwaysCollocated()
    with pytest.raises(InvalidRequest, match="made without one"):
        script.central.submit(Request("a", [1], SamplingParams()), "adaptive")
