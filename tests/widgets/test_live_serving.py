"""The live panel serves, follows its sliders, draws what the driver saw, and says what needs a restart."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from nanopd.widgets.live_figure import TRACES, draw
from nanopd.widgets.live_load import Load, Picture, Sample, Seen
from nanopd.widgets.live_serving import LiveServing, modes_of
from nanopd.widgets.strings import set_language

SECONDS = 60
TOPOLOGIES = ["C:cpu P:cpu D:cpu", "C:cpu", "P:cpu D:cpu"]


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


@pytest.fixture
def panel():
    panel = LiveServing(topologies=TOPOLOGIES, load=Load(rate=10, mix="short", output_tokens=4, mode="collocated"),
                        router="round-robin", dtype="float32", num_gpu_blocks_override=512)
    yield panel
    panel.shutdown()


def until(condition, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def trace(panel, name):
    return panel.figure.data[TRACES.index(name)]


def drawn(panel, way="collocated"):
    return len(trace(panel, f"sent {way}").x or ())


def picture():
    requests = [Seen("0", 40, 1.0, 1.1, "collocated", "C0", 1.2, 2.2, 11), Seen("1", 200, 1.5, 1.6, "disaggregated"),
                Seen("2", 50, 3.0)]
    return Picture(4.0, requests, [Sample(0.5, 2, 10.0), Sample(1.0, 1, 30.0)], 2, 1, 0)


def test_what_was_seen_is_drawn(panel):
    with panel.figure.batch_update():
        draw(panel.figure, picture())
    assert (list(trace(panel, "sent collocated").x), list(trace(panel, "sent collocated").y)) == ([1.1], [40])
    assert (list(trace(panel, "sent disaggregated").x), list(trace(panel, "sent disaggregated").y)) == ([1.6], [200])
    assert "<b>1</b>" in trace(panel, "sent disaggregated").hovertext[0]
    assert list(trace(panel, "ttft collocated").y) == pytest.approx([200]) and not trace(panel, "ttft disaggregated").y
    assert list(trace(panel, "tpot collocated").y) == pytest.approx([100])
    assert list(trace(panel, "queue").y) == [2, 1] and list(trace(panel, "rate").y) == [10, 30]


def test_it_serves_and_stops(panel):
    panel.start_button.click()
    assert panel.start_button.disabled and not panel.stop_button.disabled
    until(lambda: drawn(panel) >= 3 and len(trace(panel, "ttft collocated").y) >= 2, "nothing was drawn")
    panel.stop_button.click()
    assert not panel.start_button.disabled and panel.stop_button.disabled
    assert not panel.driver.running and "stopped" in panel.message.value
    assert "TTFT" in panel.snapshot().layout.title.text and len(panel.snapshot().data[0].x) == drawn(panel)
    assert panel.explanations() == [], "no router was asked"


def test_sliders_work_while_it_runs(panel):
    panel.start()
    until(lambda: drawn(panel), "nothing was drawn")
    cluster = panel.driver.cluster
    panel.mode.value, panel.rate.value, panel.mix.value, panel.output.value = "disaggregated", 5, "mixed", 8
    assert panel.driver.load == Load(5, "mixed", 8, "disaggregated")
    until(lambda: drawn(panel, "disaggregated"), "the mode did not change")
    assert panel.driver.cluster is cluster


def test_another_topology_or_chunk_waits_for_the_next_start_and_says_so(panel):
    panel.start()
    until(lambda: drawn(panel), "nothing was drawn")
    cluster = panel.driver.cluster
    panel.topology.value = "P:cpu D:cpu"
    panel.chunk.value = 128
    until(lambda: "next Start" in panel.message.value, "it does not say so")
    assert panel.driver.cluster is cluster
    panel.stop()
    assert panel.mode.value == "collocated"
    panel.start()
    assert [mode for _, mode in panel.mode.options] == ["disaggregated", "adaptive"] and panel.mode.value == "adaptive"
    until(lambda: drawn(panel, "disaggregated"), "the new cluster does not serve")
    assert str(panel.driver.cluster.topology) == "P:cpu D:cpu" and "next Start" not in panel.message.value
    steps = panel.driver.call(lambda cluster: cluster.history())["P0"].steps
    assert steps and max(sum(row.num_new for row in step.rows) for step in steps) <= 128


def test_shutdown_ends_both_threads_and_gives_the_memory_back(panel):
    panel.start()
    until(lambda: drawn(panel), "nothing was drawn")
    cache = weakref.ref(panel.driver.cluster.workers["C0"].cache)
    panel.shutdown()
    gc.collect()
    assert cache() is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nanopd-")]


def test_decisions_of_the_router_can_be_looked_at_while_it_serves(panel):
    panel.mode.value = "adaptive"
    panel.start()
    until(lambda: drawn(panel) and drawn(panel, "disaggregated"), "round-robin takes both ways")
    until(lambda: len(panel.explanations()) >= 2, "nothing has ended")
    one = panel.explanations()[0]
    assert panel.driver.running and one.measured.e2e > 0 and one.measured.path in ("C0", "P0 -> D0")


def test_a_failed_start_is_shown_and_the_buttons_live(panel):
    panel.driver.make_cluster = lambda: 1 / 0
    panel.start()
    until(lambda: not panel.start_button.disabled, "Start stays dead")
    assert "ZeroDivisionError" in panel.message.value


def test_modes_are_those_that_the_topology_has_workers_for():
    assert modes_of("C:cpu") == ["collocated", "adaptive"]
    assert modes_of("C:0 P:1 D:2") == ["collocated", "disaggregated", "adaptive"]
