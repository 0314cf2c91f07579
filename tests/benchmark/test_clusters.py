"""`nanopd bench cluster` in processes on the CPU: what it does, not how fast."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from workers.processes import what_is_held

from nanopd.benchmark import clusters, command
from nanopd.benchmark.results import load
from nanopd.core import RowRecord, StepRecord

SMALL = replace(clusters.CASES["cpu"], prompts=(40,), repeats=1, decodes=2, decode_prompt=16, long_prompt=60, steps=12,
                seconds=10.0, clients=2, client_prompt=16, client_answer=4)


def test_every_figure_is_there_and_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setitem(clusters.CASES, "cpu", SMALL)
    gc.collect()  # what earlier tests have left would go meanwhile
    before = what_is_held()
    assert command.main(["cluster", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert what_is_held() == before
    report = load("cluster", folder=tmp_path)
    idle, relay, split, together, throughput = report.rows
    assert (idle["transport"], relay["transport"]) == ("peer", "relay")
    for row in (idle, relay):
        assert 0 < row["transfer_exposed_ms"] < row["ttft_ms"] and 0 < row["prefill_ms"] < row["ttft_ms"]
        assert row["exposed_share"] == pytest.approx(row["handover_ms"] / row["prefill_ms"], rel=1e-3)
    assert idle["ttft_ratio"] == pytest.approx(idle["ttft_ms"] / idle["collocated_ttft_ms"], rel=1e-3)
    assert (split["mode"], together["mode"]) == ("disaggregated", "collocated")
    for row in (split, together):
        assert 0 < row["pure_p50_ms"] <= row["pure_p99_ms"] and 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["long_prompts"] > 0 and row["steps"] > 0
    prefill, decode = throughput["prefill_ms"], throughput["decode_ms"]
    bound = throughput["collocated_requests_s"] * (prefill + decode) / (2 * max(prefill, decode))
    assert throughput["over_bound"] == pytest.approx(throughput["requests_s"] / bound, rel=1e-3)
    assert set(report.summary["exposed_share"]) == {"peer", "relay"}


def step(end: float, decodes: int, prefills: int = 0) -> StepRecord:
    rows = [RowRecord(str(i), 0, "decode", 1, 9) for i in range(decodes)]
    rows += [RowRecord(f"p{i}", 0, "prefill", 9, 0) for i in range(prefills)]
    return StepRecord(0, end - 0.5, tuple(rows), (), 0, 0, 0, 0.5)


def test_periods_are_from_end_to_end_of_steps_that_hold_the_decodes():
    steps = [step(1, 3), step(2, 3), step(4, 3, 1), step(4.5, 2), step(7, 4), step(9, 3)]
    assert clusters._periods(steps, end=8, decodes=3) == [1, 2, 2.5]


def test_quantiles_are_values_that_occurred():
    values = [float(i) for i in range(200, 0, -1)]
    assert clusters._quantile(values, 0.5) == 100 and clusters._quantile(values, 0.99) == 198
    assert clusters._quantile([7.0], 0.99) == 7
    with pytest.raises(RuntimeError, match="no step"):
        clusters._quantile([], 0.5)


def test_what_needs_two_gpus_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for bench in ("transfer", "cluster"):
        assert command.main([bench, "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert f"`bench {bench}` needs two CUDA devices, and torch sees 1" in said and "--device cpu" in said
    assert list(tmp_path.iterdir()) == []
