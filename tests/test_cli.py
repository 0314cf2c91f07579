from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nanopd
from nanopd import demo
from nanopd.cli import app

ROOT = Path(__file__).parents[1]


def run(*args, **options):
    return CliRunner().invoke(app, [str(arg) for arg in args], **options)


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"nanopd {nanopd.__version__}\n"


def test_without_a_command_it_lists_them():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("doctor", "demo", "generate", "simulate", "plan"):
        assert command in result.output


def test_help_and_version_load_no_torch():
    for option in ("--help", "--version"):
        code = (f"import sys; from nanopd.cli import app; app(['{option}'], standalone_mode=False); "
                "assert 'torch' not in sys.modules")
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------------------------ simulate

FEW = ("--requests", 40, "--rate", 20, "--prompts", "short", "--outputs", "2-40")


def test_simulate_says_that_it_is_simulated_and_writes_json(tmp_path):
    file = tmp_path / "result.json"
    result = run("simulate", *FEW, "--workers", "C=1 P=1 D=1", "--slo-ttft", 200, "--slo-tpot", 20, "--json", file)
    assert result.exit_code == 0, result.output
    for text in ("Simulated: nvidia-h200/qwen3-8b, C=1 P=1 D=1, adaptive, router cost", "time to first token", "goodput",
                 "Nothing of this was measured"):
        assert text in result.output
    data = json.loads(file.read_text())
    assert (data["simulated"], data["mode"], data["slo"]) == (True, "adaptive", {"ttft": 0.2, "tpot": 0.02})
    assert data["summary"]["num_requests"] == 40
    assert set(data["utilisation"]) == {"C0", "P0", "D0"}
    assert run("simulate", *FEW, "--workers", "C=1 P=1 D=1", "--slo-ttft", 200, "--slo-tpot", 20).output == result.output


def test_simulate_a_trace(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,100,5\n2024-01-01 00:00:08,9000,5\n"
                     "2024-01-01 00:00:09,100,5\n")
    result = run("simulate", "--trace", trace, "--speed-up", 2, "--limit", 2, "--mode", "collocated", "--workers", "C=1",
                 "--max-model-len", 4096)
    assert result.exit_code == 0, result.output
    assert "2 requests of trace.csv, 2 times as fast; 1 of them cut to 4,096 tokens" in result.output


@pytest.mark.parametrize("options, says", [
    (("--hardware", "h300"), "there are nvidia-h200/qwen3-8b, seed/h20, seed/rtx-4090"),
    (("--workers", "4C"), "workers are counted as in 'C=4'"),
    (("--workers", "C=1 C=2"), "counted twice"),
    (("--workers", "C=0"), "at least one worker"),
    (("--mode", "fast"), "unknown mode 'fast'; modes are collocated"),
    (("--mode", "disaggregated", "--workers", "C=1"), "needs workers of role"),
    (("--router", "best"), "unknown router 'best'; there are cost"),
    (("--mode", "collocated", "--router", "cost"), "asks no router"),
    (("--slo-ttft", 100), "give both --slo-ttft and --slo-tpot"),
    (("--rate", 0), "rate is a number of requests a second above 0"),
    (("--prompts", "huge"), "prompts is short, long, mixed"),
    (("--trace", "nowhere.csv"), "can't read the trace nowhere.csv"),
])
def test_simulate_what_can_not_be(options, says):
    result = run("simulate", *FEW, *options)
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


def test_simulate_can_be_interrupted(monkeypatch):
    from nanopd.simulator import Simulation

    def interrupted(simulation, workload, progress=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Simulation, "run", interrupted)
    result = run("simulate", *FEW)
    assert result.exit_code == 130
    assert result.output.strip() == "nanopd: interrupted"


# ---------------------------------------------------------------------------------------------------- plan

PROMISED = ("--slo-ttft", 500, "--slo-tpot", 20)


@pytest.fixture
def few_requests(monkeypatch):
    from nanopd.simulator import plan

    monkeypatch.setattr(plan, "FEWEST", 20)
    monkeypatch.setattr(plan, "MOST", 20)


def test_plan_says_what_is_estimated_and_what_is_simulated(few_requests):
    result = run("plan", *PROMISED, "--workers", 2, "--prompts", "short", "--outputs", "2-20", "--check", 1, "--rate", 20)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for text in ("Planned: 2 workers of nvidia-h200/qwen3-8b", "estimated:", "simulated:", "P=1 D=1", "adaptive", "Simulated at",
                 "20 requests,", "Best, by simulation: C=2", "20 requests a second are estimated to be served",
                 "Nothing of this was measured"):
        assert text in said
    again = run("plan", *PROMISED, "--workers", 2, "--prompts", "short", "--outputs", "2-20", "--check", 1, "--rate", 20)
    assert again.output == result.output


def test_plan_by_formulas_alone_simulates_nothing(monkeypatch):
    from nanopd.simulator import Simulation

    monkeypatch.delattr(Simulation, "run")
    result = run("plan", *PROMISED, "--workers", 3, "--check", 0, "--rate", 1e6)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "Best, by formulas alone:" in said and "simulated" not in said.lower() and "adaptive" not in said
    assert "1e+06 requests a second are more than any split is estimated to serve in time" in said


def test_plan_for_a_trace(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,100,5\n2024-01-01 00:00:08,9000,5\n"
                     "2024-01-01 00:00:09,100,5\n")
    result = run("plan", *PROMISED, "--workers", 2, "--check", 1, "--trace", trace)
    assert result.exit_code == 0, result.output
    assert "3 requests of trace.csv; 1 of them cut to 8,192 tokens" in " ".join(result.output.split())
    result = run("plan", *PROMISED, "--trace", trace, "--limit", 1)
    assert result.exit_code == 2 and "come at the same time" in result.output


@pytest.mark.parametrize("options, says", [
    (("--hardware", "h300"), "there are nvidia-h200/qwen3-8b, seed/h20, seed/rtx-4090"),
    (("--hardware", "nowhere.json"), "can't read the profile"),
    (("--workers", 0), "at least 1 worker, got 0"),
    (("--slo-ttft", 0), "an SLO's ttft is a number of seconds above 0"),
    (("--slo-tpot", 0.001), "however few come, no split of 4 workers of nvidia-h200/qwen3-8b is estimated"),
    (("--rate", 0), "rate is a number of requests a second above 0"),
    (("--rate", "nan"), "rate is a number of requests a second above 0"),
    (("--check", -1), "0 or more, got -1"),
    (("--prompts", "huge"), "prompts is short, long, mixed"),
    (("--prompts", 9000), "raise max_model_len"),
    (("--trace", "nowhere.csv"), "can't read the trace nowhere.csv"),
    (("--kv-blocks", 0), "num_blocks must be at least 1"),
])
def test_plan_what_can_not_be(options, says):
    result = run("plan", *PROMISED, *options)
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


def test_plan_asks_for_the_slo():
    result = run("plan", "--slo-ttft", 500)
    assert result.exit_code == 2 and "--slo-tpot" in result.output


# -------------------------------------------------------------------------------------------------- doctor


def test_doctor_prints_a_table():
    result = run("doctor")
    assert result.exit_code == 0
    assert "What runs here" in result.output
    assert "Engine on the CPU" in result.output


def test_doctor_json_is_json_and_nothing_else():
    result = run("doctor", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output)["nanopd"] == nanopd.__version__


def test_doctor_fails_only_where_the_engine_cannot_run(monkeypatch):
    from nanopd import doctor

    monkeypatch.setattr(doctor, "_import_torch", lambda: (None, "not installed"))
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["runs"][0]["state"] == "missing"


# ---------------------------------------------------------------------------------------------------- demo


@pytest.mark.parametrize("theirs, exit_code", [((1, 2), 0), ((1, 3), 1)])
def test_demo_s_exit_code_says_whether_the_pipelines_agree(monkeypatch, theirs, exit_code):
    asked = {}

    def fake_run(model, max_tokens, device, topology, executor, progress):
        asked.update(model=model, max_tokens=max_tokens, device=device, topology=topology, executor=executor)
        progress("collocated: loading")
        ours, others = demo.Served("82", (1, 2), "C0", 0.1, 0.1), demo.Served("82", theirs, "P0 -> D0", 0.1, 0.1)
        row = demo.Row(demo_task(), ours, others, ours)
        return demo.Result(model, "the CPU", [row], 1.0)

    monkeypatch.setattr(demo, "run", fake_run)
    result = run("demo", "--max-tokens", 24, "--topology", "P:0 D:1", "--executor", "process")
    assert result.exit_code == exit_code, result.output
    assert asked == {"model": "tiny", "max_tokens": 24, "device": None, "topology": "P:0 D:1", "executor": "process"}


def demo_task():
    from nanopd.tiny.tasks import Task

    return Task("arithmetic", "en", "What is 47+35?", "82")


def test_demo_with_a_model_that_is_not_there():
    result = run("demo", "--model", "no-such-model", "--device", "cpu")
    assert result.exit_code == 2
    assert "no-such-model" in result.output
    assert "Traceback" not in result.output


# ------------------------------------------------------------------------------------------------- profile


def test_profile_measures_shows_and_writes(tmp_path):
    out = tmp_path / "new" / "mine.json"
    result = run("profile", "--topology", "C:cpu P:cpu D:cpu", "--seconds", 1, "--max-model-len", 256, "--max-num-seqs", 8,
                 "--max-num-batched-tokens", 64, "--out", out)
    assert result.exit_code == 0, result.output
    for word in ("prefill", "decode", "mixed", "cpu to cpu by", "bytes/s", "sharpness", "95% interval", "mine.json"):
        assert word in result.output.replace("\n", "")  # lines are wrapped
    from nanopd.cost_model.profile import Profile

    profile = Profile.load(out)
    assert (profile.model, profile.dtype) == ("tiny", "float32") and profile.measurements.transfer
    assert list(out.parent.iterdir()) == [out]


def test_profile_never_writes_over_a_file_unless_told_to(tmp_path, monkeypatch):
    from cost_model.models import MODEL

    from nanopd import cli
    from nanopd.cost_model.measurements import Measurements
    from nanopd.cost_model.profile import Profile

    asked = {}

    def measure(console, seconds, **options):
        asked.update(options, seconds=seconds)
        return Profile("here", options["model"], "bfloat16", "2026-01-31", {}, (), Measurements(), MODEL, ())

    monkeypatch.setattr(cli, "_measure", measure)
    out = tmp_path / "profile.json"
    out.write_text("mine")
    result = run("profile", "--out", out)
    assert result.exit_code == 2 and "--force" in result.output and out.read_text() == "mine" and not asked
    result = run("profile", "--out", out, "--force", "--model", "qwen3-8b", "--topology", "P:0 D:1", "--dtype", "bfloat16",
                 "--load-format", "dummy", "--max-model-len", 8192, "--max-num-seqs", 128, "--max-num-batched-tokens", 2048,
                 "--executor", "process", "--transport", "relay", "--seconds", 40)
    assert result.exit_code == 0, result.output
    assert asked == dict(model="qwen3-8b", topology="P:0 D:1", mode="disaggregated", dtype="bfloat16", load_format="dummy",
                         max_model_len=8192, max_num_seqs=128, max_num_batched_tokens=2048, executor="process",
                         transport="relay", seconds=40)
    assert Profile.load(out).model == "qwen3-8b"


@pytest.mark.parametrize("args, says", [
    (("--topology", "X:cpu"), "unknown role 'X'"), (("--topology", "P:cpu"), "needs workers of role"),
    (("--model", "no-such-model", "--topology", "C:cpu"), "no-such-model"), (("--load-format", "zip"), "zip"),
])
def test_profile_says_what_is_wrong(tmp_path, args, says):
    result = run("profile", "--out", tmp_path / "x.json", *args)
    assert result.exit_code == 2 and says in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gpus, topology", [(0, "C:cpu P:cpu D:cpu"), (1, "C:0 P:0 D:0"), (8, "C:0 P:0 D:1")])
def test_profile_s_own_topology_has_every_role(monkeypatch, gpus, topology):
    import torch

    from nanopd import cli

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert cli._every_role() == topology


# ------------------------------------------------------------------------------------------------ generate


def test_generate_streams_one_prompt():
    result = run("generate", "What is 47+35?", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.output == "82\n"


def test_generate_answers_several_in_order():
    result = run("generate", "What is 47+35?", "Sort these numbers: 72, 97, 8, 32.", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.output == "> What is 47+35?\n82\n> Sort these numbers: 72, 97, 8, 32.\n8, 32, 72, 97\n"


def test_generate_chat():
    result = run("generate", "--chat", "What is 47+35?", "--device", "cpu")
    assert (result.exit_code, result.output) == (0, "82\n")


def test_generate_reads_stdin():
    result = run("generate", "-", "--device", "cpu", input="What is 47+35?\n")
    assert (result.exit_code, result.output) == (0, "82\n")


def test_generate_with_random_weights_of_a_preset_s_shape_is_accepted_and_passed_on(monkeypatch):
    import nanopd.llm

    seen = {}

    class FakeLLM:
        def __init__(self, model, **options):
            seen.update(options, model=model)

        def stream(self, prompt, params):
            seen.update(params=params)
            yield nanopd.TokenEvent("0", text="hello")

    monkeypatch.setattr(nanopd.llm, "LLM", FakeLLM)
    monkeypatch.setattr(nanopd, "LLM", FakeLLM, raising=False)
    result = run("generate", "x", "--model", "qwen3-0.6b", "--dtype", "bfloat16", "--temperature", 0.7,
                 "--top-k", 5, "--top-p", 0.9, "--seed", 3, "--max-model-len", 512, "--max-tokens", 8)
    assert (result.exit_code, result.output) == (0, "hello\n")
    params = seen.pop("params")
    assert params == nanopd.SamplingParams(temperature=0.7, top_k=5, top_p=0.9, seed=3, max_tokens=8)
    assert seen == {"model": "qwen3-0.6b", "device": None, "dtype": "bfloat16", "max_model_len": 512}


@pytest.mark.parametrize("args, says", [
    (("--top-p", "2"), "top_p"),
    (("--model", "no-such-model"), "no-such-model"),
    (("--device", "tpu"), "tpu"),
    (("--dtype", "int3"), "int3"),
    (("--max-model-len", "2"), "prompt has"),
])
def test_generate_says_what_was_wrong_in_a_line(args, says):
    result = run("generate", "What is 47+35?", *args)
    assert result.exit_code == 2
    assert says in result.output
    assert len(result.output.strip().splitlines()) == 1
