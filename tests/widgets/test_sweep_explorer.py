"""The sweep explorer judges requests by the SLO of its sliders, and says where they are from."""

from __future__ import annotations

import math

import pytest

from nanopd.benchmark.load import ClientRecord, Load, RunRecord, load_metrics
from nanopd.benchmark.load.run import RunSettings
from nanopd.config import SLO
from nanopd.widgets.strings import set_language
from nanopd.widgets.sweep_explorer import Cell, Felt, SweepExplorer

LOOSE, TIGHT = SLO(1.0, 0.02), SLO(1.0, 0.007)


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


def cell(line, rate, ttft, tpot, number=40, refused=0):
    return Cell(line, rate, number / rate, [Felt(ttft, tpot)] * (number - refused) + [None] * refused)


def cells():
    """Collocated TPOT grows with the rate; disaggregated TTFT breaks at the highest."""
    collocated = [cell("collocated", rate, 0.1, tpot) for rate, tpot in ((10, 0.005), (20, 0.008), (30, 0.012))]
    apart = [cell("disaggregated", rate, ttft, 0.006) for rate, ttft in ((10, 0.2), (30, 3.0), (20, 0.3))]
    return collocated + apart


def explorer(slo=LOOSE, **options):
    return SweepExplorer(cells(), options.pop("origin", "simulated"), options.pop("device", "two GPUs"), slo)


def goodput_line(panel, name):
    trace = next(trace for trace in panel.figure.data if trace.name == name)
    return dict(zip(trace.x, trace.y))


def test_another_slo_is_another_winner():
    panel = explorer()
    assert goodput_line(panel, "collocated") == pytest.approx({10: 10, 20: 20, 30: 30})
    assert goodput_line(panel, "disaggregated") == pytest.approx({10: 10, 20: 20, 30: 0})
    panel.show(tpot=7)
    assert goodput_line(panel, "collocated") == pytest.approx({10: 10, 20: 0, 30: 0})
    assert goodput_line(panel, "disaggregated") == panel.goodput("disaggregated") == pytest.approx({10: 10, 20: 20, 30: 0})
    assert panel.highest_rate("collocated") == 10 and panel.highest_rate("disaggregated") == 20
    panel.show(ttft=150)
    assert panel.highest_rate("disaggregated") is None and "disaggregated <b>none of these</b>" in panel.sentence


def test_a_rate_above_one_that_was_not_borne_is_not_reached():
    panel = SweepExplorer([cell("a", 1, 0.1, 0.01), cell("a", 2, 9.0, 0.01), cell("a", 3, 0.1, 0.01)], "measured", "", LOOSE)
    assert panel.highest_rate("a") == 1


def test_the_quantile_can_be_chosen():
    slow = Cell("a", 5, 8.0, [*[Felt(0.1, 0.01)] * 39, Felt(2.0, None)])
    panel = SweepExplorer([slow], "measured", "a CPU", LOOSE)
    ttft, tpot = panel.figure.data[1:3]
    assert ttft.y[0] == pytest.approx(2000) and tpot.y[0] == pytest.approx(10), "an answer of one token has no TPOT"
    panel.show(share="p50")
    assert ttft.y[0] == pytest.approx(100) and "p50" in panel.figure.layout.annotations[1].text


@pytest.mark.parametrize(("origin", "badge"), [("measured", "on this machine"), ("recorded", "Recorded"), ("simulated", "not measured")])
def test_it_says_where_it_is_from(origin, badge):
    panel = explorer(origin=origin, device="H<200>")
    assert badge in panel.message.value and "H&lt;200&gt;" in panel.message.value
    assert badge in panel.snapshot().layout.title.text


def test_the_sliders_reach_beyond_all_that_was_felt():
    panel = explorer()
    for slider, low, high in ((panel.ttft, 100, 3000), (panel.tpot, 5, 20)):
        assert 10**slider.min < low and 10**slider.max > high


@pytest.mark.parametrize(("origin", "given"), [("guessed", cells()), ("measured", [])])
def test_what_cannot_be_shown_is_refused(origin, given):
    with pytest.raises(ValueError):
        SweepExplorer(given, origin, "", LOOSE)


# ------------------------------------------------------------------------------------------------ cells


def load():
    records = []
    for number in range(60):
        record = ClientRecord(number / 10, 50, 3, counts=number >= 10, sent=number / 10)
        if number % 5 == 4:
            record.end(number / 10, "dropped")
        else:
            first = number / 10 + 0.1 + 0.02 * number
            record.tokens = [first, first + 0.01, first + 0.03]
            record.end(first + 0.03, "completed")
        records.append(record)
    return Load(records, 1.0, 6.0)


@pytest.mark.parametrize("make", [
    lambda: Cell.of_load("a", 10, load()),
    lambda: Cell.of_run(RunRecord(RunSettings(rate=10.0).__dict__, load_metrics(load(), bootstrap=0), columns(load()), {}, {}, None,
                                  None, "", "")),
], ids=["load", "record of a run"])
def test_its_figures_are_those_of_the_load(make):
    slo = SLO(0.9, 0.02)
    found, expected = make(), load_metrics(load(), slo)
    assert found.attainment(slo) == pytest.approx(expected["attainment"])
    assert found.goodput(slo) == pytest.approx(expected["request_goodput"])
    assert found.latency("ttft", 0.99) == pytest.approx(expected["p99_ttft_ms"] / 1e3)
    assert found.interval(slo) == pytest.approx(expected["ci"]["request_goodput"], rel=0.1), "a bootstrap says about the same"


def columns(load):
    return {"status": [one.status for one in load.counted], "ttft": [one.ttft if one.tokens else None for one in load.counted],
            "tpot": [one.tpot if one.tokens else None for one in load.counted]}


def test_simulated_requests_make_a_cell():
    answered = [record for record in load().counted if record.status == "completed"]
    found = Cell.of_simulated("a", 10, answered)
    assert found.attainment(SLO(99, 1)) == 1 and found.seconds == pytest.approx(load_metrics(load(), bootstrap=0)["duration"])


def test_nobody_answered():
    none = Cell.of_load("a", 10, Load([ClientRecord(0.0, 5, 5, sent=0.0, status="dropped")], 0.0, 1.0))
    assert none.attainment(LOOSE) == none.goodput(LOOSE) == 0 and none.latency("ttft", 0.5) is None
    assert Cell("a", 1.0, math.inf, []).interval(LOOSE) == (0, 0)
    assert SweepExplorer([none], "measured", "a CPU", LOOSE).highest_rate("a") is None


def test_seeds_are_pooled():
    one, other = cell("a", 4, 0.1, 0.01, number=40), cell("a", 4, 0.1, 0.03, number=20)
    pooled = Cell.pooled([one, other])
    assert (pooled.line, pooled.rate, len(pooled.requests), pooled.seconds) == ("a", 4, 60, 15.0)
    assert pooled.goodput(LOOSE) == pytest.approx(40 / 15) and pooled.attainment(LOOSE) == pytest.approx(2 / 3)
