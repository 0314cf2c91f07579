"""`nanopd bench record` plays each mode on one cluster and keeps what a panel would have shown."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from nanopd.benchmark import live
from nanopd.benchmark.results import RECORDED
from nanopd.cli import app
from nanopd.config import ConfigError
from nanopd.widgets.live_recording import recordings

PROFILE = RECORDED / "cpu" / "sweep" / "profile.json"


def record(*args):
    return CliRunner().invoke(app, ["bench", "record", "--device", "cpu", *map(str, args)])


@pytest.mark.filterwarnings("ignore:the profile")
def test_each_mode_is_recorded_under_the_same_load(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "WARM_UP", 0.05)
    short = replace(live.CASES["cpu"], load=live.Load(mix="short", output_tokens=4))
    monkeypatch.setitem(live.CASES, "cpu", short)
    result = record("--rates", 8, 16, "--seconds", 0.6, "--profile", PROFILE, "--out", tmp_path, "--commit", "abc")
    assert result.exit_code == 0, result.output
    found = {mode: run for run in recordings(folder=tmp_path) for mode in run.modes}
    assert sorted(found) == ["adaptive", "collocated", "disaggregated"]
    fewest = min(len(run.requests["arrival"]) for run in found.values())
    assert fewest >= 4
    for mode, run in found.items():
        assert (run.model, run.topology, run.loads["rate"], run.commit, run.device["kind"]) == (
            "tiny", "C:cpu P:cpu D:cpu", [8, 16], "abc", "cpu")
        assert run.command == f"nanopd bench record --device cpu --rates 8 16 --seconds 0.6 --profile {PROFILE}"
        assert run.requests["prompt_len"][:fewest] == found["adaptive"].requests["prompt_len"][:fewest]
        assert {way for way in run.requests["mode"] if way} <= ({mode} if mode != "adaptive" else {"collocated", "disaggregated"})
        assert any(expected for expected in run.requests["expected"]) == (mode == "adaptive")
        assert (tmp_path / "cpu" / "live" / f"{mode}.json").exists()


def test_what_ends_a_run_is_told(monkeypatch):
    cluster = SimpleNamespace(limits=SimpleNamespace(vocab_size=500), topology=SimpleNamespace(devices=["cpu"]), has_work=False,
                              submit=lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        live._serve(cluster, live.CASES["cpu"], "collocated", (200.0,), 5.0)


@pytest.mark.parametrize(("gpus", "topology"), [
    (0, "C:cpu P:cpu D:cpu"), (1, "C:0 P:0 D:0"), (2, "C:0 C:1 P:0 D:1"), (8, "C:0 C:1 P:0 D:1")])
def test_the_plan_is_that_of_the_machine(monkeypatch, gpus, topology):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    plan = live.plan()
    assert plan.topology == topology and plan.model == ("qwen3-8b" if gpus else "tiny")
    assert len(plan.modes) * (plan.seconds * len(plan.rates) + live.WARM_UP) < 70, "with a start, more than 90 seconds"
    assert max(plan.rates) > plan.rates[-1], "nobody sees the queue go"


def test_a_mode_without_workers_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError):
        live.plan("cpu", topology="C:cpu", modes=("disaggregated",))
    result = record("--topology", "C:cpu", "--out", tmp_path)
    assert result.exit_code == 2 and "disaggregated" in result.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [("--rates", "0"), ("--seconds", "-1"), ("--rates", "nan"), ("--modes", "fastest")])
def test_what_cannot_be_is_refused(option):
    assert record(*option).exit_code == 2
