from __future__ import annotations

import pytest
from rich.cells import cell_len
from rich.console import Console

from nanopd import ConfigError, Topology, demo
from nanopd.demo import Result, Row, Served
from nanopd.tiny.tasks import Task

TASK = Task("arithmetic", "en", "What is 47+35?", "82")


def served(text="82", token_ids=(7, 8), path="C0", **rest):
    return Served(text, token_ids, path, **{"ttft": 0.012, "tpot": 0.003, **rest})


def shown(result, width=100):
    console = Console(record=True, width=width)
    demo.show(result, console)
    return console.export_text()


def test_rows_that_agree():
    row = Row(TASK, served(), served(path="P0 -> D0"), served(path="C0"))
    assert row.verdict == "right"
    assert row.difference is None
    result = Result("tiny", "the CPU", [row], 2.0)
    assert result.exit_code == 0
    text = shown(result)
    for part in ("What is 47+35?", "82", "right", "C0", "P0 -> D0", "12.0", "3.0", "All three modes agree token by token on all 1 prompts",
                 "1 of 1 answers right", "the CPU, 2 s"):
        assert part in text


@pytest.mark.parametrize("ours, theirs, difference", [
    ((7, 8, 9), (7, 1, 9), "disaggregated from token 2 on (3 and 3 tokens)"),
    ((7, 8), (7, 8, 9), "disaggregated from token 3 on (2 and 3 tokens)"),
    ((), (7,), "disaggregated from token 1 on (0 and 1 tokens)"),
])
def test_rows_that_differ_say_where(ours, theirs, difference):
    row = Row(TASK, served(token_ids=ours), served("81", theirs, "P0 -> D0"), served(token_ids=ours))
    assert row.difference == difference
    result = Result("tiny", "the CPU", [row, Row(TASK, served(), served(), served())], 2.0)
    assert result.exit_code == 1
    text = shown(result)
    assert "The modes differ on 1 of 2 prompts" in text
    assert difference in text
    assert "81" in text


def test_an_error_is_a_difference_even_where_both_fail_alike():
    row = Row(TASK, *[served("", (), error="boom")] * 3)
    assert row.difference == "collocated failed: boom"


def test_no_time_is_a_dash():
    text = shown(Result("tiny", "the CPU", [Row(TASK, served(ttft=None, tpot=None), served(), served())], 1.0))
    assert " - " in text


def test_an_answer_cut_off_is_not_called_wrong():
    row = Row(TASK, *[served("8", cut_off=True)] * 3)
    assert row.verdict == "cut off"
    text = shown(Result("tiny", "the CPU", [row], 1.0))
    assert "cut off" in text
    assert "0 of 1 answers right" in text


def test_a_wrong_answer_is_shown_as_wrong():
    assert "wrong" in shown(Result("tiny", "the CPU", [Row(TASK, *[served("83")] * 3)], 1.0))


@pytest.mark.parametrize("text", ["short", "a" * 100, "请记住这些密码：" * 10, "mixed 文字 " * 12, "[/not] markup " * 9])
@pytest.mark.parametrize("width", [12, 13, 34])
def test_shorten_keeps_both_ends_within_the_width(text, width):
    short = demo.shorten(text, width)
    assert cell_len(short) <= width
    assert short[0] == text[0]


def test_table_fits_80_columns():
    task = Task("story", "zh", "用6句话讲一个故事" * 5, "x")
    rows = [Row(task, served("从前，大海旁边" * 9), served(ttft=12.3456, path="P0 -> D0"), served())]
    lines = shown(Result("tiny", "the CPU", rows, 1.0), width=80).splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert any("12345.6" in line for line in lines)


@pytest.mark.parametrize("device, where", [("cpu", "cpu"), ("cuda", "0"), ("cuda:3", "3")])
def test_devices_as_a_topology_writes_them(device, where):
    assert demo.pick_device(device) == where


@pytest.mark.parametrize("topology, collocated, adaptive", [
    ("P:cpu D:cpu", "C:cpu", "C:cpu P:cpu D:cpu"), ("P:3 D:3", "C:3", "C:3 P:3 D:3"), ("P:0 D:1", "C:0 C:1", "C:0 C:1 P:0 D:1"),
    ("P:0 P:2 D:0 D:1", "C:0 C:2 C:1", "C:0 C:2 C:1 P:0 P:2 D:0 D:1"), ("P:0 C:5 D:1", "C:5", "C:5 P:0 D:1"),
])
def test_a_topology_s_pipelines(topology, collocated, adaptive):
    """On the same devices, unless it says itself where the collocated workers are."""
    assert [(pipeline.mode, pipeline.topology) for pipeline in demo.pipelines(Topology.parse(topology))] == [
        ("collocated", collocated), ("disaggregated", topology), ("adaptive", adaptive)]


def test_a_topology_without_a_disaggregated_pipeline():
    with pytest.raises(ConfigError, match="needs workers of role D and P"):
        demo.run(topology="C:cpu")
    with pytest.raises(ConfigError, match="leave --device out"):
        demo.run(topology="P:cpu D:cpu", device="cpu")


def test_one_thread_is_only_borrowed():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with demo.one_thread(True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with demo.one_thread(False):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_all_modes_agree_and_are_right():
    told = []
    result = demo.run(device="cpu", progress=told.append)
    assert result.exit_code == 0, [row.difference for row in result.rows]
    assert all(row.verdict == "right" for row in result.rows)
    assert {row.collocated.path for row in result.rows} == {"C0"}
    assert {row.disaggregated.path for row in result.rows} == {"P0 -> D0"}
    assert {row.adaptive.path for row in result.rows} <= {"C0", "P0 -> D0", "P0 -> C0", "C0 -> D0"}
    assert all(s.ttft > 0 and s.tpot > 0 for row in result.rows for s in (row.collocated, row.disaggregated, row.adaptive))
    assert len(told) == 7  # two of each mode, and what adaptive mode measures


@pytest.mark.nightly
def test_pipelines_of_processes_agree_too(monkeypatch):
    import nanopd.tiny

    tasks = nanopd.tiny.demo_prompts()[:2]
    monkeypatch.setattr(nanopd.tiny, "demo_prompts", lambda: tasks)
    result = demo.run(topology="P:cpu D:cpu", executor="process")
    assert result.exit_code == 0, [row.difference for row in result.rows]
    assert [row.verdict for row in result.rows] == ["right", "right"]
    assert {row.disaggregated.path for row in result.rows} == {"P0 -> D0"}


@pytest.mark.parametrize("shares", [True, False])
def test_times_are_explained_where_workers_share_a_device(shares):
    text = shown(Result("tiny", "the CPU", [Row(TASK, served(), served(), served())], 1.0, shares_device=shares))
    assert ("share one device" in " ".join(text.split())) is shares
