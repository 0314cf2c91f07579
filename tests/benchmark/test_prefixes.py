"""A router that knows who has computed what, beside one that does not."""

from __future__ import annotations

import json
from random import Random

import pytest

from nanopd.benchmark import command, prefixes
from nanopd.simulator.traces import Trace
from nanopd.simulator.workload import Arrival


def chats(number: int, seed: int = 0) -> list[Arrival]:
    """Turns of a few long conversations."""
    random = Random(seed)
    return [Arrival(0.15 * turn, 4200, 20, prefix=tuple(range(100 * chat, 100 * chat + 8)))
            for turn in range(number) for chat in [random.randrange(12)]]


def test_knowing_who_has_a_prompt_s_beginning_saves_computing_it(monkeypatch):
    monkeypatch.setattr(prefixes, "WORKERS", ({"C": 4},))
    rows, summary = prefixes.run(Trace("chats", chats(60)))
    assert [(row["workers"], row["router_knows"]) for row in rows] == [("C=4", True), ("C=4", False)]
    assert summary["shorter"]["C=4 ttft_p50"] == pytest.approx(1 - rows[0]["ttft_p50_ms"] / rows[1]["ttft_p50_ms"])
    assert summary["shorter"]["C=4 ttft_p50"] > 0.2


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prefixes, "WORKERS", ({"C": 2},))
    trace = tmp_path / "chats.jsonl"
    trace.write_text("".join(json.dumps({"timestamp": 1e3 * one.time, "input_length": one.prompt_len, "output_length": 20,
                                         "hash_ids": one.prefix}) + "\n" for one in chats(30)))
    assert command.main(["prefixes", "--trace", str(trace), "--requests", "20", "--out", str(tmp_path)]) == 0
    report = json.loads(next(tmp_path.glob("*/prefixes.json")).read_text())
    assert [row["requests"] for row in report["rows"]] == [20, 20] and "simulated" in report["notes"][0]


def test_a_trace_without_prefixes_has_nothing_to_say(tmp_path, capsys):
    trace = tmp_path / "azure.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    assert command.main(["prefixes", "--trace", str(trace), "--out", str(tmp_path)]) == 2
    assert "begin alike" in capsys.readouterr().err
