"""Chapter 07's checks tell right from wrong, and its suspects have the faults that they are said to have."""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
from benchmark.load.runs import record_of

from nanopd.benchmark.load import ClientRecord, Load, load_metrics, poisson_schedule, workload
from nanopd.benchmark.load.run import RunSettings
from nanopd.config import SLO
from nanopd.core import TokenEvent
from nanopd.metrics import meets, quantile
from nanopd.widgets.strings import set_language
from nanopd.workbook import loads
from nanopd.workbook.check import check


@pytest.fixture(autouse=True, params=["en", "zh"])
def language(request, monkeypatch):
    monkeypatch.delenv("NANOPD_STRICT_CHECKS", raising=False)
    set_language(request.param)
    yield request.param
    set_language(None)


def failed_checks(result) -> list[str]:
    assert not result and result.hint
    return [failure.check for failure in result.failures]


# ----------------------------------------------------------------------------------------- 07.1, the client's loop


def open_loop(due, server, most_open=10**9, ahead=0.0, from_when_sent=False):
    ended, sent, sent_at = {}, 0, []
    while len(ended) < len(due):
        while sent < len(due) and due[sent] <= server.now + ahead and sent - len(ended) < most_open:
            server.send(sent)
            sent_at.append(server.now)
            sent += 1
        may_send = sent < len(due) and sent - len(ended) < most_open
        ended |= dict(server.wait(due[sent] - ahead if may_send else float("inf")))
    return [ended[number] - (sent_at if from_when_sent else due)[number] for number in range(len(due))]


def test_an_open_loop():
    assert check("07.1", open_loop)


@pytest.mark.parametrize(("fault", "failed"), [
    (dict(most_open=1), "check_each_is_sent_when_it_is_due"),
    (dict(most_open=4), "check_each_is_sent_when_it_is_due"),
    (dict(ahead=1e9), "check_each_is_sent_when_it_is_due"),
    (dict(from_when_sent=True), "check_the_clock_starts_when_it_is_due"),
], ids=["one at a time", "four at a time", "all at once", "clock from sending"])
def test_another_loop_is_told_what_is_wrong(fault, failed):
    assert failed_checks(check("07.1", lambda due, server: open_loop(due, server, **fault)))[0] == failed


def test_one_at_a_time_with_its_own_clock_is_caught_twice():
    theirs = lambda due, server: open_loop(due, server, most_open=1, from_when_sent=True)  # noqa: E731
    assert len(failed_checks(check("07.1", theirs))) == 2


@pytest.mark.parametrize("theirs", [
    lambda due, server: open_loop(due[:-1], server),
    lambda due, server: [server.send(0)] * 2,
    lambda due, server: server.wait(float("inf")),
    lambda due, server: [server.now for _ in iter(lambda: server.now, None)],
], ids=["last one forgotten", "sent twice", "waits for nothing", "never ends"])
def test_a_loop_that_comes_to_nothing_is_told_so(theirs):
    assert failed_checks(check("07.1", theirs))


# ----------------------------------------------------------------------------------------- 07.6, goodput


def good(load, slo, seconds, records=lambda load: load.counted, of=lambda load: load.counted, over=None):
    met = sum(record.status == "completed" and meets(record, slo) for record in records(load))
    return met / len(of(load)), met / (over(load) if over else seconds)


def answered(load):
    return [record for record in load.counted if record.status == "completed"]


def test_goodput():
    assert check("07.6", good)


@pytest.mark.parametrize("fault", [
    dict(of=answered), dict(records=lambda load: load.records), dict(of=lambda load: load.records),
    dict(over=lambda load: load.end - load.begin),
], ids=["refused left out", "warm-up counted", "warm-up below the line", "over the window"])
def test_another_goodput_is_told_what_is_wrong(fault):
    assert "check_good_is_what_the_load_metrics_say" in failed_checks(check("07.6", lambda *given: good(*given, **fault)))


def test_whoever_asks_a_refused_request_for_its_times_is_told():
    def careless(load, slo, seconds):
        met = sum(meets(record, slo) for record in load.counted)
        return met / len(load.counted), met / seconds

    assert "check_who_was_refused_has_not_been_served" in failed_checks(check("07.6", careless))


# ----------------------------------------------------------------------------------------- 07.7, how sure


def interval(values, share, draws=1000, seed=0, pick=None, ends=(0.025, 0.975), of=quantile):
    draw = random.Random(seed)
    pick = pick or (lambda draw, values: draw.choices(values, k=len(values)))
    found = sorted(of(pick(draw, values), share) for _ in range(draws))
    return quantile(found, ends[0]), quantile(found, ends[1])


def test_a_bootstrap():
    assert check("07.7", interval)


@pytest.mark.parametrize("fault", [
    dict(pick=lambda draw, values: draw.sample(values, len(values))),
    dict(pick=lambda draw, values: draw.choices(values, k=len(values) // 10)),
    dict(ends=(0.16, 0.84)), dict(ends=(0.0, 1.0)), dict(of=lambda values, share: sum(values) / len(values)),
], ids=["without replacement", "fewer values", "one sigma", "all of them", "the mean"])
def test_another_interval_is_told_what_is_wrong(fault):
    failed = failed_checks(check("07.7", lambda *given, **named: interval(*given, **named, **fault)))
    assert "check_its_ends_are_as_wide_as_the_quantile_is_unsure" in failed


def test_who_forgets_the_seed_is_told():
    theirs = lambda values, share, draws=1000, seed=0: interval(values, share, draws, random.random())  # noqa: E731
    assert failed_checks(check("07.7", theirs)) == ["check_more_values_make_it_narrower"]


# ----------------------------------------------------------------------------------------- 07.8, reading a sweep


def winners(sweep, rates=set.intersection, beats=lambda one, other: one[0] > other[1], order=sorted):
    found = {}
    for rate in order(rates(*(set(curve) for curve in sweep.values()))):
        curves = {mode: curve[rate] for mode, curve in sweep.items() if rate in curve}
        sure = [mode for mode, one in curves.items()
                if all(beats(one, other) for name, other in curves.items() if name != mode)]
        found[rate] = sure[0] if sure else None
    return found


def test_a_sweep_that_is_read_rightly():
    assert check("07.8", winners)


@pytest.mark.parametrize("fault", [
    dict(rates=set.union), dict(beats=lambda one, other: sum(one) > sum(other)), dict(beats=lambda one, other: one[0] > other[0]),
    dict(beats=lambda one, other: one[0] >= other[1]), dict(order=lambda rates: sorted(rates, reverse=True)),
], ids=["rates of some", "midpoints", "low ends", "touching", "from the top"])
def test_a_sweep_misread_is_told(fault):
    assert "check_the_best_mode_is_sure" in failed_checks(check("07.8", lambda sweep: winners(sweep, **fault)))


# ----------------------------------------------------------------------------------------- 07.9, the suspects


def honest(seed=5) -> Load:
    """Of twenty seconds, five to warm up; the queue grows, and some are refused."""
    rng, records = random.Random(seed), []
    for number in range(200):
        arrival = number / 10
        record = ClientRecord(arrival, 60, 4, counts=arrival >= 5, sent=arrival)
        if arrival > 8 and rng.random() < 0.3:
            record.end(arrival, "dropped")
        else:
            first = arrival + 0.1 * arrival
            record.tokens = [first, first + 0.05]
            record.end(first + 0.05, "completed")
        records.append(record)
    return Load(records, 5.0, 20.0)


@pytest.mark.parametrize("tamper", [loads.answered_only, loads.from_the_start])
def test_what_is_left_out_or_let_in_makes_it_look_better(tamper):
    load, slo = honest(), SLO(1.0, 1.0)
    before = [replace(record) for record in load.records]
    true, told = load_metrics(load, slo, bootstrap=0), load_metrics(tamper(load), slo, bootstrap=0)
    assert told["attainment"] > true["attainment"] > 0
    assert load.records == before, "the honest load stays as it was"


def test_a_load_in_parts():
    load = Load([ClientRecord(float(number), 1, 1, sent=float(number), status="completed", tokens=[number + 1.0 + (number >= 4)])
                 for number in range(8)], 0.0, 8.0)
    load.records[7].status = "dropped"
    assert loads.in_parts(load, 2) == pytest.approx([1.0, 2.0])
    load.records[7].tokens = []
    assert loads.in_parts(Load(load.records[:2] + load.records[7:], 0.0, 8.0), 4) == [1.0, None, None, None]


class Immediate:
    """A cluster that answers one request at each step, and knows how many were open at most."""

    def __init__(self) -> None:
        self.open, self.most_open, self.number = [], 0, 0

    def submit(self, prompt, params):
        self.number += 1
        self.open.append(str(self.number))
        self.most_open = max(self.most_open, len(self.open))
        return SimpleNamespace(request_id=str(self.number))

    def step(self, timeout):
        ended, self.open = self.open[:1], self.open[1:]
        return [TokenEvent(name, token_id=7, finish_reason="length") for name in ended]


def test_who_holds_back_never_has_many_open_and_moves_what_is_due():
    schedule = poisson_schedule(1e6, workload("10/1"), window=4e-5)  # all due at once
    cluster = Immediate()
    load = loads.hold_back(cluster, schedule)
    assert cluster.most_open == loads.PATIENT and all(record.status == "completed" for record in load.records)
    assert all(record.lateness == 0 and record.arrival >= one.time for record, one in zip(load.records, schedule.arrivals))


def test_a_worker_is_held_and_goes_on():
    with subprocess.Popen(["sleep", "60"]) as worker:
        loads.hold(SimpleNamespace(status=lambda: {"C0": SimpleNamespace(pid=worker.pid)}), after=0.0, seconds=0.2)
        assert os.WIFSTOPPED(os.waitpid(worker.pid, os.WUNTRACED)[1])
        assert os.WIFCONTINUED(os.waitpid(worker.pid, os.WCONTINUED)[1])
        worker.kill()


def test_simulated_requests_are_those_that_count():
    schedule = poisson_schedule(10, workload("64-256/8"), window=2.0, warmup=1.0, tail=1.0)
    served = loads.simulate(schedule, {"P": 1, "D": 1}, "disaggregated")
    assert [one.arrival for one in served] == [one.time for one in schedule.arrivals if 1.0 <= one.time < 3.0]
    assert {one.mode for one in served} == {"disaggregated"} and all(one.num_tokens == 8 for one in served)


# ----------------------------------------------------------------------------------------- 07.8, what was recorded


def save_cell(folder, mode, topology, workload, rate, seed=0, ttft=0.1):
    settings = RunSettings(model="made up", topology=topology, mode=mode, workload=workload, rate=rate, seed=seed, window=5.0,
                           slo_ttft_ms=500.0, slo_tpot_ms=20.0)
    record_of(settings, ttft=ttft).save(folder / f"{mode}-{topology.replace(':', '')}-{workload.replace('/', '-')}-{rate}-{seed}.json")


def test_a_recorded_sweep_is_of_a_gpu_and_of_long_prompts(tmp_path):
    for device in ("cpu", "made-up-gpu"):
        for name in ("short", "long", "1900-2000/9"):
            save_cell(tmp_path / device / "sweep", "collocated", "C:0 C:1", name, 4.0, ttft=0.9 if device == "cpu" else 0.1)
    (tmp_path / "made-up-gpu" / "sweep" / "profile.json").write_text("{}")
    sweep = loads.recorded_sweep(tmp_path)
    (cell,) = sweep.cells
    assert sweep.origin == "recorded" and sweep.slo == SLO(0.5, 0.02) and cell.latency("ttft", 0.5) < 0.5
    assert sweep.device.endswith(", long") and "Made-up GPU" in sweep.device and "abc1234" in sweep.device


def test_without_the_workload_the_longest_prompts_are_taken(tmp_path):
    for name in ("300-400/9", "900-950/9", "50/9"):
        save_cell(tmp_path / "cpu" / "sweep", "collocated", "C:0 C:1", name, 4.0)
    assert loads.recorded_sweep(tmp_path).device.endswith(", 900-950/9")


def test_modes_have_as_many_gpus_seeds_are_pooled_and_a_mode_is_one_line(tmp_path):
    folder = tmp_path / "made-up-gpu" / "sweep"
    for topology, mode in (("C:0", "collocated"), ("C:0 C:1", "collocated"), ("P:0 D:1", "disaggregated"), ("C:0 P:1 D:1", "adaptive"),
                           ("C:0 C:1", "adaptive"), ("C:0 C:1 C:2 C:3", "collocated")):
        for rate in (2.0, 4.0):
            for seed in (0, 1):
                save_cell(folder, mode, topology, "long", rate, seed)
    sweep = loads.recorded_sweep(tmp_path)
    assert [(cell.line, cell.rate) for cell in sweep.cells] == [
        (mode, rate) for mode in ("collocated", "disaggregated", "adaptive") for rate in (2.0, 4.0)]
    schedules = [RunSettings(workload="long", rate=4.0, seed=seed, window=5.0).schedule(10**6) for seed in (0, 1)]
    assert len(sweep.cells[1].requests) == sum(record.counts for schedule in schedules for record in schedule.records())


def test_where_nothing_was_recorded_there_is_none(tmp_path):
    assert loads.recorded_sweep(tmp_path) is None


def test_what_comes_with_the_package_has_the_three_modes():
    sweep = loads.recorded_sweep()
    assert {cell.line for cell in sweep.cells} == {"collocated", "disaggregated", "adaptive"}
    assert all(cell.goodput(sweep.slo) >= 0 and cell.requests for cell in sweep.cells)
