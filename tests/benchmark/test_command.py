"""`nanopd bench` on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from nanopd.benchmark import command, planning
from nanopd.benchmark.results import load
from nanopd.cli import app

ROOT = Path(__file__).parents[2]


def run(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_scheduler_is_measured_and_recorded(no_gpu, tmp_path):
    result = run("scheduler", "--batches", 1, 3, "--context", 40, "--steps", 20, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = load("scheduler", folder=tmp_path)
    assert [(row["batch"], row["context"]) for row in report.rows] == [(1, 40), (3, 40)]
    for row in report.rows:
        assert 0 < row["schedule_us"] and 0 < row["commit_us"] and 0 < row["step_us"] <= row["step_p99_us"]
    assert report.command == "nanopd bench scheduler --batches 1 3 --context 40 --steps 20"
    assert report.device["kind"] == "cpu" and report.device["cpu"]
    assert report.versions["torch"] == torch.__version__
    assert "step us" in result.output


def test_kernels_on_a_cpu_time_the_reference(tmp_path, monkeypatch):
    from nanopd.benchmark import attention

    monkeypatch.setattr(attention.reference_rows, "__defaults__", (((2, 32),),))
    result = run("kernels", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    row, = load("kernels", folder=tmp_path).rows
    assert (row["kernel"], row["batch"], row["context"]) == ("reference", 2, 32)
    assert row["us"] > 0


@pytest.mark.parametrize("bench", ["kernels", "decode", "prefill", "static", "all"])
def test_what_needs_a_gpu_says_so(no_gpu, bench, tmp_path):
    result = run(bench, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"`bench {bench}` needs a CUDA device" in result.output
    assert list(tmp_path.iterdir()) == []


def test_routing_needs_two_gpus_or_to_be_told_cpu(no_gpu, monkeypatch, tmp_path):
    from nanopd.benchmark import routing

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    result = run("routing", "--out", tmp_path)
    assert result.exit_code == 2
    assert "`bench routing` needs two CUDA devices, and torch sees 1; `nanopd bench routing --device cpu`" in result.output
    asked, profile = [], SimpleNamespace(device="Some CPU", save=lambda path: asked.append(path))
    monkeypatch.setattr(routing, "run", lambda case: (asked.append(case), ([{"mode": "adaptive"}], {}, profile))[1])
    result = run("routing", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert asked == [routing.CASES["cpu"], tmp_path / "some-cpu" / "profile-tiny.json"]
    assert load("routing", folder=tmp_path).rows == [{"mode": "adaptive"}]


@pytest.mark.parametrize("args, fits", [
    (("--only", "chat"), lambda cell: cell.mix == "chat"),
    (("--only", "4090", "mixed", "tight"), lambda cell: (cell.hardware, cell.mix, cell.slo) == ("seed/rtx-4090", "mixed", "tight")),
    ((), lambda cell: True)])
def test_study_takes_the_cells_that_are_named_or_all(monkeypatch, tmp_path, args, fits):
    from nanopd.benchmark import study

    asked = []
    monkeypatch.setattr(study, "run", lambda cells, jobs: (asked.append((cells, jobs)), ([{"mix": "chat"}], {}))[1])
    result = run("study", "--jobs", 1, *args, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (cells, jobs), = asked
    assert jobs == 1 and cells == [cell for cell in study.CELLS if fits(cell)] != []
    report = load("study", folder=tmp_path)
    assert report.device["kind"] == "cpu" and "simulated, not measured" in report.notes[0]


def test_study_of_a_cell_that_there_is_not(tmp_path):
    result = run("study", "--only", "h200", "poems", "--out", tmp_path)
    assert result.exit_code == 2 and "poems" in result.output and "seed/h20, 4 workers, mixed, tight" in result.output


@pytest.mark.parametrize("args, says", [
    ((), "BENCHMARK"),
    (("nonsense",), "nonsense"),
    (("decode", "--cells", "16"), "BATCHxCONTEXT"),
    (("static", "--sets", "4x64-32"), "REQUESTSxFROM-TO"),
    (("scheduler", "--batches", "0"), "at least 1"),
    (("static", "--peer", "llama.cpp"), "transformers"),
    (("study", "--jobs", "0"), "at least 1"),
    (("routing", "--device", "tpu"), "cuda"),
])
def test_wrong_options_are_named(args, says):
    result = run(*args)
    assert result.exit_code == 2
    assert says in result.output


def test_help():
    assert "scheduler" in run("--help").output
    assert "--batches" in run("scheduler", "--help").output
    assert "bench" in CliRunner().invoke(app, ["--help"]).output


def test_ctrl_c_saves_nothing_and_says_so(monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "run", interrupted)
    result = run("scheduler", "--out", tmp_path)
    assert result.exit_code == 130
    assert "nothing was saved" in result.output
    assert list(tmp_path.iterdir()) == []


def test_all_goes_on_after_one_that_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ran = []

    def fake(name):
        def measure(options):
            ran.append(name)
            if name == "kernels":
                raise RuntimeError("a kernel broke")
            return command.Found({}, [{"x": 1.0}], {}, [], on_cpu=True)
        measure.__name__ = f"_{name}"
        return measure

    for name in ("scheduler", "kernels", "decode", "prefill", "static"):
        monkeypatch.setattr(command, f"_{name}", fake(name))
    assert command.main(["all", "--out", str(tmp_path), "--commit", "abc"]) == 1
    assert ran == ["scheduler", "kernels", "decode", "prefill", "static"]
    assert sorted(path.stem for path in tmp_path.rglob("*.json")) == ["decode", "prefill", "scheduler", "static"]
    assert load("decode", folder=tmp_path).commit == "abc"
    said = capsys.readouterr().err
    assert "a kernel broke" in said and "failed: kernels" in said


def test_runs_without_typer_and_rich(tmp_path):
    code = ("import sys; sys.modules['rich'] = sys.modules['typer'] = None; sys.argv[1:] = "
            f"['scheduler', '--batches', '1', '--steps', '5', '--context', '20', '--out', {str(tmp_path)!r}]; "
            "import runpy; runpy.run_module('nanopd.benchmark', run_name='__main__')")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "step_us" in ran.stdout
    assert json.loads(next(tmp_path.rglob("scheduler.json")).read_text())["bench"] == "scheduler"
