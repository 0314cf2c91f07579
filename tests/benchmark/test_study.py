"""Cells of the routing study, so small that they are played through in seconds."""

from __future__ import annotations

import pytest

from nanopd.benchmark import study
from nanopd.benchmark.study import Cell, _Bench, _row, _summary
from nanopd.router.planner import Split

CHAT = Cell("nvidia-h200/qwen3-8b", 2, "chat", "loose")


@pytest.fixture
def tiny(monkeypatch):
    for name, value in dict(MOST=40, WARM_UP=0.5, WINDOW=1.0, LOADS=(0.8,), TURN=1.0).items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setitem(study.MIXES, "chat", ("200-300", "20-30"))
    monkeypatch.setitem(study.MIXES, "documents", ("4000-5000", "10-20"))


def test_a_cell_s_row_and_the_summary_hold_together(tiny, monkeypatch):
    monkeypatch.setattr(study, "ProcessPoolExecutor", InTurn)
    monkeypatch.setattr(_Bench, "highest_rate", lambda bench, way: (0.5 if "P" in way else 0.6) * bench.capacities[0])
    (row,), summary = study.run([CHAT], jobs=1)
    assert (row["hardware"], row["workers"], row["mix"], row["slo"]) == ("nvidia-h200/qwen3-8b", 2, "chat", "loose")
    assert row["rates"].keys() == {"adaptive", "C=2", "P=1 D=1"}
    fixed = {way: rate for way, rate in row["rates"].items() if way != "adaptive"}
    assert fixed[row["best_fixed"]] == max(fixed.values()) > 0
    assert row["over_best_fixed"] == row["rates"]["adaptive"] / max(fixed.values())
    assert len(row["regrets"]) == 1 and 0 <= row["regrets"][0] < 1
    assert summary == {"steady": {"cells": 1, "least_over_best_fixed": row["over_best_fixed"], "mean_regret": row["regrets"][0],
                                  "p95_regret": row["regrets"][0]}}


class InTurn:
    """A pool of processes that is none: what the test has patched is patched there too."""

    def __init__(self, jobs: int) -> None:
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def test_where_no_fixed_way_serves_any_in_time_there_is_nothing_to_compare_with(tiny, monkeypatch):
    monkeypatch.setattr(study, "ProcessPoolExecutor", InTurn)
    monkeypatch.setattr(_Bench, "highest_rate", lambda bench, way: 0.0)
    (row,), summary = study.run([CHAT], jobs=1)
    assert row["over_best_fixed"] is None and row["regrets"] == [] and summary == {}


def test_a_row_s_regret_is_what_the_best_way_had_more():
    rates = {"adaptive": 9.0, "C=2": 10.0, "P=1 D=1": 6.0}
    row = _row(CHAT, rates, [{"adaptive": 8.0, "C=2": 10.0}, {"adaptive": 5.0, "C=2": 4.0}])
    assert (row["best_fixed"], row["over_best_fixed"], row["regrets"]) == ("C=2", 0.9, [pytest.approx(0.2), 0.0])


def test_steady_and_shifting_mixes_are_summed_up_apart():
    def row(mix, over, regrets):
        return {"mix": mix, "over_best_fixed": over, "regrets": regrets}

    summary = _summary([row("chat", 1.0, [0.0, 0.1]), row("mixed", 0.9, [0.2]), row("documents, chat", 1.2, [0.0])])
    assert summary["steady"] == {"cells": 2, "least_over_best_fixed": 0.9, "mean_regret": pytest.approx(0.1), "p95_regret": 0.2}
    assert summary["shifting"] == {"cells": 1, "least_over_best_fixed": 1.2, "mean_regret": 0.0, "p95_regret": 0.0}


def test_mixes_that_shift_come_in_turns(tiny):
    bench = _Bench(Cell("nvidia-h200/qwen3-8b", 2, "documents, chat", "loose"))
    arrivals = bench.arrivals(20.0)
    assert [one.time for one in arrivals] == sorted(one.time for one in arrivals)
    assert all((one.prompt_len >= 4000) == (int(one.time / study.TURN) % 2 == 0) for one in arrivals)
    assert {int(one.time / study.TURN) for one in arrivals} == {0, 1, 2, 3}


def test_fixed_ways_are_all_pairs_of_few_workers_and_the_best_and_its_neighbours_of_many():
    def splits(cell):
        return [split for split in _Bench(cell).ways.values() if split is not None]

    assert splits(Cell("nvidia-h200/qwen3-8b", 4, "mixed", "loose")) == [Split(C=4), Split(0, 1, 3), Split(0, 2, 2), Split(0, 3, 1)]
    many = splits(Cell("nvidia-h200/qwen3-8b", 8, "mixed", "loose"))
    assert many[0] == Split(C=8) and 2 <= len(many[1:]) <= 3
    assert [split.P for split in many[1:]] == list(range(many[1].P, many[1].P + len(many) - 1))


def test_requests_come_for_longer_than_answers_take():
    """Else a load that only grows would be taken for one that can be kept up."""
    slow, quick = _Bench(Cell("seed/h20", 4, "chat", "loose")), _Bench(Cell("nvidia-h200/qwen3-8b", 4, "mixed", "tight"))
    assert slow.arrivals(2.0)[-1].time > 5 * slow.mixes[0].answer * slow.slo.tpot > study.WARM_UP + study.WINDOW
    assert quick.arrivals(20.0)[-1].time == pytest.approx(study.WARM_UP + study.WINDOW, rel=0.2)
