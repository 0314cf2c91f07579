"""`nanopd serve`: what is said before it serves."""

from __future__ import annotations

import io
import socket
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nanopd.cli import app
from nanopd.config import SLO, ConfigError, Topology
from nanopd.server import command
from nanopd.server.app import Served


def run(*args, **options):
    return CliRunner().invoke(app, ["serve", *map(str, args)], **options)


@pytest.mark.parametrize("options, says", [
    (("--topology", "X:cpu"), "unknown role 'X'"),
    (("--topology", "P:cpu"), "needs workers of role"),
    (("--topology", "C:cpu", "--mode", "disaggregated"), "needs workers of role D and P"),
    (("--mode", "fast"), "unknown mode 'fast'"),
    (("--topology", "C:cpu", "--profile", "x.json"), "asks no router"),
    (("--slo-ttft", 100), "give both --slo-ttft and --slo-tpot"),
    (("--model", "no-such-model", "--topology", "C:cpu"), "no-such-model"),
    (("--topology", "C:cpu", "--max-model-len", 9999), "positions"),
    (("--host", "no such host"), "unknown host"),
])
def test_what_can_not_be_served(options, says):
    result = run("--port", 0, *options)
    assert result.exit_code == 2 and says in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("--port", taken.getsockname()[1])
    assert result.exit_code == 2 and "--port takes another" in result.output and "loading" not in result.output


def test_what_is_missing_where_the_extra_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "nanopd.server.command")
    monkeypatch.delattr("nanopd.server.command")
    result = run()
    assert (result.exit_code, result.output) == (2, "nanopd: uvicorn is not installed: pip install 'nanopd[serve]'\n")


def test_options_reach_the_cluster_and_the_limits(monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "serve", lambda *place, **options: asked.update(options, place=place))
    result = run("--model", "qwen3-8b", "--topology", "C:0 P:1 D:2", "--mode", "adaptive", "--executor", "process", "--host", "::1",
                 "--port", 1234, "--dtype", "bfloat16", "--load-format", "dummy", "--max-model-len", 8192, "--max-num-seqs", 128,
                 "--max-num-batched-tokens", 2048, "--max-queued", 9, "--max-streams", 8, "--max-body", 777, "--timeout", 30,
                 "--slo-ttft", 200, "--slo-tpot", 20, env={"NANOPD_API_KEY": "sesame"})
    assert result.exit_code == 0, result.output
    assert asked.pop("place") == ("qwen3-8b", "C:0 P:1 D:2", "adaptive")
    limits = asked.pop("limits")
    assert (limits.max_streams, limits.max_body, limits.timeout) == (8, 777, 30)
    assert isinstance(asked.pop("console"), Console)
    assert asked == dict(executor="process", host="::1", port=1234, api_key="sesame", dtype="bfloat16", load_format="dummy",
                         max_model_len=8192, max_num_seqs=128, max_num_batched_tokens=2048, max_queued=9, profile=None,
                         slo=SLO(0.2, 0.02))


@pytest.mark.parametrize("topology, mode", [("C:0 C:1", "collocated"), ("P:0 D:1", "disaggregated"), ("C:0 P:1 D:1", "adaptive")])
def test_the_mode_is_the_one_that_uses_all_workers(topology, mode):
    assert command._mode_of(Topology.parse(topology)) == mode


def greeting(host, has_key):
    console = Console(record=True, width=300, file=io.StringIO())
    with command.listen(host, 0) as listener:
        command._greet(console, Served("tiny", 64, None), listener, has_key)
        return console.export_text(), listener.getsockname()[1]


def test_only_this_machine_is_told_without_a_warning():
    said, port = greeting("127.0.0.1", False)
    assert said.startswith(f"listening on http://127.0.0.1:{port};") and f"curl http://127.0.0.1:{port}/v1/completions -H" in said
    assert "warning" not in said and "Authorization" not in said


@pytest.mark.parametrize("has_key, says", [(False, "nobody is asked for a key"), (True, "not encrypted")])
def test_other_addresses_come_with_a_warning(has_key, says):
    said, port = greeting("0.0.0.0", has_key)
    assert said.startswith("warning: 0.0.0.0 can be reached from other machines") and says in said
    assert ("Authorization: Bearer KEY" in said) == has_key


def test_an_address_that_is_not_ours():
    with pytest.raises(OSError, match=r"can't listen on 192\.0\.2\.1, port 80"):
        command.listen("192.0.2.1", 80)
    with pytest.raises(ConfigError, match="unknown host"):
        command.listen("no such host", 80)
