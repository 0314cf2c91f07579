"""A figure as SVG: it is XML, and what is drawn in it maps back to the values."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import plotly.graph_objects as go
import pytest

from nanopd.benchmark.report import recorded, sweeps
from nanopd.benchmark.report.seed import seed_table
from nanopd.benchmark.report.style import finish, panels
from nanopd.benchmark.report.svg import colour_at, readable_on, to_svg
from nanopd.benchmark.report.text import text_width
from nanopd.benchmark.results import load
from nanopd.cost_model.presets import preset
from nanopd.widgets.strings import set_language

SVG = "{http://www.w3.org/2000/svg}"


def parsed(figure):
    return ET.fromstring(to_svg(figure))


def panels_of(picture):
    return {each.get("id"): each for each in picture.iter(f"{SVG}g") if each.get("class") == "panel"}


def inverse(panel, letter, pixel):
    """The value at a pixel, by what the panel says of its scale."""
    kind, *ends = panel.get(f"data-{letter}").split()
    low, high, start, end = map(float, ends)
    share = (float(pixel) - start) / (end - start)
    return 10 ** (math.log10(low) + share * (math.log10(high) - math.log10(low))) if kind == "log" else low + share * (high - low)


def drawn(panel, name):
    return next(each for each in panel if each.get("data-name") == name)


def points(panel, name):
    return [(inverse(panel, "x", dot.get("cx")), inverse(panel, "y", dot.get("cy"))) for dot in drawn(panel, name).iter(f"{SVG}circle")]


def rectangles(panel, name):
    """As values: left, right, bottom, top."""
    for each in drawn(panel, name).iter(f"{SVG}rect"):
        x, y, width, height = (float(each.get(key)) for key in ("x", "y", "width", "height"))
        across, up = [inverse(panel, "x", pixel) for pixel in (x, x + width)], [inverse(panel, "y", pixel) for pixel in (y, y + height)]
        yield *sorted(across), *sorted(up)


def close(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert one == pytest.approx(other, rel=0.01, abs=0.02)


# ------------------------------------------------------------------------------------------------------ values


def test_dots_map_back_to_the_values(runs):
    for figure in (sweeps.goodput_figure(runs), sweeps.latency_figure(runs), recorded.predicted_figure(load("routing")),
                   recorded.transfer_interference_figure(preset("nvidia-h200/qwen3-8b"))):
        found = panels_of(parsed(figure))
        for trace in figure.data:
            if "markers" in trace.mode and trace.name not in ("one seed",):
                close(points(found[f"{trace.xaxis or 'x'}{trace.yaxis or 'y'}"], trace.name), list(zip(trace.x, trace.y)))


def test_lines_run_through_the_values_and_break_where_there_is_none():
    figure = finish(go.Figure(go.Scatter(x=[1, 2, 3, 4], y=[1, 2, None, 4], mode="lines", name="a", line_color="#0072b2")), "t", "s")
    path = next(drawn(panels_of(parsed(figure))["xy"], "a").iter(f"{SVG}path")).get("d")
    assert path.count("M") == 2 and path.count("L") == 1


def test_stacked_bars_stand_on_one_another(runs):
    figure = sweeps.outcomes_figure(runs)
    panel = panels_of(parsed(figure))["xy"]
    completed, failed, dropped = (trace for trace in figure.data if (trace.xaxis or "x") == "x")
    ended = [a + b for a, b in zip(completed.y, failed.y)]
    for name, below, heights in (("completed", [0, 0, 0], completed.y), ("dropped", ended, dropped.y)):
        for place, (left, right, bottom, top) in enumerate(rectangles(panel, name)):
            assert (left + right) / 2 == pytest.approx(place, abs=0.02)
            assert (bottom, top) == pytest.approx((below[place], below[place] + heights[place]), abs=0.3)


def test_lying_bars_begin_at_their_base(runs):
    run = runs[0]
    figure = sweeps.timeline_figure(run)
    panel = panels_of(parsed(figure))["xy"]
    found = list(rectangles(panel, "collocated, until the first token"))
    assert [left for left, *_ in found] == pytest.approx(run.requests["arrival"][:60], abs=0.05)
    assert [right - left for left, right, *_ in found] == pytest.approx(run.requests["ttft"][:60], abs=0.05)
    assert found[0][2] == pytest.approx(-0.4, abs=0.05)  # the first on top: the axis is turned round


def test_cells_of_a_map_have_their_colour_and_text():
    figure = recorded.study_crossover_figure(load("study"))
    picture = parsed(figure)
    panel, heat = panels_of(picture)["xy"], figure.data[0]
    cells = next(each for each in panel if "heatmap" in each.get("class"))
    fills = [each.get("fill") for each in cells.iter(f"{SVG}rect")]
    assert fills == [colour_at(heat.colorscale, (value + 1) / 2) for row in heat.z for value in row if value is not None]
    texts = ["".join(each.itertext()) for each in panel.iter(f"{SVG}text")]
    assert "P=2 D=296.5/s" in texts


def test_whiskers_reach_from_p5_to_p95(runs):
    figure = sweeps.violin_figure(runs, "ttft")
    marks = next(trace for trace in figure.data if trace.name == "collocated, median")
    panel = panels_of(parsed(figure))["xy"]
    line, = drawn(panel, marks.name).iter(f"{SVG}line")
    low, high = (inverse(panel, "y", line.get(key)) for key in ("y1", "y2"))
    assert (low, high) == pytest.approx((marks.y[0] - marks.error_y.arrayminus[0], marks.y[0] + marks.error_y.array[0]), rel=0.01)


# ------------------------------------------------------------------------------------------------------- looks


@pytest.mark.parametrize("lang", ["zh", pytest.param("en", marks=pytest.mark.nightly)])
def test_all_figures_are_xml_with_title_source_and_legend_within_the_picture(runs, lang):
    set_language(lang)
    figures = [sweeps.latency_figure(runs), sweeps.throughput_figure(runs), sweeps.violin_figure(runs), sweeps.ttft_by_length_figure(runs),
               sweeps.routing_map_figure(runs), sweeps.crossover_figure(runs), sweeps.breakdown_figure(runs), sweeps.regret_figure(runs),
               recorded.study_regret_figure(load("study")), recorded.lone_request_figure(load("cluster")),
               recorded.decode_scaling_figure(load("decode")), recorded.interference_figure(load("cluster")),
               recorded.transfer_bandwidth_figure(load("transfer")), recorded.seed_figure(seed_table(load)),
               recorded.first_token_figure(load("routing"), "mixed"), finish(sweeps.regret_figure(runs), "long", "a source " * 20)]
    for figure in figures:
        picture = parsed(figure)
        texts = ["".join(each.itertext()) for each in picture.iter(f"{SVG}text")]
        assert figure.layout.title.text.replace("<b>", "").replace("</b>", "") in texts
        assert any(text.startswith(figure.layout.title.subtitle.text.split(" · ")[0]) for text in texts)
        width, height = float(picture.get("width")), float(picture.get("height"))
        for text in picture.iter(f"{SVG}text"):
            x, y, size = (float(text.get(key)) for key in ("x", "y", "font-size"))
            wide = text_width("".join(text.itertext()), size) * {"start": 1, "middle": 0, "end": -1}[text.get("text-anchor")]
            assert min(x, x + wide) >= -1 and max(x, x + wide) <= width + 1 and 0 <= y <= height, "".join(text.itertext())
        for trace in figure.data:
            if trace.showlegend is not False and trace.type != "heatmap" and len(figure.data) > 1:
                assert trace.name in texts


def test_nothing_of_the_data_is_taken_for_markup():
    traces = [go.Scatter(x=[1], y=[1], name='<script>"&amp;', mode="markers"), go.Scatter(x=[1], y=[2], name="b")]
    picture = parsed(finish(go.Figure(traces), "a < b & c", "s"))
    assert not [each for each in picture.iter() if "script" in each.tag]


def test_axes_that_are_shared_have_one_range(runs):
    found = panels_of(parsed(sweeps.breakdown_figure(runs)))
    assert found["xy"].get("data-y") == found["x2y2"].get("data-y") and found["xy"].get("data-y") != found["x4y4"].get("data-y")


def test_panels_lie_side_by_side(runs):
    found = panels_of(parsed(sweeps.goodput_figure(runs)))
    (_, _, _, _, right), (_, _, _, left, _) = (found[key].get("data-x").split() for key in ("xy", "x2y2"))
    assert float(right) + 40 < float(left)


def test_a_kind_that_is_not_drawn_is_named():
    with pytest.raises(ValueError, match="'pie'"):
        to_svg(go.Figure(go.Pie(values=[1])))


@pytest.mark.parametrize(("share", "colour"), [(0, "#0072b2"), (0.5, "#f7f7f7"), (1, "#d55e00"), (0.75, "#e6aa7c"), (2, "#d55e00")])
def test_colours_between_the_given_ones(share, colour):
    found = colour_at([(0.0, "#0072b2"), (0.5, "#f7f7f7"), (1.0, "#d55e00")], share)
    assert [int(found[i:i + 2], 16) for i in (1, 3, 5)] == pytest.approx([int(colour[i:i + 2], 16) for i in (1, 3, 5)], abs=1)


def test_text_is_legible_on_its_cell():
    assert readable_on("#0072b2") == "#ffffff" and readable_on("#f7f7f7") != "#ffffff"


def test_chinese_is_wider():
    assert text_width("解码", 12) == 24 and text_width("<b>ab</b><br>a", 10) == pytest.approx(11.2)


def test_empty_panels_leave_room_for_their_titles():
    figure = finish(panels(1, 2, ["a", "b"]), "t", "s")
    assert [note.text for note in figure.layout.annotations] == ["a", "b"] and parsed(figure).tag == f"{SVG}svg"
