"""The replay shows the recording's moment, at either speed, and says wherever it is seen that it is none of now."""

from __future__ import annotations

import pytest
from widgets.test_live_recording import GPU, recorded

from nanopd.widgets.live_figure import TRACES
from nanopd.widgets.live_replay import SPEEDS, TICK, LiveReplay
from nanopd.widgets.live_serving import LiveServing
from nanopd.widgets.strings import set_language

CPU = {"kind": "cpu", "name": "cpu", "cpu": "made up"}


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


def runs():
    return [recorded(seconds=10.1), recorded(CPU, seconds=9.5, mode="collocated")]


def trace(panel, name):
    return panel.figure.data[TRACES.index(name)]


def test_it_begins_with_the_whole_and_goes_to_any_moment():
    panel = LiveReplay(runs=runs())
    assert panel.now == 10.1 and list(trace(panel, "sent disaggregated").x) == [1.6, 3.5] and "ends here" in panel.message.value
    panel.show(4.0)
    assert panel.now == pytest.approx(4.0) and "<b>4 s</b>" in panel.message.value and "ends here" not in panel.message.value
    assert list(trace(panel, "ttft collocated").y) == pytest.approx([250]) and list(trace(panel, "ttft disaggregated").x) == [3.6]
    assert list(trace(panel, "queue").y) == [2, 1]
    assert "8 requests/s, long prompts" in panel.message.value, "the load of that moment"
    panel.show(0)
    assert not trace(panel, "sent disaggregated").x and "2 requests/s" in panel.message.value


def test_a_decision_says_what_was_expected():
    said, = trace(LiveReplay(runs=runs()), "sent collocated").hovertext
    assert "collocated: C0" in said and "collocated 500 + 100 ms · disaggregated 700 + 0 ms" in said


def test_speeds_are_what_they_are_called_and_both_come_to_the_end():
    panel = LiveReplay(runs=runs())
    for name, times in (("1x", 1), ("5x", 5)):
        panel.show(3 * TICK)
        panel.speed.value = name
        assert panel.play.step * TICK / (panel.play.interval / 1e3) == pytest.approx(times)
        assert (panel.play.max - panel.play.value) % panel.play.step == 0 and panel.slider.step == panel.play.step
        assert panel.slider.value == panel.play.value
    assert set(SPEEDS) == set(panel.speed.options)


def test_nobody_takes_it_for_live():
    panel, live = LiveReplay(runs=runs()), LiveServing(topologies=["C:cpu"])
    source = "Made-up GPU, 2026-01-02, commit abc1234"
    assert "Replay, not live" in panel.badge.value and source in panel.badge.value and "tiny, C:0 P:0 D:0" in panel.badge.value
    for figure in (panel.figure, panel.snapshot()):
        assert any(f"RECORDED on {source}" in note.text for note in figure.layout.annotations)
        assert figure.layout.paper_bgcolor != live.figure.layout.paper_bgcolor
    assert source in panel.snapshot().layout.title.text
    assert not any("RECORDED" in note.text for note in live.figure.layout.annotations)


def test_another_recording_takes_its_place():
    panel = LiveReplay(runs=runs())
    assert panel.choice.options[1][0] == "cpu, 2026-01-02: collocated"
    panel.play.playing = True
    panel.choice.index = 1
    assert panel.now == 9.5 and "recorded on cpu" in panel.badge.value and "RECORDED on cpu" in panel.figure.layout.annotations[-1].text
    assert not panel.play.playing and "mode: collocated" in panel.message.value


def test_where_none_was_recorded_it_says_so_and_shows_what_there_is(monkeypatch):
    monkeypatch.setattr("nanopd.widgets.live_replay.recordings", lambda device=None: [] if device else [recorded(CPU)])
    panel = LiveReplay("B300 <tag>")
    assert "No run was recorded on “B300 &lt;tag&gt;”" in panel.message.value and "nanopd bench record" in panel.message.value
    assert "Recorded so far: cpu" in panel.message.value and panel.recording.device == CPU
    panel.show(0)
    assert "No run was recorded" in panel.message.value, "moving about does not wipe it away"
    assert "<code>" not in panel.snapshot().layout.title.text, "a figure's title knows no such tag"


def test_a_device_that_has_some_gets_its_own(monkeypatch):
    monkeypatch.setattr("nanopd.widgets.live_replay.recordings", lambda device=None: [recorded()] if device else runs())
    panel = LiveReplay("made-up")
    assert [run.device for run in panel.runs] == [GPU] and "No run was recorded" not in panel.message.value


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_with_nothing_at_all_there_is_a_sentence(lang):
    set_language(lang)
    panel = LiveReplay(runs=[])
    assert "nanopd bench record" in panel.message.value and "nanopd bench record" in panel.snapshot().layout.title.text
