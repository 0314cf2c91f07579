"""The panel of transfers shows what was recorded and what is measured here, and says which is which."""

from __future__ import annotations

import pytest

from nanopd.benchmark.results import Report
from nanopd.widgets import transfer_times
from nanopd.widgets.strings import set_language
from nanopd.widgets.transfer_times import Point, TransferTimes

ROWS = [
    {"transport": "peer", "pieces": "whole", "blocks": 64, "gb_s": 300.0},
    {"transport": "peer", "pieces": "whole", "blocks": 4, "gb_s": 40.0},
    {"transport": "peer", "pieces": "layers", "blocks": 64, "gb_s": 100.0},
    {"transport": "relay", "pieces": "whole", "blocks": 64, "gb_s": 25.0},
]
REPORT = Report("transfer", "2026-01-01T00:00:00+00:00", "nanopd bench transfer", "abcdef0123", False,
                {"kind": "cuda", "name": "Some GPU"}, {}, {"peer_copy_gb_s": 320.0}, ROWS)


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


def recorded(monkeypatch, report):
    def load(bench):
        if report is None:
            raise FileNotFoundError(bench)
        return report

    monkeypatch.setattr(transfer_times, "load", load)


def test_a_recorded_run_is_drawn_under_its_badge(monkeypatch):
    recorded(monkeypatch, REPORT)
    panel = TransferTimes()
    assert panel.message.value == "recorded on Some GPU, 2026-01-01, commit abcdef0"
    peer, by_layer, relay, ceiling = panel.figure.data
    assert (by_layer.name, list(by_layer.y)) == ("peer, layer by layer (recorded elsewhere)", [100.0])
    assert (peer.name, list(peer.x), list(peer.y)) == ("peer (recorded elsewhere)", [4, 64], [40.0, 300.0])
    assert list(relay.y) == [25.0] and peer.marker.symbol == "diamond"
    assert (ceiling.name, list(ceiling.y)) == ("peer copy", [320.0, 320.0])


def test_where_nothing_was_recorded_it_says_so_and_shows_no_figure(monkeypatch):
    for report in (None, Report("transfer", "2026-01-01", "", None, None, {"kind": "cpu", "name": "cpu"}, {}, {}, ROWS)):
        recorded(monkeypatch, report)
        panel = TransferTimes()
        assert len(panel.figure.data) == 0 and panel.message.value == "no recorded run of `nanopd bench transfer`"


def test_what_is_measured_here_stands_beside_it(monkeypatch):
    recorded(monkeypatch, REPORT)
    panel = TransferTimes(measure=lambda: [Point("local", 4, 1.5), Point("local", 1, 0.5)])
    panel.measure_button.click()
    here = next(trace for trace in panel.figure.data if trace.name == "local (measured here)")
    assert (list(here.x), list(here.y), here.marker.symbol) == ([1, 4], [0.5, 1.5], "star")
    assert len(panel.figure.data) == 5 and not panel.measure_button.disabled
    assert "Some GPU" in panel.message.value and "measured on this machine's CPU, both ends in one process: local" in panel.message.value
    panel.measure()
    assert len(panel.figure.data) == 5
    assert "Some GPU" in panel.snapshot().layout.title.text


def test_a_measurement_that_fails_leaves_the_button_alive(monkeypatch):
    recorded(monkeypatch, None)

    def fail():
        raise RuntimeError("no memory")

    panel = TransferTimes(measure=fail)
    with pytest.raises(RuntimeError):
        panel.measure()
    assert not panel.measure_button.disabled and panel.measured == []


def test_every_transport_is_really_timed():
    points = transfer_times.measure_here()
    transports = list(dict.fromkeys(point.transport for point in points))
    assert transports == ["local", "peer", "relay", "collective"]
    assert [point.num_blocks for point in points] == transfer_times.COUNTS * len(transports)
    assert all(0 < point.gb_s < 1e4 for point in points)
