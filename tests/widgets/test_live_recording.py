"""A recording holds what was to be seen, fits into the package, and shows of each moment what was to be seen then."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from nanopd.benchmark.results import RECORDED
from nanopd.widgets.live_load import Course, Load, Picture, Sample, Seen
from nanopd.widgets.live_recording import Recording, recordings

SMALL = 200_000  # bytes
GPU = {"kind": "cuda", "name": "Made-up GPU", "cpu": "made up"}
EXPECTED = {"collocated": (0.5, 0.1), "disaggregated": (0.7, 0.0)}
SEEN = [Seen("7", 40, 1.0, 1.1, "collocated", "C0", 1.25, 2.25, 11, None, EXPECTED),
        Seen("8", 200, 1.5, 1.6, "disaggregated", "P0 -> D0", 3.0, 9.0, 7),
        Seen("9", 50, 3.0, 3.5, "disaggregated", "P0 -> D0", 3.6, 3.6, 1, "it was lost"),
        Seen("10", 60, 7.123456789)]


def recorded(device=GPU, seconds=10.0, mode="adaptive", **others) -> Recording:
    picture = Picture(seconds, list(reversed(SEEN)), [Sample(0.5, 2, 10.0), Sample(4.0, 1, 30.0)], 1, 3, 2)
    loads = [(0.0, Load(2, "mixed", 16, mode)), (4.0, Load(8, "long", 16, mode)), (8.0, Load(1, "mixed", 16, mode))]
    driver = SimpleNamespace(picture=lambda: picture, course=lambda: Course(loads, [5.0, 6.0]),
                             cluster=SimpleNamespace(model="tiny", topology="C:0 P:0 D:0"))
    return Recording.of(driver, device=device, versions={}, commit="abc1234def", dirty=False, date="2026-01-02T03:04:05+00:00",
                        command="nanopd bench record", **others)


def test_a_file_gives_back_what_was_recorded(tmp_path):
    recording = recorded()
    recording.save(tmp_path / "one.json")
    again = Recording.load(tmp_path / "one.json")
    assert again == recording and again.source == "Made-up GPU, 2026-01-02, commit abc1234" and again.modes == ["adaptive"]
    seen = again.picture(10.0).requests
    assert [one.request_id for one in seen] == ["7", "8", "9", "10"], "they are in the order of their arrival"
    assert seen[0] == SEEN[0] or seen[0].expected == {way: list(costs) for way, costs in EXPECTED.items()}
    assert seen[3].arrival == 7.12346


@pytest.mark.parametrize("now", [0.0, 1.0, 1.15, 1.25, 2.0, 2.25, 3.0, 3.55, 4.0, 7.2, 9.0, 10.0, 99.0])
def test_of_what_comes_later_nothing_is_to_be_seen(now):
    picture = recorded().picture(now)
    assert picture.elapsed == min(now, 10.0)
    assert [one.request_id for one in picture.requests] == [one.request_id for one in SEEN if one.arrival <= now]
    for one, whole in zip(picture.requests, SEEN):
        for moment in ("sent", "first_token", "finish"):
            truth = getattr(whole, moment)
            assert getattr(one, moment) == (truth if truth is not None and truth <= now else None)
        assert (one.mode is None) == (one.sent is None) and (one.finish is not None or (not one.path and one.error is None))
        assert one.tpot == (whole.tpot if one.finish else None)
    assert picture.num_finished == sum(one.finish is not None and one.finish <= now for one in SEEN)
    assert picture.num_open == len(picture.requests) - picture.num_finished
    assert [sample.time for sample in picture.samples] == [time for time in (0.5, 4.0) if time <= now]
    assert picture.num_turned_away == sum(time <= now for time in (5.0, 6.0))


@pytest.mark.parametrize(("now", "rate", "mix"), [(0.0, 2, "mixed"), (3.9, 2, "mixed"), (4.0, 8, "long"), (10.0, 1, "mixed")])
def test_the_load_is_that_of_the_moment(now, rate, mix):
    load = recorded().load_at(now)
    assert (load.rate, load.mix, load.mode) == (rate, mix, "adaptive")


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 1, "requests": {}}', json.dumps({"schema": 0, "samples": {}})])
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is no recording of a live run.*nanopd bench record"):
        Recording.load(tmp_path / "other.json")


def test_gpus_come_first_and_a_device_has_its_own(tmp_path):
    for slug, device in (("a-cpu", {"kind": "cpu", "name": "cpu"}), ("made-up-gpu", GPU)):
        recorded(device).save(tmp_path / slug / "live" / "adaptive.json")
    assert [run.device["kind"] for run in recordings(folder=tmp_path)] == ["cuda", "cpu"]
    assert [run.device["name"] for run in recordings("up gpu", tmp_path)] == ["Made-up GPU"]
    assert recordings("h200", tmp_path) == []


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*/live/*.json")), ids=lambda path: f"{path.parents[1].name}/{path.stem}")
def test_what_comes_with_the_package(path):
    run = Recording.load(path)
    assert path.stat().st_size < SMALL, "too large for the wheel"
    assert run.modes == [path.stem] and run.device["name"] and run.commit and run.command.startswith("nanopd bench record")
    seen = run.picture(run.seconds).requests
    ended = [one for one in seen if one.finish is not None]
    assert ended and all(one.arrival <= one.sent <= one.first_token <= one.finish for one in ended if one.error is None)
    queues = run.samples["queue"]
    assert max(queues) >= 5 * max(1, queues[2]), "the load never rose past what was served"
    assert max(run.loads["rate"]) > run.loads["rate"][-1]


def test_each_mode_of_a_device_was_sent_the_same():
    runs = recordings("cpu")
    assert [run.modes for run in runs] == [["adaptive"], ["collocated"], ["disaggregated"]]
    for lengths in zip(*(run.requests["prompt_len"] for run in runs)):
        assert len(set(lengths)) == 1
    ended = [{place: tokens for place, (tokens, finish) in enumerate(zip(run.requests["num_tokens"], run.requests["finish"])) if finish}
             for run in runs]
    assert all(len({tokens[place] for tokens in ended if place in tokens}) == 1 for place in range(len(runs[0].requests["finish"])
               ) if any(place in tokens for tokens in ended)), "answers differ in length"
