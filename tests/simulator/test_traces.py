"""Traces: of both formats as they are published, and of every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nanopd.config import ConfigError
from nanopd.simulator.traces import TraceError, read_trace
from nanopd.simulator.workload import PIECE, Arrival

TRACES = Path(os.environ.get("NANOPD_TRACES", "traces"))  # the folder that holds the traces, where somebody has them

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9799600,4808,10
2023-11-17 00:00:00.0319600,3180,8
2023-11-17 00:00:01,110,27
"""
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MOONCAKE = [
    {"timestamp": 27000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 27000, "input_length": 1030, "output_length": 6, "hash_ids": [0, 1, 3]},
    {"timestamp": 30000, "input_length": 10, "output_length": 7, "hash_ids": [4]},
]


def written(tmp_path, text):
    path = tmp_path / "trace"
    path.write_text(text if isinstance(text, str) else "".join(json.dumps(line) + "\n" for line in text), encoding="utf-8")
    return path


def test_azure(tmp_path):
    trace = read_trace(written(tmp_path, AZURE))
    assert trace.arrivals == [Arrival(0.0, 4808, 10), Arrival(0.052, 3180, 8), Arrival(1.02004, 110, 27)]
    assert (trace.name, trace.num_cut, len(trace)) == ("trace", 0, 3)


@pytest.mark.parametrize("text", [
    "\ufeff" + AZURE.replace("\n", "\r\n"), AZURE + "\n\n", AZURE.replace("\n2023", "\n2023").replace(" 2", "T2"),
    AZURE.replace(",", " , "), AZURE.replace(":59.9799600", ":59.9799600+00:00").replace("00.0319600", "00.0319600Z"),
])
def test_azure_as_other_programs_write_it(tmp_path, text):
    assert read_trace(written(tmp_path, text)).arrivals == read_trace(written(tmp_path, AZURE)).arrivals


def test_columns_may_stand_in_any_order(tmp_path):
    [one] = read_trace(written(tmp_path, "model,GeneratedTokens,TIMESTAMP,ContextTokens\na,3,2024-05-10 00:00:00,9\n"))
    assert one == Arrival(0.0, 9, 3)


def test_mooncake(tmp_path):
    first, second, third = read_trace(written(tmp_path, MOONCAKE))
    assert first == Arrival(0.0, 1100, 5, prefix=(0, 1, 2))
    assert third == Arrival(3.0, 10, 7, prefix=(4,))
    assert first.prompt(0)[: 2 * PIECE] == second.prompt(1)[: 2 * PIECE]
    assert first.prompt(0)[2 * PIECE] != second.prompt(1)[2 * PIECE]
    assert [len(one.prompt(7)) for one in (first, second, third)] == [1100, 1030, 10]


def test_speed_window_and_number(tmp_path):
    trace = read_trace(written(tmp_path, AZURE))
    assert [one.time for one in trace.sped_up(2.0)] == [0.0, 0.026, 0.51002]
    assert [one.time for one in trace.window(0.052)] == pytest.approx([0.0, 0.96804])
    assert [one.prompt_len for one in trace.window(0, 1)] == [4808, 3180]
    assert [one.prompt_len for one in trace.first(1)] == [4808]
    with pytest.raises(TraceError, match="no request from 5 to inf s; it goes from 0 to 1.02"):
        trace.window(5)
    with pytest.raises(ConfigError, match="sped up by a factor above 0, got 0"):
        trace.sped_up(0)
    with pytest.raises(ConfigError, match="at least 1 request"):
        trace.first(0)


def test_cut(tmp_path):
    """The answer gives way down to half of what there may be, then the prompt."""
    lines = [{"timestamp": 0, "input_length": prompt, "output_length": answer, "hash_ids": [1]}
             for prompt, answer in ((60, 40), (90, 20), (60, 80), (40, 200), (300, 200))]
    cut = read_trace(written(tmp_path, lines)).cut_to(100)
    assert [(one.prompt_len, one.output_len) for one in cut] == [(60, 40), (80, 20), (50, 50), (40, 60), (50, 50)]
    assert cut.num_cut == 4
    assert cut.cut_to(100).num_cut == 4


@pytest.mark.parametrize("text, says", [
    ("", "is empty; known are Azure's CSV .* and Mooncake's"),
    ("\n \n", "is empty"),
    (HEADER, "has a header and no request"),
    ("a,b,c\n1,2,3\n", "of a known format, it begins 'a,b,c'; known are Azure's CSV"),
    (HEADER + "2023-11-16 18:17:03,5\n", "line 2: 2 columns, the header has 3"),
    (HEADER + "\n2023-11-16 18:17:03,5,5\nyesterday,5,5\n", "line 4: TIMESTAMP is such as .* got 'yesterday'"),
    (HEADER + "2023-11-16 18:17:63,5,5\n", "line 2: "),
    (HEADER + "2023-11-16 18:17:03,many,5\n", "line 2: ContextTokens is a number of tokens of at least 1, got 'many'"),
    (HEADER + "2023-11-16 18:17:03,5,0\n", "line 2: GeneratedTokens .* got 0"),
    (HEADER + "2023-11-16 18:17:03,5,-3\n", "line 2: GeneratedTokens .* got '-3'"),
    (HEADER + "2023-11-16 18:17:03,5,5\n2023-11-16 18:17:01,5,5\n", "line 3: it comes 2 s before the request above it; sort"),
    ('{"timestamp": 0\n', "line 1: not JSON"),
    ([{"timestamp": 0, "input_length": 5}], "line 1: lacks output_length"),
    ([MOONCAKE[0], [1]], "line 2: lacks timestamp, input_length, output_length"),
    ([MOONCAKE[0] | {"timestamp": "0"}], "line 1: timestamp is a number of milliseconds, got '0'"),
    ([MOONCAKE[0] | {"input_length": 2.5}], "line 1: input_length .* got 2.5"),
    ([MOONCAKE[0] | {"hash_ids": [1, "2"]}], "line 1: hash_ids is a list of integers"),
    ([MOONCAKE[2], MOONCAKE[0]], "line 2: it comes 3 s before"),
])
def test_what_is_no_trace(tmp_path, text, says):
    with pytest.raises(TraceError, match=says):
        read_trace(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TraceError, match="can't read the trace .*nowhere.csv"):
        read_trace(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("name, num_requests, seconds", [
    ("azure_llm_code_2023.csv", 8819, 3435.948056), ("mooncake_synthetic_2025.jsonl", 3993, 1022.025)])
def test_the_published_traces(name, num_requests, seconds):
    if not (TRACES / name).exists():
        pytest.skip(f"needs {TRACES / name}")
    trace = read_trace(TRACES / name)
    assert (len(trace), trace.arrivals[-1].time) == (num_requests, seconds)
    assert all(len(one.prefix) in (0, -(-one.prompt_len // PIECE)) for one in trace)
