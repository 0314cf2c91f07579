"""Figures of other recorded benchmarks: `nanopd bench decode | transfer | cluster | routing | study`, a profile, and the seed's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from nanopd.benchmark import study
from nanopd.benchmark.report.runs import source_of_report
from nanopd.benchmark.report.seed import Comparison
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
from nanopd.benchmark.report.sweeps import PHASES, QUANTILES, NoData, advantage
from nanopd.benchmark.report.words import named, w
from nanopd.benchmark.results import Report
from nanopd.cost_model.analytical import CostModel, StepWork
from nanopd.cost_model.profile import Profile

DECODES = (1, 8, 64)  # that a prompt holds up
CONTEXT = 1024  # tokens of each of them
CHUNK = 2048  # tokens of a prompt in a step at most
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of prompts
TRANSPORTS = {"peer": MODE_COLOURS["disaggregated"], "relay": MORE_COLOURS[0], "collective": MORE_COLOURS[1]}
CEILINGS = {"peer_copy_gb_s": "peer", "pinned_to_gpu_gb_s": "relay"}  # what limits a transport
BLOCK_TOKENS = 16
MS = 1e3


def decode_scaling_figure(report: Report, model: str | None = None) -> go.Figure:
    """Of `bench decode`: ms a step beside what memory and tensor cores allow, and tokens a second, by batch size, at the context that
    most of the rows have. Default: the model of the last row."""
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
    conditions = f"{rows[0]['model']}, {w('decode.context', context=rows[0]['context'])}"
    return finish(figure, f"{w('decode.title')} ({conditions})", source_of_report(report))


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
    return finish(figure, w("lone.title"), source_of_report(report))


def interference_figure(report: Report) -> go.Figure:
    """Of `bench cluster`: p50 and p99 of a decode step, alone and while long prompts are read, collocated and disaggregated."""
    rows = {row["mode"]: row for row in report.rows if "p99_ratio" in row}
    modes = [mode for mode in MODE_COLOURS if mode in rows]
    figure = panels(1, len(modes), [w("steps.panel", mode=w(mode), decodes=rows[mode]["decodes"]) for mode in modes], shared_yaxes=True)
    for place, mode in enumerate(modes, 1):
        row, colour = rows[mode], MODE_COLOURS[mode]
        times = {w(when): (row[f"{key}p50_ms"], row[f"{key}p99_ms"]) for when, key in (("steps.alone", "pure_"), ("steps.beside", ""))}
        figure.add_bar(x=[0, 1], y=[p50 for p50, _ in times.values()], name=f"{w(mode)} p50", marker_color=colour, row=1, col=place)
        figure.add_bar(x=[0, 1], y=[p99 - p50 for p50, p99 in times.values()], name=f"{w(mode)} p99", marker_color=faded(colour, 0.45),
                       row=1, col=place)
        texts = (f"{when}<br>{p50:.1f} / {p99:.1f} {w('ms')}" for when, (p50, p99) in times.items())
        figure.update_xaxes(in_order(times, texts), showgrid=False, row=1, col=place)
    figure.update_yaxes(title_text=w("ms"), col=1)
    return finish(figure, w("steps.title"), source_of_report(report))


def transfer_bandwidth_figure(report: Report) -> go.Figure:
    """Of `bench transfer`: GB/s of a prompt's KV by its length, at once and layer by layer, for each transport; and what a plain copy
    reaches."""
    figure = panels(1, 1, [])
    tokens = sorted({BLOCK_TOKENS * row["blocks"] for row in report.rows})
    for transport, colour in TRANSPORTS.items():
        for pieces, dash in (("whole", "solid"), ("layers", "dot")):
            rows = [row for row in report.rows if (row["transport"], row["pieces"]) == (transport, pieces)]
            figure.add_scatter(x=[BLOCK_TOKENS * row["blocks"] for row in rows], y=[row["gb_s"] for row in rows],
                               name=f"{transport}, {w(pieces)}", **stroke(colour, dash))
    for name, transport in CEILINGS.items():
        rate = report.ceilings[name]
        figure.add_scatter(x=[tokens[0], tokens[-1]], y=[rate, rate], mode="lines", name=w(name, rate=f"{rate:.0f}"),
                           line={"color": faded(TRANSPORTS[transport], 0.5), "width": 2, "dash": "dash"})
    figure.update_xaxes(type="log", title_text=w("prompt"), tickvals=tokens, ticktext=[f"{each:,}" for each in tokens])
    figure.update_yaxes(type="log", title_text="GB/s")
    return finish(figure, w("bandwidth.title"), source_of_report(report))


def first_token_figure(report: Report, prompts: str) -> go.Figure:
    """Of `bench routing`: p50 and p99 of TTFT and of TPOT against the rate, of one kind of prompts."""
    rows = sorted((row for row in report.rows if row["prompts"] == prompts), key=lambda row: row["rate"])
    figure = panels(1, 2, [w("tokens.ttft"), w("tokens.tpot")])
    for mode in (each for each in MODE_COLOURS if any(row["mode"] == each for row in rows)):
        those = [row for row in rows if row["mode"] == mode]
        for share, dash in QUANTILES.items():
            quantile = f"p{100 * share:.0f}"
            for place, what in enumerate(("ttft", "tpot"), 1):
                figure.add_scatter(x=[row["rate"] for row in those], y=[row[f"{what}_{quantile}_ms"] for row in those],
                                   name=f"{w(mode)} {quantile}", legendgroup=mode + quantile, showlegend=place == 1, row=1, col=place,
                                   **stroke(MODE_COLOURS[mode], dash))
    figure.update_xaxes(title_text=w("rate"))
    figure.update_yaxes(rangemode="tozero", title_text=w("ms"))
    return finish(figure, w("tokens.title", prompts=named(prompts)), source_of_report(report))


def seed_figure(table: Sequence[Comparison]) -> go.Figure:
    """By which factor what was measured is better than the seed on the same kind of GPU. Raises NoData where nothing is."""
    rows = [row for row in table if row.our_source and row.device.split()[-1] in row.our_source]
    if not rows:
        raise NoData("nothing was measured on the GPUs that the seed was measured on")
    figure = panels(1, 1, [])
    figure.add_bar(orientation="h", y=list(range(len(rows))), x=[row.ratio for row in rows], marker_color=MODE_COLOURS["adaptive"],
                   name=w("seed.ratio"))
    figure.update_yaxes(in_order(rows, map(_beside_the_seed, rows)), range=[len(rows) - 0.5, -0.5], showgrid=False)
    figure.update_xaxes(title_text=w("seed.ratio_axis"), rangemode="tozero")
    sources = dict.fromkeys([*(row.our_source for row in rows), *(row.seed_source for row in rows)])
    return finish(figure, w("page.seed"), " · ".join(sources))


def _beside_the_seed(row: Comparison) -> str:
    ours = f"{row.ours:,.0f}" if row.ours >= 100 else f"{row.ours:.3g}"
    return w("seed.row", what=row.what, seed=f"{row.seed:g}", ours=ours, unit=row.unit, ratio=f"{row.ratio:.1f}")


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
    return finish(figure, w("predicted.title"), source_of_report(report), rows=2)


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
    return source_of_report(report).partition(", ")[2]


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
