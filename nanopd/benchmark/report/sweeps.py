"""Figures of a sweep's runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from statistics import fmean, median

import numpy as np
import plotly.graph_objects as go

from nanopd.benchmark.load.run import RunRecord
from nanopd.benchmark.report.runs import (
    Band,
    Way,
    by_rate,
    chosen,
    colour_of,
    column,
    goodput_band,
    label_of,
    quantile_band,
    source_of,
    values_of,
    way_of,
    ways_of,
)
from nanopd.benchmark.report.style import (
    MODE_COLOURS,
    SHARES,
    advantage_map,
    dots,
    faded,
    finish,
    in_order,
    panels,
    stroke,
)
from nanopd.benchmark.report.words import named, w

PHASES = {"queue": "#9ca3af", "prefill": "#0072b2", "transfer": "#d55e00", "decode": "#56b4e9"}
STATUSES = {"completed": "#009e73", "failed": "#d55e00", "dropped": "#e69f00"}
QUANTILES = {0.5: "solid", 0.99: "dot"}
LENGTH_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)  # of prompts, tokens
MOST_POINTS = 300  # of a scatter's trace, evenly picked
MOST_REQUESTS = 60  # of a timeline
VIOLIN_POINTS = 40
MS = 1e3


class NoData(ValueError):
    """These runs do not hold what the figure shows. The message says what is missing."""


# -------------------------------------------------------------------------------------------- against the rate


def latency_figure(runs: Sequence[RunRecord], what: str = "e2e") -> go.Figure:
    """p50 and p99 of "e2e", "ttft" or "tpot" in ms against the rate, a line for each way; bands by bootstrap."""
    workloads, ways = values_of(runs, "workload"), ways_of(runs)
    figure = panels(1, len(workloads), [named(name) for name in workloads])
    for place, workload in enumerate(workloads, 1):
        for way in ways:
            those = [run for run in chosen(runs, way, workload=workload) if column([run], what)]
            for share, dash in QUANTILES.items():
                bands = by_rate(those, lambda same: quantile_band(column(same, what), share))  # noqa: B023  # used at once
                in_ms = [Band(*(MS * part for part in band)) for band in bands]
                _band_line(figure, place, those, ways, in_ms, f"p{100 * share:.0f}", dash)
    _axes(figure, w("ms"), log=True)
    return finish(figure, w("latency.title", what=named(what)), _with_hollow(runs))


def throughput_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Output tokens a second against the rate: the mean over seeds, and a dot for each."""
    return _against_rate(runs, "output_throughput", w("tokens_s"), w("throughput.title"))


def goodput_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Requests a second that met the SLO against the rate, with 95% bands, and a dot for each seed.

    Raises NoData where the runs had no SLO."""
    runs = _with_slo(runs)
    slos = {(run.settings["slo_ttft_ms"], run.settings["slo_tpot_ms"]) for run in runs}
    ttft, tpot = (" / ".join(dict.fromkeys(f"{slo[i]:g} ms" for slo in sorted(slos))) for i in range(2))
    return _against_rate(runs, "request_goodput", w("goodput"), w("goodput.title", ttft=ttft, tpot=tpot), band=True)


def _against_rate(runs: Sequence[RunRecord], metric: str, axis: str, title: str, band: bool = False) -> go.Figure:
    workloads, ways = values_of(runs, "workload"), ways_of(runs)
    figure = panels(1, len(workloads), [named(name) for name in workloads])
    for place, workload in enumerate(workloads, 1):
        for way in ways:
            those = chosen(runs, way, workload=workload)
            if not those:
                continue
            bands = by_rate(those, goodput_band if band else _plain_mean(metric))
            _band_line(figure, place, those, ways, bands, "", "solid")
            figure.add_scatter(x=[run.settings["rate"] for run in those], y=[run.metrics[metric] for run in those],
                               name=w("seed_dot"), legendgroup=label_of(way, ways), row=1, col=place, **dots(colour_of(way, ways)))
    _axes(figure, axis)
    figure.update_yaxes(rangemode="tozero")
    return finish(figure, title, _with_hollow(runs))


def _with_hollow(runs: Sequence[RunRecord]) -> str:
    """The source, and what hollow dots mean where there are any."""
    is_steady = all(run.metrics["steady"]["is_steady"] for run in runs)
    return source_of(runs) if is_steady else f"{source_of(runs)} · {w('stamp.hollow')}"


def _plain_mean(metric: str) -> Callable[[Sequence[RunRecord]], Band]:
    def mean(same: Sequence[RunRecord]) -> Band:
        value = fmean(run.metrics[metric] for run in same)
        return Band(value, value, value)
    return mean


def _band_line(figure: go.Figure, place: int, runs: Sequence[RunRecord], ways: Sequence[Way], bands: list[Band], suffix: str,
               dash: str) -> None:
    """A line through the values of one way's runs by rate, hollow where the load was not steady; and the band around it."""
    if not runs:
        return
    way, rates = way_of(runs[0]), values_of(runs, "rate")
    steady = [all(run.metrics["steady"]["is_steady"] for run in chosen(runs, rate=rate)) for rate in rates]
    colour = colour_of(way, ways)
    name = f"{label_of(way, ways)} {suffix}".strip()
    if any(band.high > band.low for band in bands):
        figure.add_scatter(x=[*rates, *reversed(rates)], y=[*(band.high for band in bands), *(band.low for band in reversed(bands))],
                           fill="toself", fillcolor=faded(colour, 0.14), line={"width": 0}, mode="lines", hoverinfo="skip",
                           showlegend=False, legendgroup=name, name=f"{name} 95%", row=1, col=place)
    figure.add_scatter(x=rates, y=[band.value for band in bands], name=name, legendgroup=name, showlegend=place == 1, row=1, col=place,
                       **stroke(colour, dash))
    figure.data[-1].marker.symbol = ["circle" if each else "circle-open" for each in steady]


def _axes(figure: go.Figure, y: str, log: bool = False) -> None:
    figure.update_xaxes(title_text=w("rate"))
    figure.update_yaxes(type="log" if log else "linear")
    figure.update_yaxes(title_text=y, col=1)


def outcomes_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Completed, failed and dropped requests of each way at each rate, stacked; seeds together."""
    workloads, ways = values_of(runs, "workload"), ways_of(runs)
    figure = panels(len(ways), len(workloads), [f"{label_of(way, ways)}, {named(name)}" for way in ways for name in workloads])
    for (row, place), those in _grid(runs, ways, workloads):
        rates = values_of(those, "rate")
        for status, colour in STATUSES.items():
            counts = [sum(run.metrics[status] for run in chosen(those, rate=rate)) for rate in rates]
            figure.add_bar(x=list(range(len(rates))), y=counts, marker_color=colour, name=w(status), legendgroup=status,
                           showlegend=row == place == 1, row=row, col=place)
        figure.update_xaxes(in_order(rates, (f"{rate:g}" for rate in rates)), row=row, col=place)
    figure.update_xaxes(title_text=w("rate"), row=len(ways))
    figure.update_yaxes(title_text=w("requests"), col=1)
    return finish(figure, w("outcomes.title"), source_of(runs), rows=len(ways))


def _grid(runs: Sequence[RunRecord], ways: Sequence[Way],
          workloads: Sequence[str]) -> Iterator[tuple[tuple[int, int], list[RunRecord]]]:
    """A panel for each way and workload that has runs."""
    for row, way in enumerate(ways, 1):
        for place, workload in enumerate(workloads, 1):
            if those := chosen(runs, way, workload=workload):
                yield (row, place), those


# ---------------------------------------------------------------------------------------------- distributions


def violin_figure(runs: Sequence[RunRecord], what: str = "e2e", rate: float | None = None) -> go.Figure:
    """How "e2e" or "ttft" (ms) is distributed in each way at one rate; default: of those measured the one in the middle."""
    workloads, ways = values_of(runs, "workload"), ways_of(runs)
    rates = {name: rate or _middle(values_of(chosen(runs, workload=name), "rate")) for name in workloads}
    figure = panels(1, len(workloads), [w("violin.at", workload=named(name), rate=f"{rates[name]:g}") for name in workloads])
    for place, workload in enumerate(workloads, 1):
        for number, way in enumerate(ways):
            values = [MS * value for value in column(chosen(runs, way, workload=workload, rate=rates[workload]), what)]
            if values:
                _violin(figure, place, number, values, colour_of(way, ways), label_of(way, ways), show=place == 1)
    figure.update_xaxes(in_order(ways, (label_of(way, ways) for way in ways)), range=[-0.5, len(ways) - 0.5])
    figure.update_yaxes(type="log")
    figure.update_yaxes(title_text=w("ms"), col=1)
    return finish(figure, w("violin.title", what=named(what)), source_of(runs))


def _middle(values: list[float]) -> float:
    return values[len(values) // 2]


def _violin(figure: go.Figure, place: int, number: int, values: list[float], colour: str, name: str, show: bool) -> None:
    """Its outline, and the median, p5 to p95 as a line."""
    widths, heights = outline(values)
    figure.add_scatter(x=[*(number + width for width in widths), *(number - width for width in reversed(widths))],
                       y=[*heights, *reversed(heights)], fill="toself", fillcolor=faded(colour, 0.35), mode="lines",
                       line={"color": colour, "width": 1.2}, name=name, showlegend=False, hoverinfo="skip", row=1, col=place)
    low, middle, high = (quantile_band(values, share).value for share in (0.05, 0.5, 0.95))
    figure.add_scatter(x=[number], y=[middle], mode="markers", marker={"color": colour, "size": 8}, name=f"{name}, {w('median')}",
                       error_y={"type": "data", "symmetric": False, "array": [high - middle], "arrayminus": [middle - low],
                                "color": colour, "thickness": 1.5, "width": 0}, showlegend=False, row=1, col=place)


def outline(values: Sequence[float], half_width: float = 0.42) -> tuple[list[float], list[float]]:
    """A violin's half widths and their heights: a kernel density of the logarithms (Silverman's bandwidth), widest at
    `half_width`."""
    logs = np.log(np.asarray(values))
    spread = float(np.std(logs)) or 0.05
    bandwidth = 1.06 * spread * len(logs) ** -0.2
    at = np.linspace(logs.min() - 2 * bandwidth, logs.max() + 2 * bandwidth, VIOLIN_POINTS)
    density = np.exp(-0.5 * ((at[:, None] - logs[None, :]) / bandwidth) ** 2).sum(axis=1)
    return (half_width * density / density.max()).tolist(), np.exp(at).tolist()


def ttft_by_length_figure(runs: Sequence[RunRecord], rate: float | None = None) -> go.Figure:
    """TTFT in ms against the prompt's length: a dot for each request (a few hundred at most), and the median of each span of
    lengths as a line. At one rate, as in `violin_figure`."""
    workloads, ways = values_of(runs, "workload"), ways_of(runs)
    rates = {name: rate or _middle(values_of(chosen(runs, workload=name), "rate")) for name in workloads}
    figure = panels(1, len(workloads), [w("violin.at", workload=named(name), rate=f"{rates[name]:g}") for name in workloads])
    for place, workload in enumerate(workloads, 1):
        for way in ways:
            pairs = _pairs(chosen(runs, way, workload=workload, rate=rates[workload]))
            if not pairs:
                continue
            colour, name = colour_of(way, ways), label_of(way, ways)
            lengths, ttfts = zip(*pairs[:: math.ceil(len(pairs) / MOST_POINTS)])
            figure.add_scatter(x=lengths, y=ttfts, name=name, legendgroup=name, row=1, col=place, **dots(colour, 4))
            spans = [list(zip(*those)) for _, those in groupby(sorted(pairs), lambda pair: _span_of(pair[0]))]
            figure.add_scatter(x=[median(span[0]) for span in spans], y=[median(span[1]) for span in spans], name=name,
                               legendgroup=name, showlegend=place == 1, row=1, col=place, **stroke(colour))
    figure.update_xaxes(title_text=w("prompt"), type="log")
    figure.update_yaxes(type="log")
    figure.update_yaxes(title_text=w("ms"), col=1)
    return finish(figure, w("length.title"), source_of(runs))


def _pairs(runs: Sequence[RunRecord]) -> list[tuple[int, float]]:
    """Prompt length and TTFT in ms of each request that has one."""
    return [(length, MS * ttft) for run in runs for length, ttft in zip(run.requests["prompt_len"], run.requests["ttft"])
            if ttft is not None]


# -------------------------------------------------------------------------------------------------------- maps


def routing_map_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Which share of the requests adaptive mode disaggregated, by rate and length of prompt. Raises NoData without such runs."""
    runs = [run for run in runs if run.settings["mode"] == "adaptive"]
    if not runs:
        raise NoData("no run is of adaptive mode")
    workloads = values_of(runs, "workload")
    figure = panels(1, len(workloads), [named(name) for name in workloads])
    for place, workload in enumerate(workloads, 1):
        those = chosen(runs, workload=workload)
        rates, spans, shares = _shares(those)
        figure.add_heatmap(
            x=list(range(len(rates))), y=list(range(len(spans))), z=shares, colorscale=SHARES, zmin=0, zmax=100, showscale=False,
            text=[["" if share is None else f"{share:.0f}%" for share in row] for row in shares], texttemplate="%{text}",
            name=w("percent"), row=1, col=place)
        figure.update_xaxes(in_order(rates, (f"{rate:g}" for rate in rates)), row=1, col=place)
        figure.update_yaxes(in_order(spans, (f"{low + 1}–{high}" for low, high in spans)), row=1, col=place)
    figure.update_xaxes(title_text=w("rate"), showgrid=False)
    figure.update_yaxes(showgrid=False)
    figure.update_yaxes(title_text=w("prompt"), col=1)
    return finish(figure, f"{w('routing.title')}: {w('percent')}", source_of(runs))


def _shares(runs: Sequence[RunRecord]) -> tuple[list[float], list[tuple[int, int]], list[list[float | None]]]:
    """Rates, spans of prompt lengths, and a row of percentages for each span; None where no request was of it."""
    rates = values_of(runs, "rate")
    seen: dict[tuple[tuple[int, int], float], list[bool]] = {}
    for run in runs:
        for length, mode in zip(run.requests["prompt_len"], run.requests["mode"]):
            if mode:
                seen.setdefault((_span_of(length), run.settings["rate"]), []).append(mode == "disaggregated")
    spans = sorted({span for span, _ in seen})
    return rates, spans, [[100 * fmean(seen[span, rate]) if (span, rate) in seen else None for rate in rates] for span in spans]


def _span_of(length: int) -> tuple[int, int]:
    return next((low, high) for low, high in pairwise(LENGTH_EDGES) if low < length <= high)


def crossover_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Which mode serves the most requests in time, for each workload and rate: blue where collocated serves more than
    disaggregated, red where it is the other way round; the best of all modes is written there. Raises NoData without an SLO, or
    where a workload's rates were not measured in both modes."""
    runs = _with_slo(runs)
    workloads = values_of(runs, "workload")
    number = max(len(values_of(chosen(runs, workload=name), "rate")) for name in workloads)
    lead: list[list[float | None]] = [[None] * number for _ in workloads]
    text = [[""] * number for _ in workloads]
    for row, workload in enumerate(workloads):
        for place, rate in enumerate(values_of(chosen(runs, workload=workload), "rate")):
            goodput = _goodputs(chosen(runs, workload=workload, rate=rate))
            fixed = {mode: max((each for way, each in goodput.items() if way.mode == mode), default=None)
                     for mode in ("collocated", "disaggregated")}
            if None in fixed.values():
                continue
            lead[row][place] = advantage(fixed["disaggregated"], fixed["collocated"])
            text[row][place] = f"<b>{_best(goodput)}</b><br>{rate:g}/s"
    if not any(each is not None for line in lead for each in line):
        raise NoData("no rate was measured both collocated and disaggregated")
    figure = panels(1, 1, [])
    advantage_map(figure, lead, text)
    figure.update_xaxes(tickvals=[], title_text=w("rate"))
    figure.update_yaxes(in_order(workloads, map(named, workloads)))
    return finish(figure, w("crossover.title"), source_of(runs))


def advantage(one: float, other: float) -> float:
    """By which share of the larger of the two the one exceeds the other; from -1 to 1, 0 where neither is above 0."""
    return (one - other) / max(one, other) if max(one, other) > 0 else 0.0


def _goodputs(runs: Sequence[RunRecord]) -> dict[Way, float]:
    return {way: goodput_band(chosen(runs, way)).value for way in ways_of(runs)}


def _best(goodput: dict[Way, float]) -> str:
    """By name; of ways that serve the same the first."""
    way = max(goodput, key=goodput.__getitem__)
    return label_of(way, list(goodput)) if goodput[way] else w("none")


def regret_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Which share of the best way's goodput adaptive mode did not reach, against the rate, a line for each workload.

    Raises NoData where there is no adaptive run beside others, or no SLO."""
    runs = _with_slo(runs)
    figure = panels(1, 1, [])
    for workload, colour in zip(values_of(runs, "workload"), MODE_COLOURS.values()):
        rates, regrets = [], []
        for rate in values_of(chosen(runs, workload=workload), "rate"):
            goodput = _goodputs(chosen(runs, workload=workload, rate=rate))
            adaptive = max((each for way, each in goodput.items() if way.mode == "adaptive"), default=None)
            if adaptive is not None and len(goodput) > 1 and max(goodput.values()) > 0:
                rates.append(rate)
                regrets.append(1 - adaptive / max(goodput.values()))
        if rates:
            figure.add_scatter(x=rates, y=regrets, name=named(workload), **stroke(colour))
    if not figure.data:
        raise NoData("no adaptive run stands beside another mode's at the same rate")
    figure.update_xaxes(title_text=w("rate"))
    figure.update_yaxes(title_text=w("regret_axis"), rangemode="tozero", tickformat=".0%")
    return finish(figure, w("regret.title"), source_of(runs))


def _with_slo(runs: Sequence[RunRecord]) -> list[RunRecord]:
    found = [run for run in runs if run.metrics["request_goodput"] is not None]
    if not found:
        raise NoData("no run had an SLO")
    return found


# -------------------------------------------------------------------------------------------- single requests


def breakdown_figure(runs: Sequence[RunRecord]) -> go.Figure:
    """Mean ms in queue, prefill, exposed transfer and decode, for each way at each rate. Raises NoData where no run holds them."""
    runs = [run for run in runs if run.requests.get("queue")]
    if not runs:
        raise NoData("no run holds the phases of its requests")
    workloads, ways = values_of(runs, "workload"), ways_of(runs)
    figure = panels(len(workloads), len(ways), [f"{label_of(way, ways)}, {named(name)}" for name in workloads for way in ways],
                    shared_yaxes=True)
    for (place, row), those in _grid(runs, ways, workloads):
        rates = values_of(those, "rate")
        for phase, colour in PHASES.items():
            means = [MS * fmean(column(chosen(those, rate=rate), phase) or [0.0]) for rate in rates]
            figure.add_bar(x=list(range(len(rates))), y=means, marker_color=colour, name=w(phase), legendgroup=phase,
                           showlegend=row == place == 1, row=row, col=place)
        figure.update_xaxes(in_order(rates, (f"{rate:g}" for rate in rates)), row=row, col=place)
    figure.update_xaxes(title_text=w("rate"), row=len(workloads))
    figure.update_yaxes(title_text=w("ms"), col=1)
    return finish(figure, w("breakdown.title"), source_of(runs), rows=len(workloads))


def timeline_figure(run: RunRecord) -> go.Figure:
    """The first requests of a run that were completed, one below the other: pale until the first token, then full; a colour for
    each pipeline, and one where a server does not tell which it was."""
    columns = [run.requests[name] for name in ("arrival", "ttft", "e2e", "mode")]
    shown = [request for request in zip(*columns) if request[1] is not None][:MOST_REQUESTS]
    if not shown:
        raise NoData("no request of this run was completed")
    figure, way = panels(1, 1, []), way_of(run)
    for mode in sorted({request[3] for request in shown}):
        those = [(number, *request[:3]) for number, request in enumerate(shown) if request[3] == mode]
        numbers, arrivals, ttfts, e2es = map(list, zip(*those))
        colour, name = (MODE_COLOURS[mode], w(mode)) if mode else (colour_of(way, [way]), label_of(way, [way]))
        firsts, writing = [a + b for a, b in zip(arrivals, ttfts)], [b - a for a, b in zip(ttfts, e2es)]
        for part, base, width, fill in (("first_wait", arrivals, ttfts, faded(colour, 0.35)), ("writing", firsts, writing, colour)):
            figure.add_bar(orientation="h", y=numbers, base=base, x=width, marker_color=fill, name=f"{name}, {w(part)}", width=0.8)
    figure.update_yaxes(range=[len(shown) - 0.5, -0.5], title_text=w("requests"), showgrid=False)
    figure.update_xaxes(title_text=w("time"))
    figure.update_layout(barmode="overlay")
    settings = run.settings
    title = w("timeline.title", mode=label_of(way, [way]), workload=named(settings["workload"]), rate=f"{settings['rate']:g}")
    return finish(figure, title, source_of([run]))
