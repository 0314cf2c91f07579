"""`nanopd bench sweep` and `nanopd bench report`: options, what is said, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmark.load.runs import record_of
from typer.testing import CliRunner

from nanopd.benchmark import command, sweep, sweep_command
from nanopd.benchmark.load.run import RunRecord
from nanopd.benchmark.sweep import CASES, Known, Tallied
from nanopd.cli import app
from nanopd.widgets.strings import set_language

PRESET = "nvidia-h200/qwen3-8b"
GIVEN = ("sweep", "--device", "cpu", "--profile", PRESET, "--workloads", "8-16/4", "--rates", "15", "30")


def bench(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_the_plan_is_printed_and_nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "open_cluster", lambda settings: pytest.fail("a cluster was started"))
    result = bench(*GIVEN, "--seeds", 3, 4, "--window", 6, "--slo-ttft", 250, "--plan", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    *cells, total = result.output.strip().splitlines()
    assert len(cells) == 12 and total.startswith("12 cells, 0 done already; about ")
    assert cells[0].startswith("collocated 'C:cpu C:cpu', 8-16/4, 15/s, seed 3: about ")
    assert list(tmp_path.iterdir()) == []


def test_the_plan_without_a_profile_says_what_it_lacks(tmp_path):
    result = bench("sweep", "--device", "cpu", "--plan", "--out", tmp_path)
    assert result.exit_code == 2 and "--profile" in result.output


def test_options_reach_the_cells(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(sweep_command, "run", lambda cells, store, pace, known, budget, stamp: asked.update(
        cells=cells, store=store, known=known, budget=budget, stamp=stamp) or Tallied(done=len(cells)))
    result = bench(*GIVEN, "--seeds", 3, "--window", 6, "--warmup", 0, "--tail", 1, "--slo-ttft", 250, "--slo-tpot", 20, "--executor",
                   "inline", "--gpus", 1, "--modes", "disaggregated", "--budget", 90, "--out", tmp_path, "--commit", "fab")
    assert result.exit_code == 0, result.output
    assert [cell.rate for cell in asked["cells"]] == [15, 30]
    cell = asked["cells"][0]
    assert (cell.seed, cell.window, cell.warmup, cell.tail, cell.slo_ttft_ms, cell.slo_tpot_ms) == (3, 6, 0, 1, 250, 20)
    assert (cell.topology, cell.executor, cell.workload) == ("P:cpu D:cpu", "inline", "8-16/4")
    assert asked["budget"] == 90 and asked["store"].folder == tmp_path
    stamped = asked["stamp"](record_of(cell))
    assert stamped.commit == "fab" and stamped.dirty is None
    assert stamped.command.startswith("nanopd bench sweep --device cpu") and "--out" not in stamped.command


@pytest.mark.parametrize(("tally", "code", "says"), [
    (Tallied(done=3), 0, ""), (Tallied(done=2, failed=1), 1, "1 cells failed"), (Tallied(done=2, left=4), 3, "4 cells did not fit")])
def test_the_exit_code_says_how_it_went(monkeypatch, tmp_path, tally, code, says):
    monkeypatch.setattr(sweep_command, "run", lambda *args: tally)
    result = bench(*GIVEN, "--out", tmp_path)
    assert result.exit_code == code and says in result.output


def test_ctrl_c_says_what_is_there_and_how_to_go_on(monkeypatch, tmp_path):
    def stopped(cells, store, *args):
        store.save(cells[0], record_of(cells[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_command, "run", stopped)
    result = bench(*GIVEN, "--out", tmp_path)
    assert result.exit_code == 130
    assert "stopped: 1 of 6 cells are in" in result.output and "goes on from there" in result.output


def test_a_machine_is_measured_once_for_all_that_go_on(monkeypatch, tmp_path):
    measured = []

    def measure(grid, out, seconds):
        measured.append(seconds)
        Known.of(PRESET).profile.save(out / sweep.PROFILE)
        return Known.of(str(out / sweep.PROFILE))

    monkeypatch.setattr(sweep_command, "measure", measure)
    asked = []
    monkeypatch.setattr(sweep_command, "run", lambda cells, *args: asked.append(cells) or Tallied())
    args = ("sweep", "--device", "cpu", "--workloads", "8-16/4", "--shares", 0.5, 1.5, "--slo-tpot", 30, "--out", tmp_path)
    assert bench(*args).exit_code == bench(*args).exit_code == 0
    assert measured == [CASES["cpu"].profile_seconds]
    assert asked[0] == asked[1] and len(asked[0]) == 6
    assert str(tmp_path) not in json.dumps([cell.profile for cell in asked[0]])


@pytest.mark.parametrize(("args", "says"), [
    (("--rates", "0"), "not a number above 0"), (("--rates", "1", "--shares", "1"), "not allowed with"), (("--gpus", "0"), "at least 1"),
    (("--warmup", "-1"), "at least 0"), (("--device", "tpu"), "cuda"), (("--workloads", "poems", "--device", "cpu"), "poems"),
    (("--modes", "both", "--device", "cpu"), "MODE=TOPOLOGY"), (("--profile", "nothing.json", "--device", "cpu"), "nothing.json")])
def test_wrong_options_are_named(args, says, tmp_path):
    result = bench("sweep", *args, "--plan", "--out", tmp_path)
    assert result.exit_code == 2 and says in result.output


def test_without_enough_gpus_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench("sweep", "--gpus", 4, "--out", tmp_path)
    assert result.exit_code == 2 and "--gpus 4 needs as many CUDA devices" in result.output and "--device cpu" in result.output


# ------------------------------------------------------------------------------------------------------------ report


def test_report_of_what_is_recorded(tmp_path):
    result = bench("report", "--recorded", "--out", tmp_path / "en")
    assert result.exit_code == 0, result.output
    assert "index.html" in result.output and (tmp_path / "en" / "decode-scaling.svg").exists()


def test_report_in_chinese(tmp_path):
    try:
        assert bench("report", "--recorded", "--out", tmp_path, "--lang", "zh").exit_code == 0
    finally:
        set_language(None)
    assert 'lang="zh"' in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("args", "says"), [((), "--recorded"), (("nowhere",), "no cells of a sweep in nowhere"),
                                            (("nowhere", "--recorded"), "--recorded")])
def test_report_of_nothing_says_what_to_do(args, says, tmp_path):
    result = bench("report", *args, "--out", tmp_path)
    assert result.exit_code == 2 and says in result.output


def test_a_run_of_bench_serve_is_drawn_as_well(tmp_path):
    cell = sweep.RunSettings(workload="8-16/4", rate=20.0, slo_ttft_ms=200.0, slo_tpot_ms=20.0)
    record_of(cell).save(tmp_path / "runs" / "mine.json")
    assert isinstance(RunRecord.load(tmp_path / "runs" / "mine.json"), RunRecord)
    result = bench("report", tmp_path / "runs", "--out", tmp_path / "report")
    assert result.exit_code == 0 and Path(tmp_path / "report" / "goodput.svg").exists()
    assert "crossover: no data" in result.output


def test_the_commands_are_listed():
    assert "sweep" in bench("--help").output and "report" in bench("--help").output
    assert command._parser().parse_args(["sweep"]).run is sweep_command._sweep
