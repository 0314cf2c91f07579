"""Figures of other recorded benchmarks: `nanopd bench decode | cluster | routing | study`, and a profile."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from nanopd.benchmark import study
from nanopd.benchmark.report.style import (
    MODE_COLOURS,
    MORE_COLOURS,
    advantage_map,
    dots,
    faded,
    finish,
    in_order,
    panels,
    stroke,
)
from nanopd.benchmark.report.sweeps import PHASES, advantage
from nanopd.benchmark.report.words import named, w
from nanopd.benchmark.results import Report
from nanopd.cost_model.analytical import CostModel, StepWork
from nanopd.cost_model.profile import Profile

DECODES = (1, 8, 64)  # that a prompt holds up
CONTEXT = 1024  # tokens of each of them
CHUNK = 2048  # tokens of a prompt in a step at most
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of prompts
MS = 1e3


def decode_scaling_figure(report: Report, model: str | None = None) -> go.Figure:
    """Of `bench decode`: ms a step beside what the bandwidth allows, and tokens a second, by batch size, at the context that most
    of the rows have. Default: the model of the last row."""
    of_model = [row for row in report.rows if row["model"] == (model or report.rows[-1]["model"])]
    contexts = [row["context"] for row in of_model]
    rows = [row for row in of_model if row["context"] == max(contexts, key=contexts.count)]
    batches = [row["batch"] for row in rows]
    figure = panels(1, 2, [w("decode.step"), w("decode.rate")])
    for name, key, colour, dash in ((w("measured"), "ms", MODE_COLOURS["adaptive"], "solid"), (w("floor"), "floor_ms", "#6b7280", "dot")):
        for place, values in ((1, [row[key] for row in rows]), (2, [MS * row["batch"] / row[key] for row in rows])):
            figure.add_scatter(x=batches, y=values, name=name, legendgroup=name, showlegend=place == 1, row=1, col=place,
                               **stroke(colour, dash))
    figure.update_xaxes(type="log", tickvals=batches, ticktext=[str(batch) for batch in batches], title_text=w("batch"))
    figure.update_yaxes(rangemode="tozero")
    return finish(figure, f"{w('decode.title')} ({rows[0]['model']}, {rows[0]['context']})", report.source)


def lone_request_figure(report: Report) -> go.Figure:
    """Of `bench cluster`: what a lone prompt's steps take on a prefill worker and on a collocated one, and what the hand-over adds."""
    rows = [row for row in report.rows if "handover_ms" in row]
    prompts, transports = sorted({row["prompt"] for row in rows}), list(dict.fromkeys(row["transport"] for row in rows))
    bars = {f"{w('disaggregated')}<br>{transport}": {row["prompt"]: (row["prefill_ms"], row["handover_ms"]) for row in rows
                                                   if row["transport"] == transport} for transport in transports}
    bars[w("collocated")] = {row["prompt"]: (row["collocated_prefill_ms"], 0.0) for row in rows if "collocated_prefill_ms" in row}
    figure = panels(1, len(prompts), [w("lone.prompt", prompt=prompt) for prompt in prompts])
    for place, prompt in enumerate(prompts, 1):
        those = [(name, found[prompt]) for name, found in bars.items() if prompt in found]
        for part, phase in enumerate(("prefill", "handover")):
            figure.add_bar(x=list(range(len(those))), y=[times[part] for _, times in those], name=w(phase), legendgroup=phase,
                           marker_color=PHASES["transfer" if part else "prefill"], showlegend=place == 1, row=1, col=place)
        figure.update_xaxes(in_order(those, (name for name, _ in those)), row=1, col=place)
    figure.update_yaxes(title_text=w("ms"), col=1)
    return finish(figure, w("lone.title"), report.source)


def predicted_figure(report: Report) -> go.Figure:
    """Of `bench routing`: p99 end to end and goodput against the rate, as measured and as simulated, for each kind of prompts."""
    prompts = list(dict.fromkeys(row["prompts"] for row in report.rows))
    modes = [mode for mode in MODE_COLOURS if any(row["mode"] == mode for row in report.rows)]
    figure = panels(2, len(prompts), [f"{named(name)}: {w(key)}" for key in ("predicted.e2e", "predicted.goodput") for name in prompts])
    for place, name in enumerate(prompts, 1):
        for mode in modes:
            rows = sorted((row for row in report.rows if (row["prompts"], row["mode"]) == (name, mode)), key=lambda row: row["rate"])
            for line, keys in enumerate((("e2e_p99_ms", "e2e_p99_simulated"), ("goodput", "goodput_simulated")), 1):
                for key, how, dash in zip(keys, ("measured", "simulated"), ("solid", "dot")):
                    figure.add_scatter(x=[row["rate"] for row in rows], y=[row[key] for row in rows], row=line, col=place,
                                       name=f"{w(mode)}, {w(how)}", legendgroup=mode + how, showlegend=place == line == 1,
                                       **stroke(MODE_COLOURS[mode], dash))
    figure.update_xaxes(title_text=w("rate"), row=2)
    figure.update_yaxes(rangemode="tozero")
    return finish(figure, w("predicted.title"), report.source, rows=2)


def transfer_interference_figure(profile: Profile) -> go.Figure:
    """What a prompt's KV takes to be moved at once, and by how much the prompt holds up those that decode where it is computed: in
    ms by its length, as fitted to a profile, and the transfers that were measured."""
    cost = profile.cost
    figure = panels(1, 1, [])
    for number, link in enumerate({each.transport: each for each in reversed(cost.transfers)}.values()):
        colour, name = (MODE_COLOURS["disaggregated"], *MORE_COLOURS)[number], w("sent", transport=link.transport)
        figure.add_scatter(x=LENGTHS, y=[MS * link.seconds(length * cost.shape.kv_bytes_per_token) for length in LENGTHS], mode="lines",
                           line={"color": colour, "width": 2.5}, name=name, legendgroup=name)
        sent = [(row.num_bytes / cost.shape.kv_bytes_per_token, MS * row.seconds) for row in profile.measurements.transfer
                if row.transport == link.transport and row.num_bytes >= LENGTHS[0] * cost.shape.kv_bytes_per_token]
        figure.add_scatter(x=[tokens for tokens, _ in sent], y=[ms for _, ms in sent], name=f"{name}, {w('measured')}",
                           legendgroup=name, **dots(colour))
    for decodes, opacity in zip(DECODES, (0.35, 0.65, 1.0)):
        figure.add_scatter(x=LENGTHS, y=[MS * interference_seconds(cost, length, decodes) for length in LENGTHS], mode="lines",
                           line={"color": faded(MODE_COLOURS["collocated"], opacity), "width": 2, "dash": "dash"},
                           name=w("beside", decodes=decodes))
    figure.update_xaxes(type="log", title_text=w("prompt"), tickvals=LENGTHS, ticktext=[str(length) for length in LENGTHS])
    figure.update_yaxes(type="log", title_text=w("ms"))
    source = f"{profile.device}, {profile.model}, {profile.dtype}, {profile.date[:10]}, {w('fitted')}"
    return finish(figure, w("transfer.title"), source)


def interference_seconds(cost: CostModel, length: int, decodes: int) -> float:
    """By how much a prompt holds up so many sequences that decode beside it, each of CONTEXT tokens, all together."""
    running = StepWork(decodes=decodes, context_tokens=decodes * CONTEXT)
    return decodes * cost.request(length, 0, 0, running, CHUNK).delay_by_prefill_seconds


# -------------------------------------------------------------------------------------------------------- study


def study_crossover_figure(report: Report, workers: int = 4) -> go.Figure:
    """Of `bench study`: for each hardware, and each mix and SLO, the way of sharing out the workers that serves the highest rate in
    time. Red where disaggregated serves more than collocated, blue where less."""
    rows = [row for row in report.rows if row["workers"] == workers and "," not in row["mix"]]
    hardware = sorted({row["hardware"] for row in rows})
    settings = list(dict.fromkeys((row["mix"], row["slo"]) for row in rows))
    found = {(row["hardware"], (row["mix"], row["slo"])): row["rates"] for row in rows}
    lead: list[list[float | None]] = [[None] * len(settings) for _ in hardware]
    text = [[""] * len(settings) for _ in hardware]
    for i, name in enumerate(hardware):
        for j, setting in enumerate(settings):
            if rates := found.get((name, setting)):
                collocated = rates[f"C={workers}"]
                split = max(rate for way, rate in rates.items() if way not in ("adaptive", f"C={workers}"))
                lead[i][j] = advantage(split, collocated)
                text[i][j] = _winner(rates)
    figure = panels(1, 1, [])
    advantage_map(figure, lead, text)
    figure.update_xaxes(in_order(settings, (f"{named(mix)}<br>{named(slo)}" for mix, slo in settings)))
    figure.update_yaxes(in_order(hardware, hardware))
    return finish(figure, w("study.crossover", workers=workers), _simulated_by(report), simulated=True)


def _simulated_by(report: Report) -> str:
    """The device that a simulation ran on says nothing: what it simulated stands in the figure."""
    return report.source.partition(", ")[2]


def _winner(rates: dict[str, float]) -> str:
    """The best way and its rate; a fixed one where adaptive only equals it."""
    way = max(rates, key=lambda each: (rates[each], each != "adaptive"))
    return f"<b>{named(way)}</b><br>{rates[way]:.1f}/s" if rates[way] else w("none")


def study_regret_figure(report: Report) -> go.Figure:
    """Of `bench study`: adaptive mode's regret at shares of the best fixed way's highest rate, a dot for each setting, the mean as a
    line, for each hardware."""
    figure = panels(1, 1, [])
    for name, colour in zip(sorted({row["hardware"] for row in report.rows}), (*MODE_COLOURS.values(), *MORE_COLOURS)):
        rows = [row for row in report.rows if row["hardware"] == name]
        points = [(load, regret) for row in rows for load, regret in zip(study.LOADS, row["regrets"])]
        figure.add_scatter(x=[load for load, _ in points], y=[regret for _, regret in points], legendgroup=name, name=name,
                           **dots(colour, 6))
        figure.add_scatter(x=study.LOADS, y=[_mean(regret for at, regret in points if at == load) for load in study.LOADS], mode="lines",
                           line={"color": colour, "width": 2}, legendgroup=name, name=name)
    figure.update_xaxes(title_text=w("load_axis"), tickvals=study.LOADS, tickformat=".0%", range=[0.45, 1.05])
    figure.update_yaxes(title_text=w("regret_axis"), tickformat=".0%")
    return finish(figure, w("study.regret", cells=len(report.rows)), _simulated_by(report), simulated=True)


def _mean(values: Any) -> float | None:
    found: Sequence[float] = list(values)
    return fmean(found) if found else None
