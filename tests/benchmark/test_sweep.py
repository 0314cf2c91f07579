"""A sweep: what its cells are, and that each is done once, whatever comes between. Cells of most tests are made up; two tests
serve the embedded model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark.load.runs import record_of

from nanopd.benchmark import sweep
from nanopd.benchmark.load.run import RunRecord, RunSettings
from nanopd.benchmark.sweep import CASES, PROFILE, Grid, Known, Pace, Store, default_topology, plan, run, way
from nanopd.config import ConfigError, Topology
from nanopd.cost_model.presets import preset
from nanopd.router.planner import Planner

ROOT = Path(__file__).parents[2]
PRESET = "nvidia-h200/qwen3-8b"
BASE = replace(CASES["cuda"].base, window=4.0)
KNOWN = Known.of(PRESET)


def grid(**others):
    options = dict(base=BASE, gpus=2, modes=sweep.MODES, workloads=("short", "mixed"), rates=(2.0, 4.0), seeds=(0, 1))
    return Grid(**options | others)


# --------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(("gpus", "device", "topologies"), [
    (1, "cuda", ["C:0", "P:0 D:0", "C:0 P:0 D:0"]),
    (2, "cuda", ["C:0 C:1", "P:0 D:1", "C:0 C:1"]),
    (4, "cuda", ["C:0 C:1 C:2 C:3", "P:0 P:1 D:2 D:3", "C:0 C:1 C:2 C:3"]),
    (2, "cpu", ["C:cpu C:cpu", "P:cpu D:cpu", "C:cpu C:cpu"]),
])
def test_every_mode_has_as_many_gpus_and_as_much_cache_on_each(gpus, device, topologies):
    assert [default_topology(mode, gpus, device) for mode in sweep.MODES] == topologies
    cells = plan(grid(gpus=gpus, device=device), KNOWN)
    for cell in cells:
        assert cell.kv_blocks * len(Topology.parse(cell.topology).placements) == BASE.kv_blocks * gpus


def test_a_mode_may_name_its_topology():
    cells = plan(grid(gpus=4, modes=("adaptive=C:0 P:1 P:3 D:2", "disaggregated=P:0 D:1 D:2 D:3")), KNOWN)
    assert list(dict.fromkeys(map(way, cells))) == [("adaptive", "C:0 P:1 P:3 D:2"), ("disaggregated", "P:0 D:1 D:2 D:3")]


@pytest.mark.parametrize(("modes", "says"), [
    (("collocated=C:0",), "uses 1, the sweep has 2"), (("disaggregated=C:0 C:1",), "needs workers of role"),
    (("both",), "MODE=TOPOLOGY")])
def test_modes_that_can_not_be_compared_are_refused(modes, says):
    with pytest.raises(ConfigError, match=says):
        plan(grid(modes=modes), KNOWN)


def test_the_same_seed_gives_the_same_arrivals_in_every_mode():
    arrivals = {}
    for cell in plan(grid(), KNOWN):
        arrivals.setdefault((cell.workload, cell.rate, cell.seed), []).append(cell.schedule(cell.max_model_len).arrivals)
    assert len(arrivals) == 8
    for modes in arrivals.values():
        assert len(modes) == 3 and len(modes[0]) > 3 and modes[0] == modes[1] == modes[2]
    assert arrivals["mixed", 4.0, 0][0] != arrivals["mixed", 4.0, 1][0]


def test_rates_are_shares_of_what_the_best_way_serves_in_time():
    cells = plan(grid(rates=(), shares=(0.5, 1.5), workloads=("mixed",), seeds=(0,)), KNOWN)
    mix = sweep.mix_of(replace(BASE, workload="mixed"))
    best = max(rate for _, rate in Planner(preset(PRESET).cost, grid().size, BASE.slo).rank(2, mix))
    assert sorted({cell.rate for cell in cells}) == pytest.approx([0.5 * best, 1.5 * best], rel=5e-3)


def test_what_needs_a_profile_says_so():
    with pytest.raises(ConfigError, match="shares of a capacity need a profile"):
        plan(grid(rates=(), shares=(0.5,), modes=("collocated",)), None)
    with pytest.raises(ConfigError, match="adaptive mode needs a profile"):
        plan(grid(), None)
    with pytest.raises(ConfigError, match="at no rate; loosen the SLO"):
        plan(grid(rates=(), shares=(0.5,), base=replace(BASE, slo_ttft_ms=0.01)), KNOWN)


def test_requests_that_are_too_long_are_found_before_anything_starts():
    with pytest.raises(ConfigError, match="raise max_model_len"):
        plan(grid(workloads=("long",), base=replace(BASE, max_model_len=512)), KNOWN)


# ------------------------------------------------------------------------------------------------------- the folder


def test_a_cell_whose_settings_changed_is_another_cell(tmp_path):
    store, cell = Store(tmp_path), RunSettings(rate=3.0)
    store.save(cell, record_of(cell))
    assert store.has(cell)
    for name, value in (("slo_ttft_ms", 200.0), ("window", 9.0), ("model", "qwen3-8b"), ("kv_blocks", 7),
                        ("profile", "another"), ("rate", 3.01)):
        assert not store.has(replace(cell, **{name: value})), name


def test_a_file_under_a_false_name_is_not_taken_for_the_cell(tmp_path):
    store, cell = Store(tmp_path), RunSettings(rate=3.0)
    record_of(replace(cell, rate=4.0)).save(store.path(cell))
    with pytest.raises(ValueError, match="not the cell that its name says"):
        store.has(cell)


def test_what_was_not_written_whole_is_not_done(tmp_path):
    store, cell = Store(tmp_path), RunSettings(rate=3.0)
    store.path(cell).with_suffix(".part").write_text('{"settings": {')
    assert not store.has(cell)


# ---------------------------------------------------------------------------------------------------------- the run


class Machine:
    """Clusters that serve at once. `trouble(cell)` may raise, or return the workers that were lost."""

    def __init__(self, monkeypatch, trouble=lambda cell: ()):
        self.opened, self.served, self.routers, self.trouble = [], [], [], trouble
        monkeypatch.setattr(sweep, "open_cluster", self.open)
        monkeypatch.setattr(sweep, "run_on_cluster", self.serve)

    def open(self, settings):
        self.opened.append(settings)
        workers = dict.fromkeys(Topology.parse(settings.topology).workers)
        return nullcontext(SimpleNamespace(topology=SimpleNamespace(workers=workers), status=lambda: workers, router=["new"]))

    def serve(self, cell, cluster):
        lost = self.trouble(cell)
        self.served.append(cell)
        self.routers.append(list(cluster.router))
        cluster.router.append("has learnt")
        cluster.status = lambda: {name: None for name in cluster.topology.workers if name not in lost}
        return record_of(cell)


def swept(cells, folder, **options):
    return run(cells, Store(folder), Pace(grid(), None, 1.0), KNOWN, **options)


def test_a_cluster_serves_all_cells_of_its_topology_and_mode(monkeypatch, tmp_path):
    machine, cells = Machine(monkeypatch), plan(grid(), KNOWN)
    tally = swept(cells, tmp_path)
    assert tally.exit_code == 0 and tally.done == len(cells) == 24
    assert machine.served == cells
    assert [opened.mode for opened in machine.opened] == list(sweep.MODES)
    assert all(opened.seed == 0 for opened in machine.opened)
    assert machine.opened[2].profile == str(KNOWN.path) and cells[-1].profile.startswith(PRESET)
    assert [RunRecord.load(Store(tmp_path).path(cell)).settings for cell in cells] == [asdict(cell) for cell in cells]


def test_an_adaptive_cluster_begins_each_cell_as_if_it_had_just_started(monkeypatch, tmp_path):
    machine = Machine(monkeypatch)
    swept(plan(grid(modes=("adaptive",)), KNOWN), tmp_path)
    assert machine.routers == [["new"]] * 8


@pytest.mark.parametrize("lost", [False, True])
def test_a_cell_that_fails_is_recorded_and_the_sweep_goes_on(monkeypatch, tmp_path, lost, capsys):
    cells = plan(grid(), KNOWN)
    bad = cells[3]

    def trouble(cell):
        if cell == bad and not lost:
            raise RuntimeError("no more memory")
        return ["C1"] if cell == bad else ()

    machine = Machine(monkeypatch, trouble)
    tally = swept(cells, tmp_path)
    assert tally.exit_code == 1 and (tally.failed, tally.done) == (1, 23)
    assert len(machine.opened) == 4  # who knows what it has left behind
    said, = (json.loads(path.read_text()) for path in tmp_path.glob("*.failed"))
    assert said["settings"] == asdict(bad) and ("C1" if lost else "no more memory") in said["error"]
    assert "FAILED" in capsys.readouterr().err
    again = Machine(monkeypatch)  # all is well now
    assert swept(cells, tmp_path).exit_code == 0
    assert again.served == [bad] and not list(tmp_path.glob("*.failed"))


def test_a_cluster_that_does_not_start_fails_its_cells_alone(monkeypatch, tmp_path):
    machine = Machine(monkeypatch)
    opened = machine.open

    def open_it(settings):
        if settings.mode == "disaggregated":
            raise OSError("no such device")
        return opened(settings)

    monkeypatch.setattr(sweep, "open_cluster", open_it)
    tally = swept(plan(grid(), KNOWN), tmp_path)
    assert (tally.done, tally.failed) == (16, 8)


def test_no_cell_is_begun_that_would_not_fit_into_the_budget(monkeypatch, tmp_path):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(sweep, "time", clock)

    def takes_its_time(cell):
        clock.now += 11.0
        return ()

    machine, cells = Machine(monkeypatch, takes_its_time), plan(grid(modes=("collocated",)), KNOWN)
    tally = swept(cells, tmp_path, budget=50.0)
    assert len(machine.served) == 4 and clock.now <= 50.0
    assert tally.left == 4 and tally.exit_code == 3
    assert swept(cells, tmp_path).done == 4  # the rest


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, SystemExit])
def test_stopped_within_a_cell_it_is_not_recorded_and_done_later(monkeypatch, tmp_path, stopped):
    cells = plan(grid(modes=("collocated",)), KNOWN)

    def trouble(cell):
        if cell == cells[5]:
            raise stopped
        return ()

    Machine(monkeypatch, trouble)
    with pytest.raises(stopped):
        swept(cells, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    machine = Machine(monkeypatch)
    swept(cells, tmp_path)
    assert machine.served == cells[5:]


def test_estimates_follow_what_was_seen():
    pace, load = Pace(grid(), KNOWN, 40.0), replace(BASE, workload="mixed", rate=5.0)
    cell = grid().settings(load, "collocated", Topology.parse("C:0 C:1"))
    before = pace.cell(cell)
    assert before >= sweep.span(cell)
    pace.took(cell, 3 * before)
    assert pace.cell(cell) == pytest.approx(3 * before)
    assert pace.left([cell, cell]) == pytest.approx(40 + 6 * before)
    assert pace.cell(replace(cell, rate=500.0)) > 5 * pace.cell(cell)  # what queues up has to be served, too


# ------------------------------------------------------------------------------------------------- the embedded model

TINY = ["--device", "cpu", "--gpus", "1", "--executor", "inline", "--workloads", "8-16/4", "--window", "0.3", "--warmup", "0.1",
        "--rates", "15", "30", "--profile", PRESET]  # measuring would take its time; where requests go does not matter here


def begin(folder):
    command = [sys.executable, "-W", "ignore", "-m", "nanopd", "bench", "sweep", *TINY, "--out", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def cells_in(folder):
    return {path.name: RunRecord.load(path) for path in Path(folder).glob("*.json")}


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_a_sweep_resumes_with_what_is_missing(tmp_path, kills):
    """Over all runs: exactly the cells, each done once, and the same arrivals in every mode."""
    draw = random.Random(kills)
    written: dict[str, str] = {}  # by name: when it was written, which a cell done twice would change
    for _ in range(kills):
        process = begin(tmp_path)
        enough = len(cells_in(tmp_path)) + 1
        while process.poll() is None and len(list(tmp_path.glob("*.json"))) < enough:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for name, record in cells_in(tmp_path).items():
            assert written.setdefault(name, record.date) == record.date
    said, _ = begin(tmp_path).communicate(timeout=120)
    found = cells_in(tmp_path)
    assert len(found) == 6 and f"6 cells, {len(written)} done already" in said
    assert all(found[name].date == date for name, date in written.items())
    arrivals = {}
    for record in found.values():
        assert record.metrics["completed"] == len(record.requests["arrival"]) > 0
        arrivals.setdefault(record.settings["rate"], []).append((record.requests["arrival"], record.requests["prompt_len"]))
    assert all(len(modes) == 3 and modes[0] == modes[1] == modes[2] for modes in arrivals.values())
    assert {record.settings["mode"] for record in found.values()} == set(sweep.MODES)
    assert not (tmp_path / PROFILE).exists()  # it was given
