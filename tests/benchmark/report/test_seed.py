"""The seed's figures beside ours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nanopd.benchmark.report.runs import chosen
from nanopd.benchmark.report.seed import DATA, seed_table
from nanopd.benchmark.results import load
from nanopd.widgets.strings import set_language


def rows(runs=()):
    return {(row.what, row.seed): row for row in seed_table(load, runs)}


def test_recorded_figures_stand_beside_the_seeds():
    ours = next(row for row in load("decode").rows if (row["model"], row["batch"], row["context"]) == ("qwen3-8b", 16, 1024))["ms"]
    row = rows()["decode step, 16 × 1024 tokens of context", 61.1]
    assert row.ours == ours and row.ratio == pytest.approx(61.1 / ours) and row.unit == "ms"
    assert row.our_source == load("decode").source and row.device == "H200" and row.differs


def test_what_is_not_recorded_has_its_command_and_no_ratio():
    row = rows()["adaptive, mixed prompts, saturated output", 273]
    assert row.ours is None and row.ratio is None and row.our_source is None
    assert row.command == "nanopd bench sweep --gpus 4 --model qwen3-8b --workloads mixed --modes 'adaptive=C:0 P:1 P:3 D:2'"


def test_of_a_sweep_the_best_rate_on_as_many_gpus_counts(runs):
    four = "C:0 P:1 P:3 D:2"
    adaptive = [run for run in runs if run.settings["mode"] == "adaptive"]
    mixed = [replace(run, settings=run.settings | {"workload": "mixed", "topology": four}) for run in adaptive]
    row = rows(mixed)["adaptive, mixed prompts, saturated output", 273]
    assert row.ours == max(run.metrics["output_throughput"] for run in mixed) and row.ratio == pytest.approx(row.ours / 273)
    others = [replace(run, settings=run.settings | {"topology": "C:0 C:1 C:2 C:3"}) for run in mixed]
    assert rows(others)["adaptive, mixed prompts, saturated output", 273].ours is None  # another topology
    assert rows(others)["adaptive, saturated output", 240].ours == row.ours
    assert rows(runs)["adaptive, saturated output", 240].ours is None  # two GPUs
    on_cpu = [replace(run, device={"kind": "cpu", "name": "cpu", "cpu": "x"}) for run in mixed]
    assert rows(on_cpu)["adaptive, mixed prompts, saturated output", 273].ours is None


def test_latencies_are_in_seconds_and_less_is_better(runs):
    row = rows(runs)["collocated, short prompts, p50 end to end", 6.4]
    least = min(run.metrics["median_e2el_ms"] for run in chosen(runs, mode="collocated", workload="short"))
    assert row.ours == pytest.approx(least / 1e3) and row.ratio == pytest.approx(6.4 / row.ours)


def test_the_data_name_a_source_and_both_languages_everywhere():
    data = json.loads(DATA.read_text(encoding="utf-8"))
    for row in data["rows"]:
        assert row["source"] in data["sources"] and row["value"] > 0 and row["ours"]["command"].startswith("nanopd bench ")
        assert all(len(row[name]) == 2 and all(row[name]) for name in ("what", "differs"))
    set_language("zh")
    assert "自适应" in seed_table(load)[2].what
