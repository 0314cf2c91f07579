"""Whole simulations: what every one must keep to, and what can be reckoned by hand."""

from __future__ import annotations

import time
from statistics import mean

import pytest
from simulator.clusters import assert_all_is_over, lengths, simulation, times

from nanopd.config import ConfigError
from nanopd.simulator import Arrival, LinearCosts, poisson
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
CLUSTERS |= {f"{name}, ahead": options | {"runs_ahead": True} for name, options in CLUSTERS.items()}


@pytest.mark.parametrize("rate", [3, 60])
@pytest.mark.parametrize("options", CLUSTERS.values(), ids=CLUSTERS)
def test_every_request_gets_all_its_tokens_and_every_block_comes_back(options, rate):
    workload = poisson(rate, 60, lengths, seed=2)
    sim = simulation(**options)
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
    singly, leaping = simulation(**options, history=True), simulation(**options)
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
