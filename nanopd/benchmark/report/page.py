"""The report: a page of all figures that the data allow, and each of them as SVG."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from nanopd.benchmark.load.run import RunRecord
from nanopd.benchmark.report import recorded, sweeps
from nanopd.benchmark.report.runs import by_gpus, chosen, load_runs, values_of, ways_of
from nanopd.benchmark.report.seed import Comparison, seed_table
from nanopd.benchmark.report.svg import to_svg
from nanopd.benchmark.report.words import w
from nanopd.benchmark.results import Report, load, write_whole
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.presets import preset, preset_names
from nanopd.widgets.player import FONT
from nanopd.widgets.strings import current_language

SWEEP = "nanopd bench sweep --gpus 2"
PLOTLY = "plotly.min.js"
CONFIG = {"responsive": True, "displaylogo": False}
STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --faint: #6b7280; --ground: #f3f4f6; --card: #ffffff; --line: #d1d5db; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --faint: #9ca3af; --ground: #111827; --card: #1f2937; --line: #374151; } }
body { margin: 0 auto; max-width: 1000px; padding: 16px; background: var(--ground); color: var(--ink); line-height: 1.5; }
figure { margin: 16px 0; padding: 4px; background: #ffffff; border-radius: 8px; overflow-x: auto; }
figcaption { padding: 0 12px 8px; font-size: 12px; } figcaption a { color: #0072b2; }
table { border-collapse: collapse; width: 100%; font-size: 13px; background: var(--card); border-radius: 8px; }
td, th { padding: 5px 8px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.faint { color: var(--faint); } code { font-size: 12px; }
"""


@dataclass(frozen=True)
class Drawing:
    """A figure by name; of what it lacks, the command that would record it."""

    name: str
    draw: Callable[[], go.Figure]
    command: str


@dataclass(frozen=True)
class Written:
    """A report: its page, what is on it, and which figures lack data."""

    page: Path
    drawn: list[str]
    missing: dict[str, str]  # figure -> the command that would make it

    def __str__(self) -> str:
        lacks = [f"  {name}: no data; {command}" for name, command in self.missing.items()]
        return "\n".join([f"{self.page}: {len(self.drawn)} figures", *lacks])


def write_report(out: Path, folder: Path, sweep: Path | None = None) -> Written:
    """Write OUT/index.html, its plotly.min.js and OUT/<figure>.svg, in the current language.

    Args:
        folder: recorded benchmarks, as in `results`; sweeps are looked for in its <device>/sweep.
        sweep: a folder of runs instead of those; FileNotFoundError where it has none.
    """
    runs = load_runs(sweep) if sweep else _recorded_runs(folder)
    figures: dict[str, go.Figure] = {}
    missing: dict[str, str] = {}
    for drawing in drawings(runs, folder):
        try:
            figures[drawing.name] = drawing.draw()
        except (FileNotFoundError, CostModelError, sweeps.NoData):
            missing[drawing.name] = drawing.command
    for name, figure in figures.items():
        write_whole(out / f"{name}.svg", to_svg(figure))
    write_whole(out / PLOTLY, get_plotlyjs())
    write_whole(out / "index.html", _page(figures, missing, seed_table(lambda bench: load(bench, folder=folder), runs)))
    return Written(out / "index.html", list(figures), missing)


def _recorded_runs(folder: Path) -> list[RunRecord]:
    """Of the device that is none but the CPU, if there is one with a sweep."""
    found = sorted(folder.glob("*/sweep"), key=lambda path: path.parent.name == "cpu")
    return load_runs(found[0]) if found else []


def drawings(runs: Sequence[RunRecord], folder: Path) -> Iterator[Drawing]:
    """All figures there are, whether there are data for them or not."""
    def of_report(name: str, bench: str, draw: Callable[[Report], go.Figure]) -> Drawing:
        return Drawing(name, lambda: draw(load(bench, folder=folder)), f"nanopd bench {bench}")

    groups = by_gpus(runs)
    for number, those in groups.items():
        yield from _of_runs(those, f"-{number}-gpus" if len(groups) > 1 else "")
    for prompts in ("mixed", "long"):
        yield of_report(f"tokens-{prompts}", "routing", lambda report, prompts=prompts: recorded.first_token_figure(report, prompts))
    yield of_report("interference", "cluster", recorded.interference_figure)
    yield Drawing("seed", lambda: recorded.seed_figure(seed_table(lambda bench: load(bench, folder=folder), runs)), "nanopd bench all")
    yield of_report("transfer", "transfer", recorded.transfer_bandwidth_figure)
    yield of_report("crossover-simulated", "study", recorded.study_crossover_figure)
    yield of_report("regret-simulated", "study", recorded.study_regret_figure)
    yield of_report("predicted", "routing", recorded.predicted_figure)
    yield of_report("lone-request", "cluster", recorded.lone_request_figure)
    yield Drawing("transfer-interference", lambda: recorded.transfer_interference_figure(preset(_first_preset())), "nanopd profile")
    yield of_report("decode-scaling", "decode", recorded.decode_scaling_figure)


def _of_runs(runs: Sequence[RunRecord], suffix: str) -> Iterator[Drawing]:
    """Of runs on as many GPUs."""
    def drawing(name: str, draw: Callable[[Sequence[RunRecord]], go.Figure]) -> Drawing:
        def drawn() -> go.Figure:
            if not runs:
                raise sweeps.NoData("there are no runs")
            return draw(runs)
        return Drawing(name + suffix, drawn, SWEEP)

    yield drawing("goodput", sweeps.goodput_figure)
    yield drawing("crossover", sweeps.crossover_figure)
    for what in ("e2e", "ttft", "tpot"):
        yield drawing(f"latency-{what}", lambda runs, what=what: sweeps.latency_figure(runs, what))
    yield drawing("throughput", sweeps.throughput_figure)
    yield drawing("outcomes", sweeps.outcomes_figure)
    for what in ("e2e", "ttft"):
        yield drawing(f"violin-{what}", lambda runs, what=what: sweeps.violin_figure(runs, what))
    yield drawing("ttft-by-length", sweeps.ttft_by_length_figure)
    yield drawing("routing-map", sweeps.routing_map_figure)
    yield drawing("breakdown", sweeps.breakdown_figure)
    yield drawing("regret", sweeps.regret_figure)
    yield drawing("timeline", lambda runs: sweeps.timeline_figure(_busiest(runs)))


def _busiest(runs: Sequence[RunRecord]) -> RunRecord:
    """The adaptive run, if there is one, at the highest rate of its workload."""
    ways = [way for way in ways_of(runs) if way.mode == "adaptive"] or ways_of(runs)
    those = chosen(runs, ways[0])
    return chosen(those, workload=values_of(those, "workload")[-1])[-1]


def _first_preset() -> str:
    names = preset_names()
    if not names:
        raise CostModelError("there are no presets")
    return names[0]


# ---------------------------------------------------------------------------------------------------------- the page


def _page(figures: dict[str, go.Figure], missing: dict[str, str], table: Sequence[Comparison]) -> str:
    body = [_figure(name, figure) for name, figure in figures.items()]
    if missing:
        lines = (w("page.missing_line", figure=escape(name), command=escape(command)) for name, command in missing.items())
        body.append(f"<h2>{w('page.missing')}</h2><ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>")
    body.append(f"<h2>{w('page.seed')}</h2>{_table(table)}")
    return (f'<!doctype html>\n<html lang="{current_language()}"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{w("page.title")}</title><link rel="icon" href="data:,">'
            f"<style>body {{ font-family: {FONT}; }}{STYLE}</style>"
            f'<script src="{PLOTLY}"></script></head>\n<body><h1>{w("page.title")}</h1>\n' + "\n".join(body) + "\n</body></html>\n")


def _figure(name: str, figure: go.Figure) -> str:
    """As wide as the page, drawn by the script beside it."""
    shown = go.Figure(figure).update_layout(width=None)
    data = shown.to_json().replace("</", "<\\/")  # nothing in it may end the script
    script = f'const figure = {data}; Plotly.newPlot("plot-{name}", figure.data, figure.layout, {json.dumps(CONFIG)});'
    return (f'<figure id="{name}"><div id="plot-{name}"></div><figcaption><a href="{name}.svg">{w("page.svg")}</a></figcaption>'
            f"<script>{{ {script} }}</script></figure>")


def _table(rows: Sequence[Comparison]) -> str:
    heads = "".join(f"<th>{w(f'seed.{name}')}</th>" for name in ("what", "theirs", "ours", "ratio", "where", "differs"))
    return f"<table><tr>{heads}</tr>{''.join(map(_row, rows))}</table>"


def _row(row: Comparison) -> str:
    ours = (f'<td class="number">{row.ours:,.4g} {row.unit}</td>' if row.ours is not None
            else f'<td class="faint">{w("seed.none", command=escape(row.command))}</td>')
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}×"
    sources = "<br>".join(escape(source) for source in (f"{row.device}; {row.seed_source}", row.our_source) if source)
    return (f'<tr><td>{escape(row.what)}</td><td class="number">{row.seed:g} {row.unit}</td>{ours}'
            f'<td class="number">{ratio}</td><td class="faint">{sources}</td><td class="faint">{escape(row.differs)}</td></tr>')
