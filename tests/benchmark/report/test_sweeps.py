"""Figures of runs hold the runs' numbers."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, median

import pytest

from nanopd.benchmark.report import sweeps
from nanopd.benchmark.report.runs import chosen, column, ways_of
from nanopd.benchmark.report.sweeps import NoData, advantage
from nanopd.metrics import quantile

C, D, A = "collocated", "disaggregated", "adaptive"


def trace(figure, name, panel="x", kind="scatter"):
    """The one that is shown under this name in a panel; without its band and its dots."""
    found = [each for each in figure.data if each.name == name and each.type == kind and (each.xaxis or "x") == panel
             and each.fill is None and (each.mode or "") != "markers"] if kind == "scatter" else [
        each for each in figure.data if each.name == name and each.type == kind and (each.xaxis or "x") == panel]
    assert len(found) == 1, [each.name for each in figure.data]
    return found[0]


@pytest.mark.parametrize("what", ["e2e", "ttft", "tpot"])
def test_latency_is_the_quantile_of_all_seeds_requests(runs, what):
    figure = sweeps.latency_figure(runs, what)
    assert [note.text for note in figure.layout.annotations] == ["long prompts", "short prompts"]
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        line = trace(figure, f"disaggregated {name}", "x2")
        of = [column(chosen(runs, mode=D, workload="short", rate=rate), what) for rate in (2.0, 4.0, 8.0)]
        assert list(line.x) == [2, 4, 8] and list(line.y) == pytest.approx([1e3 * quantile(each, share) for each in of])
        assert len(of[0]) > len(column(chosen(runs, mode=D, workload="short", rate=2.0, seed=0), what))
    assert figure.layout.yaxis.type == "log"


def test_throughput_is_the_mean_over_seeds_with_a_dot_for_each(runs):
    figure = sweeps.throughput_figure(runs)
    at_4 = [run.metrics["output_throughput"] for run in chosen(runs, mode=A, workload="long", rate=4.0)]
    assert trace(figure, A).y[1] == pytest.approx(fmean(at_4))
    dots = [each for each in figure.data if each.mode == "markers" and each.legendgroup == A and (each.xaxis or "x") == "x"]
    assert sorted(dots[0].y[2:4]) == sorted(at_4)


def test_goodput_is_what_met_the_slo_and_lies_within_its_band(runs):
    figure = sweeps.goodput_figure(runs)
    assert "TTFT ≤ 500 ms, TPOT ≤ 20 ms" in figure.layout.title.text
    seeds = chosen(runs, mode=C, workload="short", rate=2.0)
    met = sum(run.metrics["request_goodput"] * run.metrics["duration"] for run in seeds)
    line = trace(figure, C, "x2")
    assert line.y[0] == pytest.approx(met / sum(run.metrics["duration"] for run in seeds))
    assert trace(figure, D, "x2").y[2] == 0  # 0.8 s to the first token
    band = next(each for each in figure.data if each.fill == "toself" and each.name == f"{C} 95%" and each.xaxis == "x2")
    low, high = band.y[5], band.y[0]
    assert low < line.y[0] <= high


def test_hollow_dots_where_a_load_was_not_steady(runs):
    wild = [replace(run, metrics=run.metrics | {"steady": {"is_steady": run.settings["rate"] < 8, "why": None}}) for run in runs]
    assert list(trace(sweeps.goodput_figure(wild), C).marker.symbol) == ["circle", "circle", "circle-open"]
    assert "hollow" in sweeps.goodput_figure(wild).layout.title.subtitle.text


def test_outcomes_are_counted(runs):
    figure = sweeps.outcomes_figure(runs)
    those = chosen(runs, mode=C, workload="long", rate=8.0)
    for status in ("completed", "failed", "dropped"):
        assert trace(figure, status, kind="bar").y[2] == sum(run.metrics[status] for run in those)
    assert trace(figure, "dropped", kind="bar").y[2] == 4 and list(figure.layout.xaxis.ticktext) == ["2", "4", "8"]


def test_violins_show_the_median_and_p5_to_p95(runs):
    figure = sweeps.violin_figure(runs, "ttft")
    values = [1e3 * value for value in column(chosen(runs, mode=D, workload="long", rate=4.0), "ttft")]
    marks = next(each for each in figure.data if each.name == "disaggregated, median")
    assert marks.y[0] == quantile(values, 0.5) and marks.x[0] == 1
    assert marks.y[0] + marks.error_y.array[0] == pytest.approx(quantile(values, 0.95))
    assert marks.y[0] - marks.error_y.arrayminus[0] == pytest.approx(quantile(values, 0.05))


def test_a_violin_is_widest_where_most_values_are():
    widths, heights = sweeps.outline([10.0] * 50 + [100.0] * 5 + [11.0] * 40)
    assert max(widths) == pytest.approx(0.42) and 9 < heights[widths.index(max(widths))] < 13
    assert heights[0] < 10 and heights[-1] > 100 and min(widths) >= 0


def test_ttft_by_length_has_the_requests_and_the_medians(runs):
    figure = sweeps.ttft_by_length_figure(runs, rate=4.0)
    those = chosen(runs, mode=C, workload="short", rate=4.0)
    pairs = [(length, 1e3 * ttft) for run in those for length, ttft in zip(run.requests["prompt_len"], run.requests["ttft"])]
    dots = next(each for each in figure.data if each.mode == "markers" and each.name == C and each.xaxis == "x2")
    assert set(zip(dots.x, dots.y)) <= set(pairs)
    span = [pair for pair in pairs if 128 < pair[0] <= 256]
    line = trace(figure, C, "x2")
    assert (median(length for length, _ in span), median(ttft for _, ttft in span)) in set(zip(line.x, line.y))


def test_the_routing_map_has_shares_by_rate_and_length(runs):
    figure = sweeps.routing_map_figure(runs)
    assert [list(row) for row in figure.data[1].z] == [[0, 0, 100]] * 2  # spans of 65-128 and 129-256
    assert list(figure.layout.yaxis2.ticktext) == ["65–128", "129–256"]
    assert figure.data[1].text[0][2] == "100%"
    with pytest.raises(NoData, match="adaptive"):
        sweeps.routing_map_figure(chosen(runs, mode=C))


def test_the_crossover_names_the_best_and_leans_to_it(runs):
    heat, = sweeps.crossover_figure(runs).data
    assert heat.z[1][2] == -1 and "<b>collocated</b><br>8/s" == heat.text[1][2]  # disaggregated serves none in time
    assert heat.z[1][0] == pytest.approx(0, abs=0.1)
    swapped = [replace(run, settings=run.settings | {"mode": {C: D, D: C}.get(run.settings["mode"], A),
                                                     "topology": {"C:0 C:1": "P:0 D:1"}.get(run.settings["topology"], "C:0 C:1")})
               if run.settings["mode"] != A else run for run in runs]
    assert sweeps.crossover_figure(swapped).data[0].z[1][2] == 1
    with pytest.raises(NoData, match="both collocated and disaggregated"):
        sweeps.crossover_figure(chosen(runs, mode=C))


@pytest.mark.parametrize(("one", "other", "lead"), [(2.0, 1.0, 0.5), (1.0, 2.0, -0.5), (0.0, 0.0, 0.0), (1.0, 0.0, 1.0)])
def test_advantage(one, other, lead):
    assert advantage(one, other) == lead


def test_regret_is_the_share_that_adaptive_lost(runs):
    line = trace(sweeps.regret_figure(runs), "short prompts")
    assert list(line.x) == [2, 4, 8] and min(line.y) >= 0
    goodput = {way.mode: sweeps.goodput_band(chosen(runs, way, workload="short", rate=8.0)).value for way in ways_of(runs)}
    assert line.y[2] == pytest.approx(1 - goodput[A] / max(goodput.values()))
    with pytest.raises(NoData, match="beside another"):
        sweeps.regret_figure(chosen(runs, mode=A))


def test_the_breakdown_adds_up_to_the_end_to_end_time(runs):
    figure = sweeps.breakdown_figure(runs)
    assert [note.text for note in figure.layout.annotations][:2] == ["collocated, long prompts", "disaggregated, long prompts"]
    bars = [trace(figure, name, kind="bar").y[1] for name in ("queue", "prefill", "transfer, exposed", "decode")]
    those = chosen(runs, mode=C, workload="long", rate=4.0)
    assert bars[0] == pytest.approx(1e3 * 0.4 * 0.2) and sum(bars) == pytest.approx(1e3 * fmean(column(those, "e2e")), rel=0.1)
    bare = [replace(run, requests={name: values for name, values in run.requests.items() if name != "queue"}) for run in runs]
    with pytest.raises(NoData, match="phases"):
        sweeps.breakdown_figure(bare)


def test_the_timeline_has_each_request_from_its_arrival_to_its_end(runs):
    run, = chosen(runs, mode=D, workload="short", rate=4.0, seed=0)
    waiting, writing = sweeps.timeline_figure(run).data
    assert list(waiting.base) == run.requests["arrival"][:60] and list(waiting.x) == run.requests["ttft"][:60]
    ends = [base + width for base, width in zip(writing.base, writing.x)]
    assert ends == pytest.approx([a + e for a, e in zip(run.requests["arrival"], run.requests["e2e"])][:60])
    assert waiting.name == "disaggregated, until the first token"


def test_figures_are_stamped(runs):
    for figure in (sweeps.goodput_figure(runs), sweeps.timeline_figure(runs[0]), sweeps.crossover_figure(runs)):
        stamp = figure.layout.title.subtitle.text
        assert "2 × Made-up GPU" in stamp and "2026-01-02" in stamp and "commit abc1234" in stamp and "simulated" not in stamp


def test_without_an_slo_there_is_no_goodput(runs):
    bare = [replace(run, metrics=run.metrics | {"request_goodput": None}) for run in runs]
    for draw in (sweeps.goodput_figure, sweeps.crossover_figure, sweeps.regret_figure):
        with pytest.raises(NoData, match="SLO"):
            draw(bare)
