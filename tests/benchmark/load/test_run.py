"""A run and its record."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from nanopd.benchmark.load import (
    ClientRecord,
    Load,
    RunRecord,
    RunSettings,
    load_metrics,
    open_cluster,
    run,
    run_on_cluster,
)
from nanopd.benchmark.load.prompts import prompts
from nanopd.benchmark.load.run import OF_CLUSTER, device_behind
from nanopd.config import SLO, ConfigError

SETTINGS = RunSettings(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=256, kv_blocks=256, workload="16-32/4", rate=10.0,
                       warmup=0.2, window=1.0, slo_ttft_ms=1000.0, slo_tpot_ms=100.0)
MOONCAKE = [{"timestamp": 500 * number, "input_length": 600, "output_length": 5, "hash_ids": [7, number]} for number in range(10)]


def a_load():
    done = ClientRecord(1.0, 10, 3, sent=1.0, ended=2.0, status="completed", mode="collocated", tokens=[1.25, 1.5, 2.0])
    return Load([replace(done, counts=False), done, ClientRecord(1.5, 20, 3, sent=1.5, ended=1.5, status="dropped", error="full")],
                begin=0.5, end=3.0)


# -------------------------------------------------------------------------------------------------- settings


def test_equal_settings_give_equal_schedules_in_every_mode():
    other = replace(SETTINGS, mode="disaggregated", topology="P:cpu D:cpu", kv_blocks=999)
    assert SETTINGS.schedule(256) == other.schedule(256) != replace(SETTINGS, seed=1).schedule(256)


def test_what_was_recorded_is_cut_and_what_was_asked_for_is_not():
    cut = replace(SETTINGS, workload="azure-code", rate=100.0).schedule(256)
    assert max(one.prompt_len + one.output_len for one in cut.arrivals) == 256 and 50 < cut.num_cut < len(cut.arrivals)
    with pytest.raises(ConfigError, match="tokens, and a worker takes up to 256: raise max_model_len"):
        replace(SETTINGS, workload="long").schedule(256)


def test_a_trace_is_replayed_as_fast_as_asked_and_keeps_its_prefixes(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in MOONCAKE))
    of_trace = replace(SETTINGS, trace=str(path), rate=None, speed_up=5.0, warmup=0.05, window=None)
    schedule = of_trace.schedule(700)
    assert [one.time for one in schedule.arrivals] == pytest.approx([0.1 * number for number in range(10)])
    assert [one.prefix for one in schedule.arrivals] == [(7, number) for number in range(10)] and schedule.num_cut == 0
    assert sum(record.counts for record in schedule.records()) == 9
    assert len(replace(of_trace, window=0.25).schedule(700).arrivals) == 3
    assert of_trace.schedule(100).num_cut == 10


def test_other_modes_have_the_same_prompts_and_other_loads_others(monkeypatch):
    """A cluster that has served one load would find it in its prefix caches when it serves the next."""
    firsts = []
    monkeypatch.setattr(run, "serve_cluster", lambda cluster, schedule, mode, seed, progress: firsts.append(
        prompts(schedule.arrivals, 10**6, seed)[0][:16].tobytes()) or a_load())
    cluster = SimpleNamespace(limits=SimpleNamespace(max_len=256), topology=SimpleNamespace(devices=["cpu"]))
    for changes in ({}, {"mode": "disaggregated", "topology": "P:cpu D:cpu"}, {"rate": 20.0}, {"seed": 1}, {"workload": "16-32/5"}):
        run_on_cluster(replace(SETTINGS, **changes), cluster)
    assert firsts[0] == firsts[1] and len(set(firsts)) == 4


@pytest.mark.parametrize("changes, says", [
    ({"rate": None}, "at a rate, for a window: set both"), ({"window": None}, "set both"), ({"rate": -1.0}, "rate is .* above 0"),
    ({"trace": "x.csv"}, "leave the rate out"), ({"trace": "x.csv", "rate": None}, "can't read the trace x.csv"),
    ({"workload": "huge"}, "unknown workload 'huge'"), ({"window": 0.01, "warmup": 0.0, "rate": 0.001}, "the workload is empty"),
])
def test_settings_that_can_not_be(changes, says):
    with pytest.raises(ConfigError, match=says):
        replace(SETTINGS, **changes).schedule(4096)


def test_an_slo_has_two_bounds():
    assert SETTINGS.slo == SLO(1.0, 0.1) and RunSettings().slo is None
    with pytest.raises(ConfigError, match="both, or none"):
        _ = RunSettings(slo_ttft_ms=5.0).slo


# ---------------------------------------------------------------------------------------------------- record


def test_a_record_has_the_figures_and_each_request_that_counts(tmp_path):
    record = RunRecord.of(SETTINGS, a_load(), {"kind": "cpu", "name": "cpu"}, num_cut=3)
    assert record.requests == {
        "arrival": [1.0, 1.5], "prompt_len": [10, 20], "output_len": [3, 0], "ttft": [0.25, None], "tpot": [0.375, None],
        "e2e": [1.0, None], "mode": ["collocated", ""], "status": ["completed", "dropped"]}
    assert record.metrics["attainment"] == load_metrics(a_load(), SETTINGS.slo)["attainment"] == 0
    assert (record.settings, record.num_cut) == (asdict(SETTINGS), 3)
    assert record.versions["nanopd"] and record.date and record.command
    path = tmp_path / "folder" / "run.json"
    record.save(path)
    assert RunRecord.load(path) == record
    assert [one.name for one in path.parent.iterdir()] == ["run.json"]


def test_of_an_endpoint_it_says_nothing_about_a_cluster():
    record = RunRecord.of(replace(SETTINGS, endpoint="http://far:8000"), a_load(), device_behind("http://far:8000"))
    assert {record.settings[name] for name in OF_CLUSTER} == {None}
    assert record.settings["endpoint"] == "http://far:8000" and record.device == {"kind": "remote", "name": "far"}
    assert device_behind("http://localhost:8000/v1")["cpu"]


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 0}', '{"bench": "decode", "schema": 7}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no record of a run with schema 1"):
        RunRecord.load(path)


# ------------------------------------------------------------------------------------------------- on a cluster


@pytest.mark.parametrize("mode, topology", [("collocated", "C:cpu"), ("disaggregated", "P:cpu D:cpu")])
def test_a_run_on_a_cluster(mode, topology):
    settings = replace(SETTINGS, mode=mode, topology=topology)
    with open_cluster(settings) as cluster:
        assert (cluster.limits.max_num_seqs, cluster.limits.max_len) == (8, 256)
        record = run_on_cluster(settings, cluster)
        assert not cluster.has_work
        with pytest.raises(ConfigError, match="takes up to 256"):
            run_on_cluster(replace(settings, workload="short/256"), cluster)
    schedule = settings.schedule(256)
    expected = [one for one in schedule.arrivals if 0.2 <= one.time < 1.2]
    assert record.requests["prompt_len"] == [one.prompt_len for one in expected]
    assert record.metrics["completed"] == len(expected) > 3 and record.metrics["total_output_tokens"] == 4 * len(expected)
    assert record.metrics["shares"] == {mode: 1.0} and record.device["kind"] == "cpu"
    assert 0 < record.metrics["median_ttft_ms"] <= record.metrics["p99_e2el_ms"]
