"""The load is served in its own thread, changes while it runs, stops when told, and gives its memory back."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from statistics import fmean
from types import SimpleNamespace

import pytest

from nanopd import Cluster
from nanopd.router.routing import Decision, Route, Score
from nanopd.router.timeline import Timeline
from nanopd.widgets.live_load import KEPT, LENGTHS, Load, LoadDriver, expected

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
        assert 0 <= seen.arrival <= seen.sent <= seen.first_token <= seen.finish
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


class Deaf:
    """A cluster that takes requests and does nothing."""

    limits, topology, mode, has_work = SimpleNamespace(vocab_size=500), SimpleNamespace(devices=["cpu"]), "collocated", False

    def __init__(self):
        self.sent = []

    def submit(self, prompt, sampling, mode):
        self.sent.append((prompt["prompt_token_ids"], sampling.seed))
        return SimpleNamespace(request_id=str(len(self.sent)))

    def timeline(self, request_id):
        return Timeline()

    def cancel(self, request_id):
        pass

    def shutdown(self):
        pass


def sent_by(driver, cluster, rates, number=30):
    """The first requests of a start, one rate after the other."""
    before = len(cluster.sent)
    driver.start()
    for rate in rates:
        driver.change(rate=rate)
        driver.wait(0.05)
    driver.change(rate=2000)
    until(lambda: len(cluster.sent) >= before + number, "too few requests")
    driver.stop()
    return cluster.sent[before: before + number]


def test_each_start_sends_the_same_requests_in_other_words_whatever_the_rates():
    cluster = Deaf()
    driver = LoadDriver(lambda: cluster, Load(rate=100))
    first, again, slower = (sent_by(driver, cluster, rates) for rates in ((100,), (100,), (30, 0, 60)))
    for other in (again, slower):
        assert [(len(prompt), seed) for prompt, seed in other] == [(len(prompt), seed) for prompt, seed in first]
        assert all(theirs != ours for (theirs, _), (ours, _) in zip(other, first)), "they would be in the prefix cache"
    assert len({seed for _, seed in first}) == len(first)
    driver.shutdown()


@pytest.mark.parametrize(("keep", "kept"), [({}, KEPT), ({"keep": None}, KEPT + 50), ({"keep": 7}, 7)])
def test_it_keeps_the_latest_or_all(keep, kept):
    cluster = Deaf()
    driver = LoadDriver(lambda: cluster, Load(rate=100), **keep)
    sent_by(driver, cluster, (), KEPT + 50)
    ids = [int(seen.request_id) for seen in driver.picture().requests]
    assert (len(ids) >= kept if keep == {"keep": None} else len(ids) == kept) and ids[-1] == len(cluster.sent)
    driver.shutdown()


def test_the_course_has_each_load_since_it_took_effect():
    cluster = Deaf()
    driver = LoadDriver(lambda: cluster, Load(rate=0))
    driver.start()
    until(lambda: driver.serving, "it did not start")
    driver.change(rate=5)
    driver.change(rate=5)
    driver.wait(0.2)
    driver.change(mix="long")
    until(lambda: len(driver.course().loads) == 3, "a change was not noted, or noted twice")
    driver.shutdown()
    loads = driver.course().loads
    assert [load for _, load in loads] == [Load(rate=0), Load(rate=5), Load(rate=5, mix="long")]
    assert [since for since, _ in loads] == sorted(since for since, _ in loads) and loads[2][0] - loads[1][0] >= 0.15


def test_what_a_router_expected_is_the_best_of_each_way():
    def score(route, e2e, others, objective):
        return Score(route, {"others": others}, 0.1, 0.01, e2e, objective)

    c0, c1, apart = Route.collocated("C0"), Route.collocated("C1"), Route("P0", "D0")
    scores = [score(c1, 0.5, 0.2, 0.7), score(apart, 0.8, 0.0, 0.8), score(c0, 0.6, 0.3, 0.9)]
    assert expected(Decision(c1, scores)) == {"collocated": (0.5, 0.2), "disaggregated": (0.8, 0.0)}
    assert expected(Decision(c1)) == {}


@pytest.mark.parametrize(("fields", "said"), [
    (dict(rate=-1), "rate"), (dict(rate=float("nan")), "rate"), (dict(mix="huge"), "short, long, mixed"),
    (dict(output_tokens=1), "at least 2"), (dict(mode="best"), "modes are"),
])
def test_an_impossible_load_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Load(**fields)
