"""Whole simulations: what every one must keep to, and what can be reckoned by hand."""

from __future__ import annotations

import time
from statistics import mean

import pytest
from cost_model.models import MODEL
from simulator.clusters import assert_all_is_over, lengths, simulation, times

from nanopd.config import SLO, ConfigError
from nanopd.router.cost_router import CostRouter
from nanopd.router.length_predictor import BayesianLengthPredictor
from nanopd.router.policies import RoundRobin
from nanopd.simulator import Arrival, LinearCosts, ModelCosts, poisson
from nanopd.workers.worker import PATIENCE

MICROSECOND = 1e-6

# Few workers with little room: prompts wait for seats and for blocks, are refused and preempted.
CLUSTERS = {
    "collocated": dict(workers={"C": 3}),
    "collocated, few seats": dict(workers={"C": 2}, seqs=2),
    "collocated, few blocks": dict(workers={"C": 2}, num_blocks=40, max_model_len=512),
    "disaggregated": dict(workers={"P": 1, "D": 2}, mode="disaggregated", latency=3e-4),
    "disaggregated, few blocks": dict(workers={"P": 2, "D": 1}, mode="disaggregated", num_blocks=40, max_model_len=512),
}
CLUSTERS |= {
    "adaptive": dict(workers={"C": 1, "P": 1, "D": 1}, mode="adaptive", latency=3e-4),
    "adaptive, few blocks": dict(workers={"C": 1, "P": 1, "D": 1}, mode="adaptive", num_blocks=40, max_model_len=512),
}
CLUSTERS |= {f"{name}, ahead": options | {"runs_ahead": True} for name, options in CLUSTERS.items()}


def with_router(options):
    return options | {"router": RoundRobin()} if options.get("mode") == "adaptive" else options


@pytest.mark.parametrize("rate", [3, 60])
@pytest.mark.parametrize("options", CLUSTERS.values(), ids=CLUSTERS)
def test_every_request_gets_all_its_tokens_and_every_block_comes_back(options, rate):
    workload = poisson(rate, 60, lengths, seed=2)
    sim = simulation(**with_router(options))
    result = sim.run(workload)
    assert_all_is_over(sim, result, workload)
    assert all(0 <= share <= 1 for share in result.utilisation.values())
    for one in result.requests:
        assert one.arrival < one.metrics.first_token_time <= one.metrics.finish_time <= result.seconds
        assert one.path[-1] in sim.stations


@pytest.mark.parametrize("rate", [3, 60])
@pytest.mark.parametrize("options", CLUSTERS.values(), ids=CLUSTERS)
def test_many_steps_at_once_change_no_time(options, rate):
    workload = poisson(rate, 60, lengths, seed=3)
    singly, leaping = (simulation(**with_router(options), history=history) for history in (True, False))
    assert times(singly.run(workload)) == times(leaping.run(workload))
    for worker_id, station in singly.stations.items():
        engine, other = station.worker.engine, leaping.stations[worker_id].worker.engine
        assert other.num_steps == engine.num_steps
        assert other.scheduler.num_preemptions == engine.scheduler.num_preemptions
        assert other.runner.busy == pytest.approx(engine.runner.busy)


def test_the_clusters_above_come_to_refusals_preemptions_and_lines():
    workload = poisson(60, 60, lengths, seed=3)
    refusing, preempting = (simulation(**CLUSTERS[f"{mode}, few blocks"]) for mode in ("disaggregated", "collocated"))
    assert sum(one.timeline.num_refusals for one in refusing.run(workload).requests) > 10
    preempting.run(workload)
    assert sum(station.worker.engine.scheduler.num_preemptions for station in preempting.stations.values()) > 0
    waiting = simulation(**CLUSTERS["collocated, few seats"], history=True)
    waiting.run(workload)
    assert any(step.num_waiting for station in waiting.stations.values() for step in station.worker.engine.history)


def test_the_same_seed_gives_the_same_and_another_one_does_not():
    first, again, other = (simulation({"P": 1, "D": 1}, "disaggregated").run(poisson(20, 80, lengths, seed))
                           for seed in (5, 5, 6))
    assert times(first) == times(again)
    assert times(first) != times(other)


def test_the_same_seed_gives_the_same_choices_of_the_reference_router():
    def run(seed):
        router = CostRouter(MODEL, BayesianLengthPredictor(), SLO(0.1, 0.01), chunk_tokens=128)
        sim = simulation({"C": 2, "P": 1, "D": 2}, "adaptive", ModelCosts(MODEL), runs_ahead=True, router=router)
        return sim.run(poisson(60, 200, lengths, seed))

    first, again, other = run(5), run(5), run(6)
    assert times(first) == times(again)
    assert first == again
    assert times(first) != times(other)
    assert {one.mode for one in first.requests} == {"collocated", "disaggregated"}


# --------------------------------------------------------------------------------- what nobody knows beforehand


class Curious(RoundRobin):
    """Notes all that it is told."""

    def __init__(self):
        super().__init__()
        self.asked, self.told = [], []

    def choose(self, question, workers):
        self.asked.append(question)
        return super().choose(question, workers)

    def ended(self, answer):
        self.told.append((answer.output_len, answer.cut))


def test_a_router_sees_how_long_an_answer_may_get_and_learns_how_long_it_was():
    router = Curious()
    sim = simulation({"C": 1, "P": 1, "D": 1}, "adaptive", router=router)
    result = sim.run([Arrival(0.0, 100, 30), Arrival(1.0, 100, 30, max_tokens=500), Arrival(2.0, 100, 30, max_tokens=20)])
    assert [question.max_tokens for question in router.asked] == [8192 - 100, 500, 20]
    assert router.told == [(30, False), (30, False), (20, True)]
    assert [one.num_tokens for one in result.requests] == [30, 30, 20]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_an_answer_that_is_cut_ends_as_one_of_that_length(runs_ahead):
    [cut] = simulation(runs_ahead=runs_ahead).run([Arrival(0.0, 300, 50, max_tokens=5)]).requests
    [short] = simulation(runs_ahead=runs_ahead).run([Arrival(0.0, 300, 5)]).requests
    assert (cut.ttft, cut.e2e, cut.num_tokens) == (short.ttft, short.e2e, 5)


# -------------------------------------------------------------------------------------------------- prefixes


def test_prompts_that_share_a_prefix_share_their_blocks():
    """The second finds the shared 512 tokens and computes 88 in one step; the third shares nothing."""
    result = simulation().run([Arrival(0, 600, 2, prefix=(7,)), Arrival(1, 600, 2, prefix=(7,)), Arrival(2, 600, 2, prefix=(8,))])
    first, second, third = (one.ttft for one in result.requests)
    assert result.cached_tokens == {"C0": 512}
    assert [first, third] == [pytest.approx(5 * 2e-3 + 600 * 1e-5)] * 2
    assert second == pytest.approx(2e-3 + 88 * 1e-5)


def test_only_what_is_not_there_travels():
    costs = LinearCosts(step=1e-3, transfer_token=1e-3)
    workload = [Arrival(0, 528, 3, prefix=(7,)), Arrival(10, 528, 3, prefix=(7,))]
    first, second = simulation({"P": 1, "D": 1}, "disaggregated", costs, budget=1024).run(workload).requests
    assert first.e2e - second.e2e == pytest.approx(512 * 1e-3, rel=0.05)


def test_a_summary_of_a_simulation():
    result = simulation({"C": 1}).run(poisson(5, 40, lengths, seed=1))
    summary = result.summary(SLO(1.0, 1.0))
    assert (summary.num_requests, summary.attainment, summary.shares) == (40, 1.0, {"collocated": 1.0})
    assert summary.goodput == summary.requests_per_second
    assert summary.ttft.p50 <= summary.ttft.p90 <= summary.ttft.p99 < summary.e2e.p99
    assert result.summary().attainment is None


def test_progress_is_told_of_every_end():
    told = []
    simulation().run(poisson(5, 20, lengths), progress=told.append)
    assert told == list(range(1, 21))


# ------------------------------------------------------------------------------------------------ by hand


def test_a_request_on_an_idle_worker():
    """300 tokens in chunks of 128, 128 and 44, then four decodes over a cache of 300, 301, 302 and 303 tokens."""
    [one] = simulation(latency=1e-3).run([Arrival(0.25, 300, 5)]).requests
    prefill = 3 * 2e-3 + 300 * 1e-5
    decodes = 4 * (2e-3 + 1e-4) + (300 + 301 + 302 + 303) * 1e-7
    assert one.ttft == pytest.approx(1e-3 + prefill, abs=MICROSECOND / 1000)
    assert one.e2e == pytest.approx(1e-3 + prefill + decodes, abs=MICROSECOND / 1000)
    assert one.tpot == pytest.approx(decodes / 4, abs=MICROSECOND / 1000)
    assert one.path == ["C0"]


def test_a_request_that_comes_during_a_step_waits_for_its_end():
    """The first one's prompt takes 3 ms. The second comes 1 ms after its begin: it waits 2 ms, and its own 50 tokens run in a
    step with the first one's decode over 100 tokens."""
    _, second = simulation().run([Arrival(0, 100, 10), Arrival(1e-3, 50, 1)]).requests
    assert second.ttft == pytest.approx(2e-3 + 2e-3 + 50 * 1e-5 + 1e-4 + 100 * 1e-7, abs=MICROSECOND / 1000)
    assert second.tpot is None


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_request_that_comes_during_a_leap_waits_for_the_end_of_one_step(runs_ahead):
    """The first one decodes alone: its steps last 2.1 ms and what they read. The second comes in the middle of the 11th. A device
    that runs ahead has the 12th already."""
    prefill, decode = 2e-3 + 16 * 1e-5, [2e-3 + 1e-4 + (16 + i) * 1e-7 for i in range(12)]
    begin = prefill + sum(decode[:10])
    _, second = simulation(runs_ahead=runs_ahead).run([Arrival(0, 16, 50), Arrival(begin + 1e-3, 10, 1)]).requests
    both = 2e-3 + 10 * 1e-5 + 1e-4 + (16 + 11 + runs_ahead) * 1e-7
    waits = decode[10] - 1e-3 + (decode[11] if runs_ahead else 0)
    assert second.ttft == pytest.approx(waits + both, abs=MICROSECOND / 1000)


@pytest.mark.parametrize("transfer_token, after_prefill", [
    (4e-6, lambda moving, prefill: moving / 2),  # quicker than computing: only the last half of the layers is left
    (4e-5, lambda moving, prefill: moving - prefill / 2),  # slower: the link is busy from the first half of the layers on
])
def test_a_disaggregated_request(transfer_token, after_prefill):
    """2048 tokens in one chunk; with four layers, two sends, one after each half of them. Reserve, Granted, Prefill, Prefilled
    and Resume each take a millisecond."""
    costs = LinearCosts(step=2e-3, prefill_token=1e-5, decode_row=1e-4, latency=1e-3, transfer_token=transfer_token)
    sim = simulation({"P": 1, "D": 1}, "disaggregated", costs, budget=2048, latency=1e-3, history=True)
    [one] = sim.run([Arrival(0.5, 2048, 3)]).requests
    prefill, moving, decode = 2e-3 + 2048 * 1e-5, 2048 * transfer_token, 2e-3 + 1e-4
    assert one.ttft == pytest.approx(3e-3 + prefill, abs=MICROSECOND / 1000)
    arrived = 3e-3 + prefill + after_prefill(moving, prefill) + 1e-3
    assert one.e2e == pytest.approx(arrived + 2e-3 + 2 * decode, abs=MICROSECOND / 1000)
    assert one.path == ["P0", "D0"]
    [sent] = sim.stations["P0"].worker.sent
    assert (sent.start, sent.computed) == (pytest.approx(0.503 + prefill / 2), pytest.approx(0.503 + prefill))
    assert sent.end == pytest.approx(0.5 + arrived)
    [step, *_] = sim.stations["P0"].worker.engine.history
    assert (step.start, step.duration) == (pytest.approx(0.503), pytest.approx(prefill))


def test_a_prefill_worker_goes_on_while_a_prompt_travels():
    """The first prompt is on its way for a second, and the next two are computed meanwhile. As each arrives it is told of after
    PATIENCE with those that are still on their way."""
    costs = LinearCosts(step=10e-3, transfer_token=1 / 16)
    workload = [Arrival(0, 16, 2), Arrival(0.02, 16, 2), Arrival(0.04, 16, 2)]
    first, second, third = simulation({"P": 1, "D": 1}, "disaggregated", costs).run(workload).requests
    assert [one.ttft for one in (first, second, third)] == [pytest.approx(10e-3)] * 3
    assert [one.metrics.finish_time for one in (first, second, third)] == [
        pytest.approx(when + 10e-3) for when in (1.010 + PATIENCE, 2.010 + PATIENCE, 3.010)]


# --------------------------------------------------------------------------------------------- in the long run


def test_waiting_times_are_those_of_a_queue_with_one_server():
    """Poisson arrivals, a fixed time of service and one seat: M/D/1, whose mean wait is rho S / 2 (1 - rho)."""
    service, rho = 10e-3, 0.7
    workload = poisson(rho / service, 10_000, lambda random: (8, 1), seed=1)
    result = simulation(costs=LinearCosts(step=service), seqs=1).run(workload)
    waits = [one.ttft - service for one in result.requests]
    assert min(waits) == pytest.approx(0, abs=MICROSECOND)
    assert mean(waits) == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.05)
    assert result.utilisation["C0"] == pytest.approx(rho, rel=0.03)


def test_littles_law():
    """What the workers' records count of requests in them, on average over time, is rate times stay."""
    rate, num_requests = 30, 1500
    sim = simulation({"C": 2}, budget=512, history=True)
    result = sim.run(poisson(rate, num_requests, lambda random: (random.randint(1, 300), random.randint(1, 20)), seed=4))
    steps = [step for station in sim.stations.values() for step in station.worker.engine.history]
    begin = max(station.worker.engine.history[0].start for station in sim.stations.values())
    number = sum(step.duration * (len(step.rows) + step.num_waiting) for step in steps if step.start >= begin)
    seen = [one for one in result.requests if one.arrival >= begin]
    assert len(seen) > num_requests / 4
    span = result.seconds - begin
    assert number / span == pytest.approx(len(seen) / span * mean(one.e2e for one in seen), rel=0.1)


# --------------------------------------------------------------------------------------------------- cost


def test_it_is_quick():
    """It takes a quarter of this; what this excludes is a step at a time."""
    workload = poisson(10, 200, lambda random: (random.randint(1, 500), random.randint(1, 600)), seed=1)
    begin = time.process_time()
    simulation({"C": 4}, num_blocks=4096, seqs=64, budget=1024).run(workload)
    assert time.process_time() - begin < 4


def test_its_cost_is_linear_in_the_number_of_requests():
    def seconds(num_requests):
        workload = poisson(10, num_requests, lengths, seed=1)
        begin = time.process_time()
        simulation({"C": 4}, num_blocks=4096, seqs=64, budget=1024).run(workload)
        return time.process_time() - begin

    seconds(50)  # everything is imported and warm
    few, many = min(seconds(150) for _ in range(2)), seconds(1200)
    assert many < 16 * few  # 8 times as many; their square would be 64


def test_idle_workers_are_never_asked():
    sim = simulation({"C": 50})
    sim.run([Arrival(0, 100, 100), Arrival(100, 100, 100)])
    assert [station.worker.engine.num_steps for station in sim.stations.values()] == [200] + [0] * 49
    assert all(station.clock.now == 0 for worker_id, station in sim.stations.items() if worker_id != "C0")


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("workload, says", [
    ([], "empty"),
    ([Arrival(1, 5, 5), Arrival(0.5, 5, 5)], "request 1 arrives at 0.5 s, the one before it at 1 s.*sort"),
    ([Arrival(-1, 5, 5)], "request 0 arrives at -1 s"),
    ([Arrival(float("nan"), 5, 5)], "request 0 arrives at nan s"),
    ([Arrival(0, 0, 5)], "prompt of 0"),
    ([Arrival(0, 5, 0)], "answer of 0"),
    ([Arrival(0, 5, 5, max_tokens=0)], "request 0 allows an answer of 0 tokens"),
    ([Arrival(0, 5, 5), Arrival(0, 8000, 500)], r"request 1 has 8000 \+ 500 tokens, and a worker takes up to 8192"),
])
def test_a_workload_that_can_not_be_run(workload, says):
    with pytest.raises(ConfigError, match=says):
        simulation().run(workload)


@pytest.mark.parametrize("options, says", [
    (dict(mode="collocate"), "unknown mode 'collocate'; modes are collocated"),
    (dict(workers={"X": 1}), "unknown role 'X'; roles are C"),
    (dict(workers={"C": -1}), "can't be -1 workers of role C"),
    (dict(workers={"P": 2, "D": 0}, mode="disaggregated"), "needs workers of role D and P; there are P"),
    (dict(workers={"C": 1}, mode="adaptive"), "needs a router"),
    (dict(latency=-1.0), "latency is a number of seconds of at least 0, got -1.0"),
])
def test_a_cluster_that_can_not_be(options, says):
    with pytest.raises(ConfigError, match=says):
        simulation(**options)


def test_costs_below_zero_are_refused():
    with pytest.raises(ConfigError, match="step must be a number of seconds of at least 0, got -1"):
        LinearCosts(step=-1)


def test_a_simulation_that_has_run_says_so():
    sim = simulation()
    sim.run([Arrival(1, 5, 5)])
    with pytest.raises(RuntimeError, match="has run"):
        sim.run([Arrival(2, 5, 5)])
