"""`nanopd bench serve`."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from nanopd.benchmark.load import ClientRecord, Load, RunRecord, RunSettings, Stopped, Tally, command
from nanopd.cli import app

QUICK = ("--topology", "C:cpu", "--rate", 10, "--prompts", "8-16", "--outputs", 3, "--warmup", 0.1, "--window", 1,
         "--max-num-seqs", 8, "--max-model-len", 128, "--kv-blocks", 128)


def run(*args):
    return CliRunner().invoke(app, ["bench", "serve", *map(str, args)])


def settings(*args):
    from nanopd.benchmark.command import _parser

    return command.settings_of(_parser().parse_args(["serve", *map(str, args)]))


def test_a_run_on_the_cpu(tmp_path):
    result = run(*QUICK, "--slo-ttft", 60000, "--slo-tpot", 60000, "--out", tmp_path / "run.json", "--commit", "abc")
    assert result.exit_code == 0, result.output
    record = RunRecord.load(tmp_path / "run.json")
    assert (record.settings["workload"], record.settings["rate"], record.commit, record.dirty) == ("8-16/3", 10, "abc", None)
    assert record.metrics["attainment"] == 1.0 and record.metrics["completed"] > 3
    assert record.command.startswith("nanopd bench serve --topology C:cpu --rate 10") and "--out " not in record.command
    for text in ("tiny on C:cpu, collocated; 8-16/3, 10 requests/s", "first token", f"{record.metrics['completed']} completed, 0 failed",
                 "100.0% met the SLO (TTFT 60000 ms, TPOT 60000 ms)", "the client sent", "not steady: ", "too few"):
        assert text in result.output


def test_defaults(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = settings()
    assert chosen == RunSettings(topology="C:cpu", workload=command.WORKLOAD, rate=command.RATE)
    assert chosen.schedule(4096).arrivals
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings().topology == "C:0"


def test_options_become_settings(tmp_path):
    path = tmp_path / "trace.csv"
    assert settings("--workload", "mooncake", "--model", "qwen3-8b", "--topology", "P:0 D:1", "--mode", "disaggregated",
                    "--burstiness", 0.5, "--tail", 3, "--kv-blocks", 100) == RunSettings(
        model="qwen3-8b", topology="P:0 D:1", mode="disaggregated", workload="mooncake", rate=command.RATE, burstiness=0.5, tail=3.0,
        kv_blocks=100)
    of_trace = settings("--trace", path, "--speed-up", 4, "--topology", "C:cpu")
    assert (of_trace.trace, of_trace.speed_up, of_trace.rate, of_trace.window) == (str(path), 4.0, None, None)
    assert settings("--trace", path, "--window", 7, "--topology", "C:cpu").window == 7
    of_endpoint = settings("--endpoint", "http://a:1", "--model", "m", "--outputs", 7)
    assert (of_endpoint.endpoint, of_endpoint.model, of_endpoint.workload) == ("http://a:1", "m", "64-256/7")


@pytest.mark.parametrize("args, says", [
    (("--endpoint", "http://a:1", "--topology", "C:0", "--kv-blocks", 5), "--endpoint and --topology, --kv-blocks exclude each other"),
    (("--endpoint", "http://a:1"), "--endpoint needs --model"),
    (("--trace", "t.csv", "--rate", 3), "--trace and --rate exclude each other"),
    (("--workload", "short", "--outputs", 3), "--workload and --outputs exclude each other"),
    (("--workload", "huge"), "unknown workload 'huge'; there are short, long, mixed, azure-code, mooncake"),
    (("--slo-ttft", 3), "set both, or none"),
    (("--rate", 0), "rate is a number of requests a second above 0"),
    (("--window", -1), "window is a number of seconds above 0"),
    (("--trace", "nowhere.csv"), "can't read the trace nowhere.csv"),
    (("--out", "/dev/null/run.json"), "/dev/null"),
    (("--mode", "both"), "invalid choice: 'both'"),
    (("--kv-blocks", 0), "at least 1"),
    (("--topology", "C:tpu"), "C:tpu"),
    (("--topology", "C:cpu", "--mode", "disaggregated"), "needs workers of role D and P"),
    (("--topology", "C:cpu", "--workload", "long", "--max-model-len", 512), "raise max_model_len"),
    (("--endpoint", "http://127.0.0.1:9", "--model", "m"), "does not answer for the model 'm'"),
])
def test_what_is_wrong_is_said_in_a_line(args, says):
    result = run(*args)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_ctrl_c_shows_what_there_is_and_saves_nothing(monkeypatch, tmp_path):
    done = ClientRecord(0.5, 10, 2, sent=0.5, ended=1.0, status="completed", tokens=[0.75, 1.0])
    cut = ClientRecord(0.6, 10, 2, sent=0.6, ended=1.5, status="failed", error="the load was stopped")

    def interrupted(chosen, line):
        raise Stopped(Load([done, cut], 0.0, 1.5))

    monkeypatch.setattr(command, "_on_cluster", interrupted)
    result = run(*QUICK, "--out", tmp_path / "run.json")
    assert result.exit_code == 130
    assert "1 completed, 1 failed" in result.output and "stopped: these are the requests sent by then" in result.output
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_there_is_anything(monkeypatch):
    def interrupted(chosen, line):
        raise Stopped(Load([], 2.0, 2.0))

    monkeypatch.setattr(command, "_on_cluster", interrupted)
    result = run(*QUICK)
    assert result.exit_code == 130
    assert "stopped before a request came that counts" in result.output and "first token" not in result.output


@pytest.mark.parametrize("is_terminal", [True, False])
def test_how_far_it_is(monkeypatch, capsys, is_terminal):
    """Each second on a terminal, always in the same line; every ten seconds elsewhere."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    line = command._Line()
    for second in range(1, 21):
        line(Tally(second + 0.01, 50, 2 * second, 3))
    line.end()
    said = capsys.readouterr().err
    assert "20 s: 40 of 50 sent, 3 open, 37 ended" in said
    assert (said.count("sent"), said.count("\n"), said.count("\r")) == ((20, 1, 20) if is_terminal else (2, 2, 0))


def test_what_ought_to_be_known_of_the_figures_is_said(capsys):
    load = Load([ClientRecord(0.0, 10, 4, sent=0.0, ended=2.0, status="completed", mode=mode, tokens=[1.0, 2.0], num_reported=4)
                 for mode in ("collocated", "disaggregated")], 0.0, 3.0)
    command.show(RunRecord.of(RunSettings(rate=1.0), load, {}, num_cut=2))
    said = capsys.readouterr().out
    for text in ("2 requests were cut", "4 of 8 tokens came in a piece with another one", "collocated 50%, disaggregated 50%"):
        assert text in said


def test_the_file_is_json_as_it_is_specified(tmp_path):
    """No NaN, whatever there is nothing of."""
    record = RunRecord.of(RunSettings(rate=1.0), Load([], 0.0, 1.0), {})
    record.save(tmp_path / "run.json")
    json.loads((tmp_path / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
