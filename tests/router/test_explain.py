"""Why a request went where it did: what was expected of each route, and what it took."""

from __future__ import annotations

import pytest
from cost_model.models import MODEL
from router.script import STOP, Script, destination, lost, prefilled
from workers.serving import Reference, greedy, ids, prompt

from nanopd.core import InvalidRequest, RowRecord, StepRecord, TokenEvent
from nanopd.messages import History, Tokens
from nanopd.router.cost_router import CostRouter
from nanopd.router.explain import began, explain
from nanopd.router.length_baselines import ConstantLength
from nanopd.router.policies import AlwaysCollocated, AlwaysDisaggregated


class To(CostRouter):
    """Scores all, and goes where it is told."""

    def __init__(self, route):
        super().__init__(MODEL, ConstantLength(10))
        self.route = route

    def choose(self, question, workers):
        decision = super().choose(question, workers)
        return type(decision)(next(each.route for each in decision.scores if str(each.route) == self.route), decision.scores)


def drawn(script, after, job="a", end=None):
    """A token, so many seconds from now."""
    script.clock.now += after
    return Tokens([TokenEvent(job, 0, 5, finish_reason=end, time=script.clock.now)])


def disaggregated():
    """1 s in line, 1 s until D grants, 2 s until the first token, 0.5 s for the rest of the transfer, 4 s for two tokens more."""
    script = Script("C0 P0 D0", "adaptive", router=To("P0 -> D0"))
    script.submit("a")
    script.clock.now += 1
    script.step()
    script.clock.now += 1
    script.step(script.grant("D0", "a"))
    where = destination(script, "a")
    script.step(("P0", drawn(script, 2)))
    script.clock.now += 0.5
    script.step(("P0", prefilled(where, "a")))
    script.step(("D0", drawn(script, 2)), )
    script.step(("D0", drawn(script, 2, end=STOP)))
    return script


def test_what_it_really_cost():
    script = disaggregated()
    told = script.central.explain("a")
    assert told.measured.path == "P0 -> D0"
    assert told.measured.terms == pytest.approx({"waited": 1, "prefill": 3, "transfer": 0.5, "decode": 4})
    assert (told.measured.ttft, told.measured.tpot, told.measured.e2e) == pytest.approx((4, 2.25, 8.5))
    assert sum(told.measured.terms.values()) == pytest.approx(told.measured.e2e)


def test_queue_and_prefill_are_told_apart_where_the_first_step_is_known():
    script = disaggregated()
    timeline = script.central.timelines["a"]
    start = timeline.question.arrival + 3.25

    def step(at, job):
        return StepRecord(0, at, (RowRecord(job, 0, "prefill", 3, 0),), (), 0, 0, 0, 1.0)

    histories = {"P0": History([step(start - 3, "b"), step(start, "a"), step(start + 0.1, "a")], []), "C9": History([step(0, "a")], [])}
    assert began(timeline, histories) == start and began(timeline, {}) is None
    measured = explain(timeline, began(timeline, histories)).measured
    assert measured.terms == pytest.approx({"waited": 1, "queue": 2.25, "prefill": 0.75, "transfer": 0.5, "decode": 4})


def test_both_alternatives_and_which_was_taken():
    told = disaggregated().central.explain("a")
    assert {str(score.route) for score in told.decision.scores} == {"C0", "P0 -> D0", "P0 -> C0", "C0 -> D0"}
    assert told.best("collocated").route.decode == "C0" and told.chosen is told.best("disaggregated")
    lines = str(told).splitlines()
    assert lines[0] == "request a: prompt of 3 tokens, answer of up to 16, went P0 -> D0"
    assert lines[1].split() == ["C0", "P0", "->", "D0", "*", "measured"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert rows["waited"] == ["1000.00", "ms", "1000.00", "ms", "1000.00", "ms"]
    assert rows["transfer"][2:] == ["500.00", "ms"] and rows["ttft"][-2:] == ["4000.00", "ms"]
    assert list(rows) == ["waited", "queue", "prefill", "transfer", "handover", "decode", "interference", "ttft", "tpot", "e2e",
                          "others", "objective"]
    assert max(map(len, lines)) <= 80


def test_while_it_is_under_way_what_is_known_is_told():
    script = Script("C0", "adaptive", router=To("C0"))
    script.submit("a")
    with pytest.raises(InvalidRequest, match="still in line"):
        script.central.explain("a")
    script.step()
    assert script.central.explain("a").measured.terms == {"waited": 0.0} and "went C0" in str(script.central.explain("a"))
    script.step(("C0", drawn(script, 1)))
    told = script.central.explain("a").measured
    assert (told.terms, told.ttft, told.tpot, told.e2e) == ({"waited": 0.0, "prefill": 1.0}, 1.0, None, None)


def test_after_a_loss_the_last_attempt_is_explained():
    script = Script("C0 C1", "adaptive", router=AlwaysCollocated())
    script.submit("a")
    script.step(("C0", drawn(script, 1)), lost("C0"))
    script.clock.now += 1
    script.step()
    told = script.central.explain("a")
    assert told.question.written == 1 and told.question.now - told.question.arrival == 2 and str(told.decision.route) == "C1"
    script.step(("C1", drawn(script, 3, "a/1", STOP)))
    measured = script.central.explain("a").measured
    assert (measured.path, measured.ttft, measured.tpot, measured.e2e) == ("C0 -> C1", 1.0, 4.0, 5.0)


def test_a_router_without_scores():
    script = Script("P0 D0", "adaptive", router=AlwaysDisaggregated())
    script.submit("a")
    script.step()
    told = script.central.explain("a")
    assert told.chosen is None and told.best("collocated") is None and str(told).endswith("The router gave no scores.")


def test_what_is_not_known_any_more():
    with pytest.raises(KeyError, match="no request 'x'; timelines are kept of the last 4096"):
        Script("C0", "adaptive", router=AlwaysCollocated()).central.explain("x")


def test_a_cluster_explains_with_what_its_workers_remember(tmp_path):
    with Reference(tmp_path).cluster("adaptive", "C:cpu P:cpu D:cpu", profile=MODEL) as cluster:
        output, = cluster.generate(ids(prompt(30)), greedy(6), use_tqdm=False)
        told = cluster.explain(output.request_id)
        assert told.measured.ttft == pytest.approx(output.metrics.ttft, abs=1e-6)
        assert told.measured.tpot == pytest.approx(output.metrics.tpot(6), abs=1e-6)
        assert {"waited", "queue", "prefill", "decode"} <= set(told.measured.terms)
        assert sum(told.measured.terms.values()) == pytest.approx(told.measured.e2e, rel=1e-6)
        with pytest.raises(KeyError, match="no request"):
            cluster.explain("x")
