"""A recorded trace as one of a sweep's workloads. The traces here are made up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from benchmark.load.runs import record_of
from typer.testing import CliRunner

from nanopd.benchmark.load.prompts import prompts
from nanopd.benchmark.report import goodput_figure, load_runs
from nanopd.benchmark.sweep import CASES, MODES, Grid, Known, Store, plan, title
from nanopd.benchmark.sweep_loads import as_recorded, mix_of, rate_of, span
from nanopd.cli import app
from nanopd.config import ConfigError
from nanopd.router.planner import Planner

PRESET = "nvidia-h200/qwen3-8b"
BASE = CASES["cuda"].base
GAPS = (0.2, 3.0, 0.4, 0.4, 7.0)  # seconds, over and over: requests come in bursts


@pytest.fixture
def trace(tmp_path):
    """120 requests of several lengths, one in ten too long; the same 512 tokens begin every second one."""
    now, lines = 0.0, []
    for number in range(120):
        length = 9000 if number % 10 == 3 else 600 + number
        pieces = [7 if number % 2 else 1000 + number, *range(2000 + 20 * number, 2000 + 20 * number + (length - 1) // 512)]
        lines.append({"timestamp": round(1000 * now), "input_length": length, "output_length": 20 + number % 3, "hash_ids": pieces})
        now += GAPS[number % len(GAPS)]
    path = tmp_path / "made_up.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def grid(trace, **others):
    return Grid(**dict(base=BASE, gpus=2, modes=MODES, workloads=(), rates=(2.0, 8.0), traces=(trace,), requests=60) | others)


def requests_of(cell):
    return cell.schedule(cell.max_model_len).arrivals


def test_each_rate_has_the_same_requests_in_every_mode_and_only_their_pace_differs(trace):
    cells = plan(grid(trace), Known.of(PRESET))
    assert [cell.mode for cell in cells] == [mode for mode in MODES for _ in (2.0, 8.0)]
    slow, fast = (requests_of(cell) for cell in cells[:2])
    assert [requests_of(cell) for cell in cells] == 3 * [slow, fast]
    assert len(slow) == 60 and [one.time for one in slow] == pytest.approx([4 * one.time for one in fast])
    assert [replace(one, time=0.0) for one in slow] == [replace(one, time=0.0) for one in fast]
    gaps = [after.time - before.time for before, after in zip(fast, fast[1:])]
    assert gaps[4] == pytest.approx(35 * gaps[0], rel=1e-3), "bursts stay bursts"


def test_requests_come_at_the_rate_that_was_asked_for_and_as_many_count(trace):
    for cell, rate in zip(plan(grid(trace), Known.of(PRESET)), 3 * (2.0, 8.0)):
        assert rate_of(cell) == pytest.approx(rate) and span(cell) == pytest.approx(60 / rate)
        counts = [record.counts for record in cell.schedule(cell.max_model_len).records()]
        assert [counts.index(True), sum(counts)] == [round(60 * 4 / 21), round(60 * 19 / 21) - round(60 * 4 / 21)]
        assert title(cell).endswith(f"made_up, {rate:g}/s ({cell.speed_up:.3g} times as fast), seed 0")


def test_shares_are_of_what_the_best_way_serves_of_these_requests(trace):
    cells = plan(grid(trace, rates=(), shares=(0.5,), modes=("collocated",)), Known.of(PRESET))
    source = as_recorded(BASE, trace, 60)
    assert len(mix_of(source).lengths) == 60 and max(map(sum, mix_of(source).lengths)) == BASE.max_model_len
    best = max(rate for _, rate in Planner(Known.of(PRESET).profile.cost, grid(trace).size, BASE.slo).rank(2, mix_of(source)))
    assert [rate_of(cell) for cell in cells] == pytest.approx([best / 2], rel=5e-3)


def test_a_trace_stands_beside_workloads_and_each_cell_has_a_file_of_its_own(trace, tmp_path):
    cells = plan(grid(trace, workloads=("short",), seeds=(0, 1)), Known.of(PRESET))
    assert len(cells) == 24 == len({Store(tmp_path).path(cell) for cell in cells})
    assert [cell.trace for cell in cells[:4]] == [None, None, trace, trace]
    assert "_made-up_x" in Store(tmp_path).path(cells[2]).name
    for cell in cells:
        Store(tmp_path).save(cell, record_of(cell))
        assert Store(tmp_path).has(cell)


def test_the_report_draws_a_trace_by_its_name_and_rate(trace, tmp_path):
    for cell in plan(grid(trace), Known.of(PRESET)):
        Store(tmp_path / "sweep").save(cell, record_of(cell))
    runs = load_runs(tmp_path / "sweep")
    assert {run.settings["workload"] for run in runs} == {"made_up"}
    rates = sorted({run.settings["rate"] for run in runs})
    assert len(rates) == 2 and rates[1] == pytest.approx(4 * rates[0], rel=5e-3)
    assert rates[0] == pytest.approx(2.0, rel=0.2), "offered in the window"
    assert [note.text for note in goodput_figure(runs).layout.annotations] == ["made_up"]


def test_what_prompts_share_they_share_in_a_cell_and_not_with_another_cell(trace):
    """A cluster serves one cell after the other, and its prefix caches outlive them."""
    slow, fast = plan(grid(trace, modes=("collocated",)), Known.of(PRESET))
    first, second = (prompts(requests_of(cell), 1000, cell.seed) for cell in (slow, fast))
    assert (first[1][:512] == first[3][:512]).all() and (first[0][:512] != first[2][:512]).any()
    assert not {prompt[:16].tobytes() for prompt in first} & {prompt[:16].tobytes() for prompt in second}


def test_requests_that_come_together_are_not_parted(tmp_path):
    path = tmp_path / "together.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"2024-01-01 00:00:{second:02d},100,10\n" for second in (0, 0, 0, 10, 10, 20)))
    plain = replace(BASE, warmup=0.0, tail=0.0)
    assert [len(requests_of(as_recorded(plain, str(path), number))) for number in (3, 4, 5, 6, 99)] == [3, 5, 5, 6, 6]
    bursts = as_recorded(replace(BASE, warmup=1.0, window=1.0, tail=1.0), str(path), 6)
    assert [record.counts for record in bursts.schedule(8192).records()] == 3 * [False] + 2 * [True] + [False]
    at_once = tmp_path / "at_once.csv"
    at_once.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(ConfigError, match="too many of the first 2 requests of .*at_once.csv"):
        as_recorded(plain, str(at_once), 2)


def test_the_command_plans_a_trace_alone_and_says_what_is_wrong_with_one(trace, tmp_path):
    def planned(*args):
        return CliRunner().invoke(app, ["bench", "sweep", "--plan", "--profile", PRESET, "--out", str(tmp_path / "out"), *args])

    result = planned("--trace", trace, "--shares", "0.5", "1.5", "--requests", "40")
    *cells, total = result.output.strip().splitlines()
    assert result.exit_code == 0 and len(cells) == 6 and total.startswith("6 cells") and all("made_up, " in cell for cell in cells)
    assert len(planned("--trace", trace, "--workloads", "short", "--rates", "3").output.strip().splitlines()) == 7
    for args, says in ((("--trace", "nothing.csv"), "can't read the trace nothing.csv"),
                       (("--trace", trace, "--requests", "0"), "'0' is not a number of at least 1")):
        result = planned(*args)
        assert result.exit_code == 2 and says in result.output
