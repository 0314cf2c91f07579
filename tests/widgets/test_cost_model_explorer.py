"""The cost-model explorer follows its sliders, tells predictions from measurements, and says where both are from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanopd.cost_model.analytical import Shape
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.measurements import DecodeRow, Measurements, MixedRow, PrefillRow, TransferRow
from nanopd.cost_model.presets import preset
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.seed import seed_preset
from nanopd.widgets.cost_model_explorer import (
    BARS,
    HERE,
    LOADS,
    MAP,
    MEASURED,
    PLOTS,
    PREDICTED,
    PROMPTS,
    CostModelExplorer,
)
from nanopd.widgets.path_costs import TERMS
from nanopd.widgets.strings import set_language

LENGTHS = (10, 50, 100, 200, 500, 700, 1000, 1500)
H200 = "NVIDIA H200, qwen3-8b, bfloat16"


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


@pytest.fixture(scope="module")
def profile():
    """Of a machine on which everything adds up: 5 ms a step, 0.1 ms a token, 0.01 ms a token of context."""
    prefill = [PrefillRow(5e-3 + 1e-4 * length, length, 0) for length in LENGTHS]
    decode = [DecodeRow(5e-3 + 1e-4 * batch + 1e-5 * batch * context, batch, float(batch * context))
              for batch, context in ((1, 100), (2, 100), (4, 100), (8, 100), (8, 20), (16, 100), (16, 20), (32, 20))]
    mixed = [MixedRow(5e-3 + 1e-4 * (length + batch) + 1e-5 * batch * context, length, 0, batch, float(batch * context))
             for length in (500, 700, 1000, 1500) for batch, context in ((4, 100), (16, 20), (16, 100))]
    transfer = [TransferRow(1e-4 + size / 1e9, "cpu", "cpu", "peer", size) for size in (1e4, 1e6, 1e8)]
    return Profile.of(Measurements(tuple(prefill), tuple(decode), tuple(mixed), tuple(transfer)), Shape(5, 5120),
                      device="<this> machine", model="tiny", dtype="float32", date="2026-01-02T03:04:05+00:00", versions={})


def bars(panel):
    """term -> milliseconds, (collocated, disaggregated)"""
    return {term: tuple(panel.figure.data[BARS + i].x) for i, term in enumerate(TERMS) if any(panel.figure.data[BARS + i].x)}


def test_it_begins_with_the_published_parameters_and_without_points():
    panel = CostModelExplorer()
    assert panel.five == seed_preset("rtx-4090") and panel.profile is None
    assert "Published</b> with the earlier system: RTX 4090" in panel.message.value and "No measured points" in panel.message.value
    assert "gamma / transfer rate = 7.6: disaggregate from load 3" in panel.message.value
    assert not any(panel.figure.data[i].x for i in range(PLOTS, PLOTS + 6)) and panel.model_buttons.disabled
    panel.source.value = "H20"
    assert panel.five == seed_preset("h20") and "= 346: disaggregate from load 1" in panel.message.value


def test_the_map_turns_at_the_crossover_for_every_length():
    panel = CostModelExplorer()
    for load, row in zip(LOADS, panel.figure.data[MAP].z):
        assert all((ratio > 0) == (load >= 3) for ratio in row)
    panel.parameters["bandwidth_gb_s"].value = 1.9
    assert panel.five.crossover_load == 15
    assert all((row[0] > 0) == (load >= 15) for load, row in zip(LOADS, panel.figure.data[MAP].z))


def test_the_map_is_of_the_costs_where_the_rule_differs_from_them():
    panel = CostModelExplorer()
    panel.parameters["bandwidth_gb_s"].value = 1.2  # a token is dearer to move than what it costs others
    assert 1 < panel.five.crossover_load < 64
    assert max(max(row) for row in panel.figure.data[MAP].z) < 0


@pytest.mark.parametrize(("slider", "value", "changed"), [
    ("alpha_ms_per_token", 1.0, {"prefill"}), ("beta_ms", 5.0, {"decode"}), ("gamma_ms_per_token", 1.0, {"interference"}),
    ("bandwidth_gb_s", 1.0, {"transfer"}), ("batch_thresh", 4, {"interference", "decode"}), ("output", 256, {"decode"}),
    ("load", 8, {"interference"}), ("prompt", 2048, {"prefill", "interference", "transfer"})])
def test_each_slider_moves_its_bars(slider, value, changed):
    panel = CostModelExplorer()
    before, uids = bars(panel), [trace.uid for trace in panel.figure.data]
    (panel.parameters | panel.sliders)[slider].value = value
    after = bars(panel)
    assert {term for term in before if before[term] != after[term]} == changed
    assert [trace.uid for trace in panel.figure.data] == uids, "changed in place"


def test_the_mark_lies_where_the_sliders_are():
    panel = CostModelExplorer()
    panel.show(prompt=4096, load=16)
    mark = panel.figure.data[HERE]
    assert (list(mark.x), list(mark.y)) == (["4,096"], ["16"])
    assert mark.x[0] in panel.figure.data[MAP].x and mark.y[0] in panel.figure.data[MAP].y
    assert (len(panel.figure.data[MAP].z), len(panel.figure.data[MAP].z[0])) == (len(LOADS), len(PROMPTS))


def test_measured_points_and_predictions_of_the_same_steps(profile):
    panel = CostModelExplorer(profile)
    assert "Measured</b> on &lt;this&gt; machine, tiny, float32, 2026-01-02" in panel.message.value
    measured, predicted = panel.figure.data[PLOTS + MEASURED], panel.figure.data[PLOTS + PREDICTED]
    assert list(measured.x) == list(predicted.x) == list(LENGTHS)
    assert list(measured.y) == pytest.approx([5 + 0.1 * length for length in LENGTHS])
    assert predicted.y[0] == pytest.approx(10 * panel.five.alpha_ms_per_token), "the formula has no floor"
    panel.show(model="fitted")
    assert list(panel.figure.data[PLOTS + PREDICTED].y) == pytest.approx(list(measured.y), rel=0.02)
    assert all(control.disabled for control in panel.parameters.values()) and "Rule" not in panel.message.value
    assert max(map(abs, panel.errors("mixed"))) < 0.05


def test_a_gamma_that_holds_the_prefill_shows_as_circles_above_the_diamonds(profile):
    panel = CostModelExplorer(profile)
    assert panel.five.gamma_ms_per_token > panel.five.alpha_ms_per_token / 2
    assert min(panel.errors("mixed")) > 0.2, "each is charged too much"
    before = max(panel.errors("mixed"))
    panel.parameters["gamma_ms_per_token"].value /= 64
    assert max(panel.errors("mixed")) < before / 2


def test_a_profile_without_mixed_steps_says_that_gamma_was_not_measured(profile):
    panel = CostModelExplorer(replace(profile, measurements=replace(profile.measurements, mixed=())))
    assert "float32, 2026-01-02; no mixed steps" in panel.message.value
    assert panel.figure.layout.annotations[4].text == "prompt beside decodes: none measured"


def test_a_recorded_gpu_is_among_the_sources():
    panel = CostModelExplorer()
    panel.source.value = H200
    assert f"Measured</b> on {H200}, {preset('nvidia-h200/qwen3-8b').date[:10]}" in panel.message.value
    panel.model_buttons.value = "fitted"
    assert set(bars(panel)) == {"prefill", "transfer", "decode", "others"}
    panel.load("H20")
    assert set(bars(panel)) == {"prefill", "transfer", "decode", "interference"}, "published parameters have no fitted model"


def test_an_unknown_source_and_a_profile_without_transfers_are_refused(profile):
    with pytest.raises(CostModelError, match="nothing called 'B200' here; there is NVIDIA H200"):
        CostModelExplorer().load("B200")
    with pytest.raises(CostModelError, match="none of transfer"):
        CostModelExplorer(replace(profile, measurements=replace(profile.measurements, transfer=())))


def test_the_snapshot_is_static_and_says_what_it_shows(profile):
    panel = CostModelExplorer(profile)
    figure = panel.snapshot()
    assert type(figure).__name__ == "Figure" and "2026-01-02" in figure.layout.title.text
    before = figure.data[BARS].x
    panel.show(prompt=2048)
    assert figure.data[BARS].x == before


def test_it_speaks_chinese(profile):
    set_language("zh")
    panel = CostModelExplorer(profile)
    assert "实测" in panel.message.value and panel.figure.data[BARS].name == "预填充"
    assert list(panel.figure.data[BARS].y) == ["混部", "分离"]
