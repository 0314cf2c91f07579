"""`nanopd plan`, below the command line."""

from __future__ import annotations

import pytest

from nanopd.config import SLO, CacheConfig, SchedulerConfig
from nanopd.router.planner import Mix, Planner, WorkerSize
from nanopd.simulator import Arrival
from nanopd.simulator.command import Workload
from nanopd.simulator.hardware import hardware
from nanopd.simulator.plan import CHECKED_AT, Plan, Way, plan, poisson_load, trace_load

H200 = hardware("nvidia-h200/qwen3-8b")
CACHE, SCHEDULER = CacheConfig(8192, enable_prefix_caching=False), SchedulerConfig(128, 2048, None, 8192)
PROMISED = SLO(0.5, 0.02)


def test_estimates_are_the_planner_s_and_the_best_are_played_through(monkeypatch):
    monkeypatch.setattr("nanopd.simulator.plan.MOST", 40)
    monkeypatch.setattr("nanopd.simulator.plan.FEWEST", 40)
    said = []
    found = plan(H200, 3, PROMISED, poisson_load("512", "16", 0), CACHE, SCHEDULER, check=2, progress=said.append)
    ranked = Planner(H200.cost, WorkerSize.of(SCHEDULER, 8192, 16), PROMISED).rank(3, Mix(((512, 16),)))
    assert found.estimated == [(str(split), rate) for split, rate in ranked]
    assert found.checked_rate == pytest.approx(CHECKED_AT * ranked[0][1])
    assert [way.name for way in found.ways if way.attainment is not None] == [*(str(split) for split, _ in ranked[:2]), "adaptive"]
    assert said == [*(f"simulating {split}" for split, _ in ranked[:2]), "simulating adaptive mode"]
    assert len(found.checked.arrivals) == 40
    assert all(0 <= way.attainment <= 1 for way in found.ways if way.attainment is not None)


def made(*ways: Way, checked: bool = True) -> Plan:
    return Plan(H200, 4, PROMISED, list(ways), 40.0, Workload([Arrival(0.0, 1, 1)], "one") if checked else None, None)


def test_the_best_are_those_that_simulations_say_and_else_the_formulas():
    ways = Way("C=4", 44.0, 0.85), Way("P=2 D=2", 40.0, 0.945), Way("P=1 D=3", 30.0, None), Way("adaptive", None, 0.95)
    assert [way.name for way in made(*ways).best] == ["P=2 D=2", "adaptive"]
    assert [way.name for way in made(*ways, checked=False).best] == ["C=4"]
    assert made(*ways).goodput_per_gpu(ways[0]) == pytest.approx(0.85 * 40 / 4)
    assert made(*ways).goodput_per_gpu(ways[2]) is None


@pytest.mark.parametrize("rate", [0.5, 30.0])
def test_a_trace_keeps_its_rhythm_at_any_rate(rate):
    trace = Workload([Arrival(time, 10, 2) for time in (1.0, 1.0, 3.0, 9.0)], "four")
    scaled = trace_load(trace)(rate)
    assert scaled.rate == pytest.approx(rate)
    times, were = ([one.time for one in load.arrivals] for load in (scaled, trace))
    assert [time / times[-1] for time in times] == pytest.approx([time / were[-1] for time in were])


@pytest.mark.parametrize("rate, number", [(0.01, 200), (20.0, 600), (1e4, 1500)])
def test_simulations_last_as_long_as_they_must_and_no_longer(rate, number):
    load = poisson_load("10", "2", 0)(rate)
    assert len(load.arrivals) == number and load.rate == pytest.approx(rate, rel=0.2)
