"""What a route costs by hand, what the router prefers and why, and how long it takes to say so."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from cost_model.models import MODEL, PEER
from hypothesis import given, settings
from hypothesis import strategies as st
from router.views import question, views, writes

from nanopd.config import SLO, ConfigError
from nanopd.cost_model.analytical import NOTHING, StepWork
from nanopd.cost_model.checks import CostModelError
from nanopd.router.cost_router import ALIKE, SHORTLIST, TOLD, CostRouter, Spread
from nanopd.router.length_baselines import ConstantLength
from nanopd.router.length_predictor import BayesianLengthPredictor
from nanopd.router.routing import Decision, Ended, Route, Score

EIGHT = "C0 C1 P0 P1 P2 D0 D1 D2"
LATENT = {"ttft": ("waited", "queue", "prefill"), "e2e": ("waited", "queue", "prefill", "transfer", "handover", "decode",
                                                          "interference")}


def router(slo=None, **options):
    return CostRouter(MODEL, ConstantLength(100), slo, **options)


def scores(workers, router=None, **asked):
    """By route."""
    decision = (router or CostRouter(MODEL, ConstantLength(100))).choose(question(**asked), workers)
    assert decision.route == decision.scores[0].route
    assert [score.objective for score in decision.scores] == sorted(score.objective for score in decision.scores)
    return {str(score.route): score for score in decision.scores}


def test_every_collocated_worker_and_the_best_pairs_are_told_and_terms_make_up_the_sums():
    got = scores(views(EIGHT, C0=writes(3), D1=writes(9)), now=10.5)
    assert len(got) == 2 + TOLD and {"C0", "C1"} <= set(got)
    for score in got.values():
        assert score.terms["waited"] == 0.5
        for name, terms in LATENT.items():
            assert getattr(score, name) == pytest.approx(sum(score.terms.get(term, 0.0) for term in terms))
        assert score.objective == pytest.approx(score.e2e + score.terms["others"])


work = st.fixed_dictionaries(dict(
    running=st.integers(0, 40).map(lambda answers: StepWork(0, 0.0, answers, 700 * answers)),
    queued=st.sampled_from([0, 300, 5000]).map(StepWork.chunk), queued_since=st.just(9.99),
    cached_tokens=st.sampled_from([0, 480]), sending_tokens=st.sampled_from([0, 60_000]), free_seats=st.sampled_from([0, 9]),
    device=st.sampled_from(["cuda:0", "cuda:1"]), prompts_per_second=st.sampled_from([(0.0, 0.0), (2.0, 2000.0)])))


@settings(max_examples=40, deadline=None)
@given(st.lists(work, min_size=8, max_size=8), st.sampled_from([None, SLO(1.0, 0.5), SLO(0.1, 0.008)]), st.sampled_from([0, 30]))
def test_no_pair_is_better_than_those_that_are_told(work, slo, written):
    """Each by itself, where there is none to choose from but its two workers."""
    there = dict(zip(EIGHT.split(), work))
    got = scores(views(EIGHT, **there), router(slo), written=written)
    alone = {}
    for prompt, writing in itertools.permutations(there, 2):
        if prompt[0] != "D" and writing[0] != "P":
            pair = scores(views(f"{prompt} {writing}", **there), router(slo), written=written)
            alone |= {name: pair[name].objective for name in (f"{prompt} -> {writing}",) if name in pair}
    told = [score.objective for name, score in got.items() if "->" in name]
    assert told == pytest.approx(sorted(alone.values())[:TOLD], abs=ALIKE)
    assert all(score.objective == pytest.approx(alone[name]) for name, score in got.items() if "->" in name)


@pytest.mark.parametrize("there, routes", [
    ("C0 C1", {"C0", "C1", "C0 -> C1", "C1 -> C0"}), ("C0 P0", {"C0", "P0 -> C0"}), ("C0 D0", {"C0", "C0 -> D0"}),
    ("C0 P0 D0", {"C0", "P0 -> D0", "P0 -> C0", "C0 -> D0"}), ("P0 D0", {"P0 -> D0"}), ("C0", {"C0"})])
def test_a_collocated_worker_can_be_either_end_of_a_pair(there, routes):
    assert set(scores(views(there))) == routes


def test_where_tpots_are_promised_one_of_a_pair_keeps_to_its_part():
    assert set(scores(views("C0 C1"), router(SLO(1, 1)))) == {"C0", "C1"}
    shared_out = router(SLO(1, 1))
    shared_out.parts = {"C0": "P", "C1": "D"}
    assert set(scores(views("C0 C1"), shared_out)) == {"C0 -> C1"}
    assert set(scores(views("C0 C1 C2"), shared_out)) == {"C0 -> C1", "C0 -> C2", "C2 -> C1", "C2"}


def test_who_is_made_for_a_part_is_preferred_where_all_is_alike():
    assert next(name for name in scores(views("C0 P0 D0")) if "->" in name) == "P0 -> D0"


def test_a_prompt_computed_where_others_write_is_charged_with_their_delay():
    running = StepWork(0, 0.0, 12, 12_000)
    got = scores(views("C0 D0", C0=dict(running=running)))["C0 -> D0"]
    prefill, step = MODEL.step_seconds(running + StepWork.chunk(1000)), MODEL.step_seconds(running)
    assert got.terms["prefill"] == pytest.approx(prefill) and got.terms["queue"] == pytest.approx(step / 2)
    assert got.terms["others"] == pytest.approx(12 * (prefill - step))
    strict, loose = (scores(views("C0 D0", C0=dict(running=running)), router(SLO(9.0, tpot)))["C0 -> D0"].objective
                     for tpot in (0.0056, 1.0))
    assert strict - loose > 0.5  # of the twelve some would miss it


def test_an_idle_cluster_by_hand():
    mean = ConstantLength(100).predict(1000, 512).mean()
    got = scores(views("C0 P0 D0", P0=dict(device="cuda:0"), D0=dict(device="cuda:1")))
    prefill = MODEL.step_seconds(StepWork.chunk(1000))
    decode = (mean - 1) * MODEL.decode.seconds(1, 1000 + mean / 2)
    assert got["C0"].terms == pytest.approx({"waited": 0, "queue": 0, "prefill": prefill, "decode": decode, "interference": 0,
                                             "others": 0})
    transfer = PEER.exposed_seconds(1000 * 147_456, prefill, 36)
    assert got["P0 -> D0"].terms == pytest.approx({"waited": 0, "queue": 0, "prefill": prefill, "transfer": transfer,
                                                   "handover": 0, "decode": decode, "interference": 0, "others": 0})
    assert got["C0"].tpot == pytest.approx(decode / (mean - 1))


def test_a_queue_is_what_is_queued_less_the_time_since_it_was_begun_and_never_below_nothing():
    for since, left in ((10.0, 1.0), (9.99, None), (0.0, 0.0)):
        whole = MODEL.step_seconds(StepWork.chunk(3000))
        got = scores(views("P0 D0", P0=dict(queued=StepWork.chunk(3000), queued_since=since)))["P0 -> D0"]
        assert got.terms["queue"] == pytest.approx(whole - 0.01 if left is None else left * whole)


def test_chunks_share_steps_with_the_decodes_there():
    running = StepWork(0, 0.0, 12, 12_000)
    got = scores(views("C0", C0=dict(running=running)), router(chunk_tokens=512), prompt_len=1500)["C0"]
    steps, chunk = 3, MODEL.step_seconds(StepWork(500, (1500 * 1501 / 2) / 3, 12, 12_000))
    assert got.terms["prefill"] == pytest.approx(steps * chunk)
    step = MODEL.step_seconds(running)
    mean = ConstantLength(100).predict(1500, 512).mean()
    longer = MODEL.decode.seconds(13, 13_500 + mean / 2) - step
    assert got.terms["others"] == pytest.approx(12 * steps * (chunk - step) + 12 * (mean - 1) * longer)


def test_what_a_worker_has_cached_is_neither_computed_nor_sent():
    kept = dict(cached_tokens=960)
    got = scores(views("C0 C1 P1 D1", C1=kept, P1=kept, D1=kept))
    assert got["C1"].terms["prefill"] == pytest.approx(MODEL.step_seconds(StepWork.chunk(40, 960)))
    assert got["C0"].terms["prefill"] == pytest.approx(MODEL.step_seconds(StepWork.chunk(1000)))
    assert got["P1 -> D1"].terms["prefill"] == got["C1"].terms["prefill"]
    new, old = (scores(views("P0 D0", D0=each))["P0 -> D0"].terms["transfer"] for each in ({}, kept))
    assert old < new
    blind = scores(views("C0 C1 P1 D1", C1=kept, P1=kept, D1=kept), router(reads_prefixes=False))
    assert blind["C0"].terms == blind["C1"].terms
    assert blind["P1 -> D1"].terms == scores(views("P1 D1"))["P1 -> D1"].terms


def test_what_is_on_its_way_from_p_holds_the_next_transfer_up():
    free, busy = (scores(views("P0 D0", P0=dict(sending_tokens=tokens)))["P0 -> D0"].terms["transfer"]
                  for tokens in (0, 100_000))
    assert busy - free == pytest.approx(100_000 * 147_456 / PEER.bytes_per_second - MODEL.step_seconds(StepWork.chunk(1000)))


@pytest.mark.parametrize("lacking", [dict(free_tokens=100), dict(free_seats=0)])
@pytest.mark.parametrize("route", ["C0", "P0 -> D0"])
def test_where_there_is_no_room_it_waits_until_some_have_ended(lacking, route):
    full, roomy = (scores(views("C0 P0 D0", C0=writes(8) | some, D0=writes(8) | some))[route] for some in (lacking, {}))
    assert full.terms["queue"] > roomy.terms["queue"] and full.ttft > roomy.ttft


def test_prompts_that_come_often_hold_up_what_a_collocated_worker_writes():
    rare, often, flooded = (scores(views("C0", C0=dict(prompts_per_second=(rate, rate * 2000))))["C0"].terms
                            for rate in (0.1, 5.0, 1000.0))
    assert 0 < rare["interference"] < often["interference"] < flooded["interference"] <= 9.01 * flooded["decode"]
    assert rare["decode"] == often["decode"]


def test_those_who_are_about_to_write_there_count():
    """Else all of a burst would go to the same decode worker."""
    got = scores(views("P0 D0 D1", D0=dict(seats=8)))
    assert got["P0 -> D0"].terms["decode"] > got["P0 -> D1"].terms["decode"]


def test_long_prompts_leave_workers_that_write_alone_and_short_ones_stay():
    """With many answers in the making, a long prompt would hold all of them up; a short one need not stand in line for P."""
    workers = views("C0 P0 D0", C0=writes(20), D0=writes(20), P0=dict(queued=StepWork.chunk(4000), queued_since=10.0))
    assert [str(router(chunk_tokens=512).choose(question(prompt_len=length), workers).route) for length in (16, 8000)] == [
        "C0", "P0 -> D0"]


def test_others_count_as_much_as_they_are_said_to():
    workers = views("C0 P0 D0", C0=writes(20), D0=writes(20), P0=dict(queued=StepWork.chunk(3000), queued_since=10.0))
    assert [str(router(others=weight).choose(question(), workers).route) for weight in (0.0, 1.0)] == ["C0", "P0 -> D0"]


def test_a_known_length_is_not_forecast():
    got = scores(views("C0"), max_tokens=300, min_tokens=300)["C0"]
    assert got.terms["decode"] == pytest.approx(299 * MODEL.decode.seconds(1, 1000 + 150))


def test_written_tokens_are_computed_again_where_all_is_and_shorten_what_is_left():
    fresh, resumed = scores(views("C0 P0 D0")), scores(views("C0 P0 D0"), written=50)
    assert resumed["C0"].terms["prefill"] == pytest.approx(MODEL.step_seconds(StepWork.chunk(1050)))
    assert resumed["P0 -> D0"].terms["prefill"] == fresh["P0 -> D0"].terms["prefill"]


def test_only_what_is_open_is_chosen_and_nothing_where_no_pipeline_is():
    shut = dict(is_open=False)
    assert set(scores(views("C0 C1 P0 P1 D0 D1", C0=shut, P0=shut, D1=shut))) == {"C1", "P1 -> D0", "P1 -> C1", "C1 -> D0"}
    assert router().choose(question(), views("C0 P0 D0", C0=shut, D0=shut)) is None
    assert router().choose(question(), []) is None


def test_of_many_workers_the_promising_are_scored():
    names = " ".join(f"{role}{number}" for role in "CPD" for number in range(50))
    busy = {f"{role}{number}": writes(5) | dict(queued=StepWork.chunk(500), queued_since=10.0)
            for role in "CPD" for number in range(50) if number != 33}
    got = scores(views(names, **busy))
    assert len(got) == SHORTLIST + TOLD and {"C33", "P33 -> D33"} <= set(got)
    assert next(iter(got)) in ("C33", "P33 -> D33")


# ------------------------------------------------------------------------------------------------- the SLO


def test_with_an_slo_chances_to_miss_it_decide():
    workers = views("C0 P0 D0", C0=writes(20), D0=writes(3))
    loose, tight = SLO(10.0, 1.0), SLO(10.0, 0.0055)
    relaxed = scores(workers, router(loose))
    assert all(score.objective < 0.01 for score in relaxed.values())
    strict = scores(workers, router(tight))
    assert strict["C0"].objective > 2 > 1 > strict["P0 -> D0"].objective  # it would spoil it for some of the twenty


def test_a_tight_ttft_takes_the_shorter_queue():
    workers = views("C0 C1", C0=dict(queued=StepWork.chunk(8000), queued_since=10.0), C1=writes(30))
    assert str(router(SLO(0.1, 1.0)).choose(question(), workers).route) == "C1"


def test_what_was_waited_already_counts_against_the_promise():
    early, late = (scores(views("C0"), router(SLO(0.2, 1.0)), arrival=arrival)["C0"].objective for arrival in (10.0, 9.85))
    assert early < 0.01 and late > 0.1


@pytest.mark.parametrize("ttft, tpot", [(0, 1), (1, -1), (float("nan"), 1), (1, float("inf")), ("1", 1), (True, 1)])
def test_an_slo_is_above_nothing(ttft, tpot):
    with pytest.raises(ConfigError, match=r"an SLO's t(tft|pot) is a number of seconds above 0, got"):
        SLO(ttft, tpot)


# ------------------------------------------------------------------------------------------------ learning


def ended(output_len=50, cut=False, ttft=0.1, tpot=0.01, decision=None):
    return Ended("q", 1000, output_len, cut, ttft, tpot, decision)


def test_it_learns_lengths_as_answers_end():
    router = CostRouter(MODEL, BayesianLengthPredictor())
    before = scores(views("C0"), router)["C0"].terms["decode"]
    for _ in range(50):
        router.ended(ended(400))
    assert scores(views("C0"), router)["C0"].terms["decode"] > 1.5 * before
    forecast = router.predictor.predict(1000, 512).mean()
    assert router._length(question()).mean == pytest.approx(forecast, rel=0.02)


def test_the_spread_of_times_is_learned():
    router = CostRouter(MODEL, ConstantLength(100), SLO(0.1, 0.02), spread=0.2)
    score = Score(Route.collocated("C0"), {}, ttft=0.1, tpot=0.015, e2e=1.0, objective=1.0)
    decision = Decision(score.route, (score,))
    for _ in range(300):
        router.ended(ended(ttft=0.102, tpot=0.021, decision=decision))
    assert router.ttft_spread.deviation < 0.06 and 0.3 < router.tpot_spread.deviation < 0.35
    router.ended(ended(decision=None))
    router.ended(ended(tpot=None, decision=Decision(Route("P7", "D7"))))


@pytest.mark.parametrize("measured, expected, learns", [(0.3, 0.1, False), (9.0, 3.0, False), (0.7, 0.3, True), (3.0, 0.9, True)])
def test_the_spread_is_learned_where_it_was_open_whether_the_promise_is_kept(measured, expected, learns):
    """A load that grows makes all forecasts too low; if they were far below the bound, that tells nothing of those near it."""
    spread = Spread(0.1)
    for _ in range(50):
        spread.learn(measured, expected, 1.0)
    assert (spread.deviation > 0.1) == learns and (learns or spread.deviation == 0.1)


def test_chances_of_a_log_normal():
    spread = Spread(0.2)
    assert spread.chance_above(1.0, 1.0) == 0.5
    assert spread.chance_above(1.0, 1.2214) == pytest.approx(0.8413, abs=1e-3)  # a deviation above
    assert spread.chance_above(1.0, 0.1) < 1e-9


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("options, says", [
    (dict(message_seconds=-1), "message_seconds must be a number of at least 0, got -1"),
    (dict(spread=0), "spread must be a number"), (dict(others=float("nan")), "others must be"),
    (dict(chunk_tokens=0), "chunk_tokens must be at least 1, or None, got 0"),
])
def test_options_that_make_no_sense(options, says):
    with pytest.raises(ConfigError, match=says):
        router(**options)


def test_a_cost_model_without_transfers_says_so_where_one_is_needed():
    lone = CostRouter(replace(MODEL, transfers=()), ConstantLength(100))
    assert str(lone.choose(question(), views("C0 P0")).route) == "C0"
    assert set(scores(views("C0 C1"), lone)) == {"C0", "C1"}
    with pytest.raises(CostModelError, match="no transfers"):
        lone.choose(question(), views("P0 D0"))


# --------------------------------------------------------------------------------------------------- speed


def seconds_of_a_decision(slo, names, times=400, each=5):
    busy = {name: writes(10) | dict(queued=NOTHING if name[0] == "D" else StepWork.chunk(500), queued_since=9.99)
            for name in names.split()}
    router, workers = CostRouter(MODEL, BayesianLengthPredictor(), slo), views(names, **busy)
    asked, best = question(), float("inf")
    router.choose(asked, workers)
    for _ in range(times):  # the quickest of many: others use this machine too
        start = time.perf_counter()
        for _ in range(each):
            router.choose(asked, workers)
        best = min(best, (time.perf_counter() - start) / each)
    return best


@pytest.mark.parametrize("slo, bound", [(None, 400e-6), (SLO(1.0, 0.05), 600e-6)])
def test_a_decision_among_eight_workers_is_quick(slo, bound):
    assert seconds_of_a_decision(slo, EIGHT) < bound


def test_many_workers_cost_no_more_than_each_its_look():
    few, many = (seconds_of_a_decision(None, " ".join(f"{role}{number}" for role in "CPD" for number in range(each)), 20, 2)
                 for each in (40, 320))
    assert many < 2 * 8 * few
