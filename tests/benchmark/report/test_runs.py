"""Runs, put together."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from nanopd.benchmark.report.runs import (
    Way,
    colour_of,
    goodput_band,
    label_of,
    load_runs,
    num_counted,
    quantile_band,
    source_of,
    ways_of,
    wilson,
)
from nanopd.metrics import quantile


def test_a_folder_is_read_in_order_without_the_profile(runs, tmp_path):
    for number, run in enumerate(reversed(runs)):
        run.save(tmp_path / f"{number}.json")
    (tmp_path / "profile.json").write_text("{}")
    (tmp_path / "x.failed").write_text("{}")
    assert load_runs(tmp_path) == runs
    with pytest.raises(FileNotFoundError, match="nanopd bench sweep --out"):
        load_runs(tmp_path / "empty")


def test_ways_have_names_and_colours_of_their_own():
    ways = [Way("collocated", "C:0 C:1 C:2 C:3"), Way("disaggregated", "P:0 D:1 D:2 D:3"), Way("disaggregated", "P:0 P:1 D:2 D:3")]
    assert [label_of(way, ways) for way in ways] == ["collocated", "disaggregated 1P 3D", "disaggregated 2P 2D"]
    assert len({colour_of(way, ways) for way in ways}) == 3
    assert label_of(ways[1], ways[:2]) == "disaggregated"


def test_the_source_says_device_date_commit_and_how_many(runs):
    assert source_of(runs) == "made up, 2 × Made-up GPU, 2026-01-02, commit abc1234, 36 runs"
    assert source_of([replace(runs[0], dirty=True)]).endswith("commit abc1234 with changes, 1 runs")
    assert "no commit" in source_of([replace(runs[0], commit=None)])
    on_cpu = replace(runs[0], device={"kind": "cpu", "name": "cpu", "cpu": "Some CPU"})
    assert "CPU (Some CPU; on a CPU to see that it works" in source_of([on_cpu])


def test_a_run_in_which_no_request_counted_has_nothing_to_draw(runs, tmp_path):
    nothing = {name: [] for name in runs[0].requests}
    replace(runs[0], requests=nothing).save(tmp_path / "empty.json")
    with pytest.raises(FileNotFoundError):
        load_runs(tmp_path)
    runs[1].save(tmp_path / "some.json")
    assert load_runs(tmp_path) == [runs[1]]


def test_a_peer_and_a_trace_stand_beside_the_modes(runs, tmp_path):
    settings = runs[0].settings | {"endpoint": "http://127.0.0.1:8000", "mode": None, "topology": None, "rate": None,
                                   "trace": "/somewhere/chat.jsonl", "workload": "short"}
    replace(runs[0], settings=settings).save(tmp_path / "peer.json")
    runs[0].save(tmp_path / "ours.json")
    ours, peer = load_runs(tmp_path)
    arrivals = peer.requests["arrival"]
    assert peer.settings["workload"] == "chat"
    assert peer.settings["rate"] == pytest.approx(len(arrivals) / settings["window"], rel=5e-3)
    replace(runs[0], settings=settings | {"window": None}).save(tmp_path / "peer.json")
    assert load_runs(tmp_path)[1].settings["rate"] == pytest.approx(len(arrivals) / (arrivals[-1] - arrivals[0]), rel=5e-3)
    ways = ways_of([ours, peer])
    assert label_of(ways[1], ways) == "server at http://127.0.0.1:8000" and colour_of(ways[0], ways) != colour_of(ways[1], ways)
    assert "Made-up GPU" in source_of([peer])


def test_ways_come_collocated_first(runs):
    assert [way.mode for way in ways_of(runs)] == ["collocated", "disaggregated", "adaptive"]


def test_bands_hold_95_of_100_estimates():
    """Of the median of 60 draws: how often the band of a sample holds the true one."""
    draw = random.Random(1)
    held = 0
    for trial in range(200):
        band = quantile_band([draw.expovariate(1.0) for _ in range(60)], 0.5, seed=trial)
        held += band.low <= 0.6931 <= band.high
        assert band.low <= band.value <= band.high
    assert held >= 180
    assert quantile_band([3.0, 1.0, 2.0], 0.5).value == quantile([3.0, 1.0, 2.0], 0.5)


@pytest.mark.parametrize(("share", "number", "low", "high"), [(0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 100, 0.4038, 0.5962)])
def test_wilson(share, number, low, high):
    assert wilson(share, number) == pytest.approx((low, high), abs=1e-4)


def test_goodput_of_one_run_is_that_of_its_record(runs):
    band = goodput_band(runs[:1])
    assert band.value == pytest.approx(runs[0].metrics["request_goodput"])
    assert band.low < band.value <= band.high <= num_counted(runs[0]) / runs[0].metrics["duration"] + 1e-9
