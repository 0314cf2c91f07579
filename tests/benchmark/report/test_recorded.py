"""Figures of recorded benchmarks hold the numbers of their JSON."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanopd.benchmark.report import recorded
from nanopd.benchmark.report.seed import seed_table
from nanopd.benchmark.report.sweeps import NoData
from nanopd.benchmark.results import load
from nanopd.cost_model.analytical import StepWork
from nanopd.cost_model.presets import preset
from nanopd.widgets.strings import set_language


def named(figure, name):
    found = [trace for trace in figure.data if trace.name == name]
    assert found, [trace.name for trace in figure.data]
    return found


def test_decode_scaling():
    report = load("decode")
    rows = [row for row in report.rows if row["model"] == "qwen3-8b" and row["context"] == 1024]
    figure = recorded.decode_scaling_figure(report)
    steps, rates = named(figure, "measured")
    assert list(steps.x) == [row["batch"] for row in rows] and list(steps.y) == [row["ms"] for row in rows]
    assert list(rates.y) == pytest.approx([row["tokens_s"] for row in rows], rel=1e-3)
    assert list(named(figure, "what memory and tensor cores allow")[0].y) == [row["floor_ms"] for row in rows]
    assert report.source in figure.layout.title.subtitle.text and "qwen3-8b, context 1,024" in figure.layout.title.text


def test_a_lone_request():
    report = load("cluster")
    figure = recorded.lone_request_figure(report)
    row = next(row for row in report.rows if row.get("transport") == "relay" and row.get("prompt") == 2048)
    place = list(figure.layout.xaxis2.ticktext).index("disaggregated<br>relay")
    assert [trace.y[place] for trace in figure.data if trace.xaxis == "x2"] == [row["prefill_ms"], row["handover_ms"]]
    alone = list(figure.layout.xaxis2.ticktext).index("collocated")
    assert [trace.y[alone] for trace in figure.data if trace.xaxis == "x2"][1] == 0


def test_decode_steps_beside_long_prompts():
    rows = {row["mode"]: row for row in load("cluster").rows if "p99_ratio" in row}
    figure = recorded.interference_figure(load("cluster"))
    for mode, row in rows.items():
        (p50,), (rest,) = named(figure, f"{mode} p50"), named(figure, f"{mode} p99")
        assert list(p50.y) == [row["pure_p50_ms"], row["p50_ms"]]
        assert [low + more for low, more in zip(p50.y, rest.y)] == pytest.approx([row["pure_p99_ms"], row["p99_ms"]])
    assert figure.layout.xaxis.ticktext[1] == f"beside long prompts<br>14.6 / {rows['collocated']['p99_ms']:.1f} ms"
    assert figure.layout.yaxis2.matches == "y", "bars of both modes are to be compared"


def test_transfers_and_what_limits_them():
    report = load("transfer")
    figure = recorded.transfer_bandwidth_figure(report)
    line, = named(figure, "relay, layer by layer")
    rows = [row for row in report.rows if (row["transport"], row["pieces"]) == ("relay", "layers")]
    assert list(line.y) == [row["gb_s"] for row in rows] and list(line.x) == [16 * row["blocks"] for row in rows]
    assert set(named(figure, "one copy over NVLink, 385 GB/s")[0].y) == {report.ceilings["peer_copy_gb_s"]}
    assert len(figure.data) == 2 * len({row["transport"] for row in report.rows}) + 2


@pytest.mark.parametrize("prompts", ["mixed", "long"])
def test_the_first_token_and_the_others(prompts):
    report = load("routing")
    figure = recorded.first_token_figure(report, prompts)
    rows = sorted((row for row in report.rows if (row["prompts"], row["mode"]) == (prompts, "disaggregated")), key=lambda row: row["rate"])
    ttft, tpot = named(figure, "disaggregated p99")
    assert list(ttft.x) == list(tpot.x) == [row["rate"] for row in rows]
    assert list(ttft.y) == [row["ttft_p99_ms"] for row in rows] and list(tpot.y) == [row["tpot_p99_ms"] for row in rows]
    assert [trace.showlegend for trace in (ttft, tpot)] == [True, False]


def test_beside_the_seed_stands_what_was_measured_on_the_same_gpus():
    table = seed_table(load)
    figure = recorded.seed_figure(table)
    bars, = figure.data
    static = next(row for row in table if row.what == "48 short requests at once")
    ours = next(row for row in load("static").rows if (row["requests"], row["prompt_to"]) == (48, 256))["tokens_s"]
    place = list(figure.layout.yaxis.ticktext).index(f"{static.what}: 250 → {ours:,.0f} tok/s, <b>{ours / 250:.1f}×</b>")
    assert bars.x[place] == ours / 250
    assert len(bars.x) == sum(row.ours is not None for row in table) == 8
    assert load("static").source in figure.layout.title.subtitle.text and "run 2026-11-20" in figure.layout.title.subtitle.text
    with pytest.raises(NoData):
        recorded.seed_figure([replace(static, device="RTX 4090")])


def test_measured_beside_simulated():
    report = load("routing")
    figure = recorded.predicted_figure(report)
    rows = sorted((row for row in report.rows if (row["prompts"], row["mode"]) == ("long", "disaggregated")), key=lambda row: row["rate"])
    for how, suffix in (("measured", "ms"), ("simulated", "simulated")):
        latencies = next(trace for trace in named(figure, f"disaggregated, {how}") if trace.xaxis == "x2")
        assert list(latencies.x) == [row["rate"] for row in rows]
        assert list(latencies.y) == [row[f"e2e_p99_{suffix}"] for row in rows]
    goodput = next(trace for trace in named(figure, "disaggregated, measured") if trace.xaxis == "x4")
    assert list(goodput.y) == [row["goodput"] for row in rows]


def test_transfers_beside_interference():
    profile = preset("nvidia-h200/qwen3-8b")
    cost, figure = profile.cost, recorded.transfer_interference_figure(preset("nvidia-h200/qwen3-8b"))
    link = cost.transfers[0]
    line = named(figure, f"transfer by {link.transport}")[0]
    assert line.y[5] == pytest.approx(1e3 * link.seconds(2048 * cost.shape.kv_bytes_per_token)) and line.x[5] == 2048
    dots = named(figure, f"transfer by {link.transport}, measured")[0]
    measured = {1e3 * row.seconds for row in profile.measurements.transfer if row.transport == link.transport}
    assert dots.y and set(dots.y) <= measured
    held_up = named(figure, "what 8 decode(s) wait, summed")[0]
    beside = cost.step_seconds(StepWork(512, 512 * 513 / 2, 8, 8 * 1024)) - cost.step_seconds(StepWork(0, 0, 8, 8 * 1024))
    assert held_up.y[3] == pytest.approx(1e3 * 8 * beside)
    assert held_up.y[-1] > held_up.y[0]


def test_the_study_crossover_names_the_best_way():
    report = load("study")
    figure = recorded.study_crossover_figure(report)
    heat, = figure.data
    row = next(row for row in report.rows if (row["hardware"], row["mix"], row["slo"], row["workers"]) == (
        "nvidia-h200/qwen3-8b", "mixed", "tight", 4))
    i = list(figure.layout.yaxis.ticktext).index(row["hardware"])
    j = list(figure.layout.xaxis.ticktext).index("mixed prompts<br>tight SLO")
    collocated, split = row["rates"]["C=4"], row["rates"]["P=2 D=2"]
    assert heat.z[i][j] == pytest.approx((split - collocated) / split) and heat.z[i][j] > 0
    assert heat.text[i][j] == f"<b>P=2 D=2</b><br>{split:.1f}/s"
    assert "simulated, not measured" in figure.layout.title.subtitle.text


def test_the_study_regret_has_a_dot_for_each_setting():
    report = load("study")
    figure = recorded.study_regret_figure(report)
    dots, line = (trace for trace in figure.data if trace.name == "nvidia-h200/qwen3-8b")
    regrets = [regret for row in report.rows if row["hardware"] == "nvidia-h200/qwen3-8b" for regret in row["regrets"]]
    assert sorted(dots.y) == sorted(regrets)
    assert line.y[-1] == pytest.approx(sum(row["regrets"][-1] for row in report.rows if row["hardware"] == line.name) / (len(dots.y) / 3))
    assert "simulated" in figure.layout.title.subtitle.text


def test_a_model_that_is_not_the_last():
    figure = recorded.decode_scaling_figure(load("decode"), "qwen3-0.6b")
    assert "qwen3-0.6b" in figure.layout.title.text and list(figure.data[0].x) == [1]


def test_in_chinese():
    set_language("zh")
    assert "解码" in recorded.decode_scaling_figure(load("decode")).layout.title.text
    assert "模拟，并非实测" in recorded.study_regret_figure(load("study")).layout.title.subtitle.text
