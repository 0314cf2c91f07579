"""The load is served in its own thread, changes while it runs, stops when told, and gives its memory back."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from statistics import fmean

import pytest

from nanopd import Cluster
from nanopd.widgets.live_load import LENGTHS, Load, LoadDriver

SECONDS = 60  # for a machine that has much else to do


def small() -> Cluster:
    return Cluster("tiny", "C:cpu P:cpu D:cpu", "collocated", dtype="float32", num_gpu_blocks_override=512)


@pytest.fixture
def driver():
    driver = LoadDriver(small, Load(rate=20, mix="short", output_tokens=4))
    yield driver
    driver.shutdown()


def until(condition, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def finished(driver):
    return [seen for seen in driver.picture().requests if seen.finish is not None]


def test_requests_come_are_sent_and_end(driver):
    driver.start()
    until(lambda: len(finished(driver)) >= 5, "nothing was served")
    driver.stop()
    assert driver.error is None
    low, high = LENGTHS["short"]
    for seen in finished(driver):
        assert low // 4 <= seen.prompt_len <= high // 4 and seen.error is None and seen.num_tokens >= 1
        assert 0 <= seen.arrival <= seen.first_token <= seen.finish and seen.sent is not None
        assert (seen.mode, seen.path) == ("collocated", "C0")


def test_only_its_own_thread_touches_the_cluster(driver):
    driver.start()
    until(lambda: driver.serving, "it did not start")
    assert driver.call(lambda cluster: threading.current_thread().name) == "nanopd-load"
    with pytest.raises(ZeroDivisionError):
        driver.call(lambda cluster: 1 / 0)
    assert driver.running, "what a question raises is the asker's"


def test_changes_take_effect_while_it_runs(driver):
    driver.start()
    until(lambda: finished(driver), "nothing was served")
    driver.change(mode="disaggregated", mix="long", rate=2)
    until(lambda: any(seen.mode == "disaggregated" for seen in driver.picture().requests), "the mode did not change")
    longest = max(seen.prompt_len for seen in driver.picture().requests)
    assert longest >= LENGTHS["long"][0] // 4
    driver.change(rate=0)
    until(lambda: driver.picture().num_open == 0, "the queue did not empty")
    before = len(driver.picture().requests)
    time.sleep(0.3)
    assert len(driver.picture().requests) == before and driver.running


def test_an_answers_length_is_a_chance_with_the_mean_that_was_asked_for(driver):
    driver.change(output_tokens=8)
    driver.start()
    until(lambda: len(driver.picture().requests) >= 120, "too few requests")
    driver.change(rate=0)
    until(lambda: driver.picture().num_open == 0, "they do not end")  # the first to end are the short ones
    lengths = [seen.num_tokens for seen in finished(driver)]
    assert 5.5 < fmean(lengths) < 11 and min(lengths) < 4 and max(lengths) > 14


def test_stop_ends_what_is_open_and_start_begins_anew(driver):
    driver.change(output_tokens=400)
    driver.start()
    until(lambda: driver.picture().num_open >= 3, "nothing is open")
    driver.stop()
    assert not driver.running and driver.error is None and not driver.cluster.has_work
    assert all(status.num_running == 0 for status in driver.cluster.status().values())
    elapsed = driver.picture().elapsed
    cluster = driver.cluster
    time.sleep(0.05)
    assert driver.picture().elapsed == elapsed, "its clock has stopped"
    driver.change(output_tokens=4)
    driver.start()
    with pytest.raises(RuntimeError, match="is running"):
        driver.start()
    until(lambda: finished(driver), "nothing was served")
    assert driver.cluster is cluster


def test_samples_count_the_queue_and_the_tokens(driver):
    driver.start()
    until(lambda: len(driver.picture().samples) >= 3 and finished(driver), "no samples")
    driver.stop()
    picture = driver.picture()
    times = [sample.time for sample in picture.samples]
    assert times == sorted(times)
    counted = sum(sample.rate * (sample.time - before) for before, sample in zip([0.0, *times], picture.samples))
    drawn = sum(seen.num_tokens for seen in picture.requests)
    assert 0 < counted <= drawn + 0.5
    assert all(0 <= sample.queue <= len(picture.requests) for sample in picture.samples)


def test_shutdown_gives_the_memory_back(driver):
    driver.start()
    until(lambda: finished(driver), "nothing was served")
    cache = weakref.ref(driver.cluster.workers["C0"].cache)
    weights = weakref.ref(driver.cluster.workers["C0"].engine.runner)
    driver.shutdown()
    gc.collect()
    assert cache() is None and weights() is None and not driver.running
    driver.start()
    until(lambda: finished(driver), "a new cluster did not start")


def test_what_ends_a_run_can_be_read():
    def fails():
        raise MemoryError("too large")

    driver = LoadDriver(fails)
    driver.start()
    until(lambda: not driver.running, "it runs on")
    assert isinstance(driver.error, MemoryError)
    with pytest.raises(RuntimeError, match="start the load first"):
        driver.call(lambda cluster: None)
    driver.shutdown()


@pytest.mark.parametrize(("fields", "said"), [
    (dict(rate=-1), "rate"), (dict(rate=float("nan")), "rate"), (dict(mix="huge"), "short, long, mixed"),
    (dict(output_tokens=1), "at least 2"), (dict(mode="best"), "modes are"),
])
def test_an_impossible_load_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Load(**fields)
