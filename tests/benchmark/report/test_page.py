"""The page: what is on it, what is missing, and how that would be made."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from nanopd.benchmark.load.record import PHASES
from nanopd.benchmark.report import page
from nanopd.benchmark.report.page import write_report
from nanopd.benchmark.report.svg import to_svg
from nanopd.benchmark.report.sweeps import NoData
from nanopd.benchmark.results import RECORDED

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """A report of a sweep of two workloads and of what is recorded."""
    folder = tmp_path_factory.mktemp("report")
    for number, run in enumerate(runs):
        run.save(folder / "cells" / f"{number}.json")
    return write_report(folder / "out", RECORDED, folder / "cells")


def test_all_figures_of_a_sweep_and_of_what_is_recorded(written):
    assert written.missing == {} and len(written.drawn) == 25
    text = written.page.read_text(encoding="utf-8")
    for name in written.drawn:
        assert f'id="plot-{name}"' in text and written.page.with_name(f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")
    assert text.count("<script src=") == 1 and "http://" not in text and "https://" not in text.replace("https://plotly.com", "")
    assert sorted(path.name for path in written.page.parent.iterdir()) == sorted(
        ["index.html", page.PLOTLY, *(f"{name}.svg" for name in written.drawn)])


def test_what_lacks_data_is_named_with_the_command_that_makes_it(tmp_path):
    kept = tmp_path / "results" / "nvidia-h200"
    kept.mkdir(parents=True)
    shutil.copy(RECORDED / "nvidia-h200" / "decode.json", kept)
    written = write_report(tmp_path / "out", tmp_path / "results")
    assert set(written.drawn) == {"decode-scaling", "transfer-interference", "seed"}
    assert written.missing["goodput"] == "nanopd bench sweep --gpus 2"
    assert written.missing["regret-simulated"] == "nanopd bench study" and written.missing["predicted"] == "nanopd bench routing"
    assert written.missing["interference"] == "nanopd bench cluster" and written.missing["transfer"] == "nanopd bench transfer"
    assert "goodput: no data; nanopd bench sweep" in str(written)
    assert "<code>nanopd bench study</code>" in written.page.read_text(encoding="utf-8")


def test_a_recorded_sweep_of_a_gpu_goes_before_one_of_the_cpu(runs, tmp_path):
    for folder, run in (("cpu", runs[0]), ("nvidia-h200", runs[-1])):
        run.save(tmp_path / folder / "sweep" / "cell.json")
    assert page._recorded_runs(tmp_path) == [runs[-1]]
    assert page._recorded_runs(tmp_path / "nothing") == []


def test_each_number_of_gpus_has_its_figures(runs):
    one = [replace(run, settings=run.settings | {"topology": "C:0"}) for run in runs if run.settings["mode"] == "collocated"]
    names = {drawing.name: drawing for drawing in page.drawings([*runs, *one], RECORDED)}
    assert {"goodput-1-gpus", "goodput-2-gpus", "predicted"} <= set(names) and "goodput" not in names
    assert "2 × " in names["goodput-2-gpus"].draw().layout.title.subtitle.text
    assert {trace.name for trace in names["throughput-1-gpus"].draw().data if trace.showlegend is not False} == {"collocated"}


def test_peers_are_drawn_beside_each_other(runs):
    """Two servers, of which the client knows the address alone. Raises nothing but NoData, whatever is drawn."""
    unknown = {"mode": "endpoint", "rate": 4.0}
    peers = [replace(run, settings=run.settings | unknown | {"topology": url, "endpoint": url},
                     requests={name: values if name != "mode" else [""] * len(values) for name, values in run.requests.items()
                               if name not in PHASES})
             for url, run in zip(("http://localhost:8000", "http://localhost:8001"), runs)]
    figures = {}
    for drawing in page._of_runs(peers, ""):
        with suppress(NoData):
            figures[drawing.name] = drawing.draw()
    assert {"goodput", "latency-ttft", "latency-tpot", "throughput", "outcomes", "violin-e2e", "timeline"} <= set(figures)
    assert {trace.name for trace in figures["throughput"].data} >= {"server at http://localhost:8000", "server at http://localhost:8001"}
    assert "server at http://localhost:8000" in figures["timeline"].layout.title.text and len(figures["timeline"].data) == 2
    for figure in figures.values():
        assert to_svg(figure).startswith("<svg")


def test_the_page_holds_the_figures_numbers(written, runs):
    text = written.page.read_text(encoding="utf-8")
    script = next(line for line in text.splitlines() if 'id="plot-timeline"' in line)
    figure, _ = json.JSONDecoder().raw_decode(script.split("const figure = ", 1)[1])
    busiest = page._busiest(runs)
    assert busiest.settings["mode"] == "adaptive" and busiest.settings["rate"] == 8.0
    bars = {bar["name"]: bar for bar in figure["data"]}
    assert bars["disaggregated, until the first token"]["x"] == [ttft for ttft in busiest.requests["ttft"] if ttft is not None][:60]


def test_nothing_ends_a_script_before_its_end(runs):
    text = page._figure("x", page.sweeps.goodput_figure(runs).update_layout(title_text="</script><b>"))
    assert text.count("</script>") == 1


def test_figures_need_no_torch():
    code = ("import sys; from nanopd.benchmark.report import page; from nanopd.benchmark.results import RECORDED; "
            "drawn = [drawing.draw() for drawing in page.drawings([], RECORDED) if drawing.name == 'predicted']; "
            "sys.exit('torch' in sys.modules or len(drawn) != 1)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
