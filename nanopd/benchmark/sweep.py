"""`nanopd bench sweep`: the same loads in each mode on as many GPUs, one run after the other, each saved when it is over.

A cell is a `RunSettings`: a mode with its topology, a workload at a rate or a trace sped up to it, a seed. What its clients send
depends on these alone, so it is the same in every mode. Cells of a topology and mode share a cluster, for that takes long to start; an
adaptive one begins each cell as if it had just started. A finished cell is a file in the folder, named by its settings: begun
again after whatever ended it, a sweep does what is missing. No torch but to serve.

    cells = plan(Grid(gpus=2, device="cpu"), profile)
    run(cells, Store(Path("sweep")), ...)
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopd.benchmark.load.run import RunRecord, RunSettings, open_cluster, run_on_cluster
from nanopd.benchmark.load.workloads import workload
from nanopd.benchmark.results import slug, write_whole
from nanopd.benchmark.show import progress
from nanopd.benchmark.sweep_loads import as_recorded, at_rate, mix_of, name_of, rate_of, span, words
from nanopd.config import ConfigError, Topology
from nanopd.cost_model.presets import preset_names, preset_path
from nanopd.cost_model.profile import Profile
from nanopd.router.planner import Planner, Split, WorkerSize

if TYPE_CHECKING:
    from nanopd.cluster import Cluster

MODES = ("collocated", "disaggregated", "adaptive")
BLOCK_SIZE = 16
PROFILE = "profile.json"  # in the sweep's folder, where the machine had to be measured


@dataclass(frozen=True)
class Case:
    """What a kind of device is asked by default. `base.kv_blocks` is what each GPU has, shared by the workers on it."""

    base: RunSettings
    workloads: tuple[str, ...]
    shares: tuple[float, ...]
    requests: int  # of a trace
    start_seconds: float  # of a cluster, before one was started
    profile_seconds: float


CASES = {
    "cuda": Case(
        RunSettings(model="qwen3-8b", executor="process", dtype="bfloat16", load_format="dummy", max_num_seqs=256,
                    max_num_batched_tokens=2048, max_model_len=8192, kv_blocks=24_576, warmup=4.0, window=15.0, tail=2.0,
                    slo_ttft_ms=500.0, slo_tpot_ms=12.0),
        workloads=("short", "long", "mixed"), shares=(0.3, 0.6, 0.8, 0.9, 1.0, 1.2, 1.5), requests=300, start_seconds=40.0,
        profile_seconds=40.0),
    "cpu": Case(
        RunSettings(model="tiny", executor="process", max_num_seqs=16, max_num_batched_tokens=128, max_model_len=512, kv_blocks=512,
                    warmup=0.5, window=2.0, slo_ttft_ms=1000.0, slo_tpot_ms=100.0),
        workloads=("16-64/16", "128-320/16"), shares=(0.5, 1.0), requests=50, start_seconds=5.0, profile_seconds=6.0),
}


@dataclass(frozen=True)
class Grid:
    """What is to be swept. Modes are names, or MODE=TOPOLOGY; traces are files, each one more workload, of which so many requests are
    replayed at each rate. Without rates, shares of what the planner estimates that the best way to share out so many GPUs serves
    in time."""

    base: RunSettings
    gpus: int
    modes: tuple[str, ...]
    workloads: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    device: str = "cuda"
    traces: tuple[str, ...] = ()
    requests: int = 0

    def check(self) -> None:
        """Raises ConfigError where a mode, a workload or a trace can't be, before anything is measured."""
        self.ways()
        for name in self.workloads:
            workload(name)
        self.sources()

    def sources(self) -> list[RunSettings]:
        """The base with each workload and each trace, not at its rates yet."""
        return [*(replace(self.base, workload=name) for name in self.workloads),
                *(as_recorded(self.base, path, self.requests) for path in self.traces)]

    def ways(self) -> list[tuple[str, Topology]]:
        """Modes and topologies, as many GPUs in each. Raises ConfigError where they are not."""
        return [self._way(*text.partition("=")[::2]) for text in self.modes]

    def _way(self, mode: str, text: str) -> tuple[str, Topology]:
        topology = Topology.parse(text or default_topology(mode, self.gpus, self.device))
        topology.check_mode(mode)
        used = len(topology.placements) if self.device == "cpu" else len(topology.devices)
        if self.gpus > 1 and used != self.gpus:
            raise ConfigError(f"modes are compared on equal numbers of GPUs: '{topology}' uses {used}, the sweep has {self.gpus}")
        return mode, topology

    def settings(self, load: RunSettings, mode: str, topology: Topology, **others: Any) -> RunSettings:
        """A load in this mode. The KV cache of a GPU is shared out evenly among the workers on it."""
        blocks = self.base.kv_blocks and self.base.kv_blocks * self.gpus // len(topology.placements)
        return replace(load, mode=mode, topology=str(topology), kv_blocks=blocks, **others)

    @property
    def size(self) -> WorkerSize:
        """Of a worker that has a GPU for itself."""
        return WorkerSize(self.base.max_num_seqs, self.base.max_num_batched_tokens, BLOCK_SIZE * self.base.kv_blocks)


def default_topology(mode: str, gpus: int, device: str) -> str:
    """As many GPUs in each mode. Adaptive mode has collocated workers, which it gives parts as the load is; on one GPU, which two
    collocated workers would not use any better, one worker of each role."""
    names = ["cpu"] * gpus if device == "cpu" else [str(number) for number in range(gpus)]
    if gpus == 1:
        roles = {"collocated": "C", "disaggregated": "PD", "adaptive": "CPD"}
        names *= 3
    else:
        prompts = gpus // 2
        roles = {"collocated": "C" * gpus, "disaggregated": "P" * prompts + "D" * (gpus - prompts), "adaptive": "C" * gpus}
    if mode not in roles:
        raise ConfigError(f"unknown mode {mode!r}; modes are {', '.join(roles)}, or MODE=TOPOLOGY such as 'disaggregated=P:0 D:1'")
    return " ".join(f"{role}:{name}" for role, name in zip(roles[mode], names))


# -------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Known:
    """A profile, and by which name cells record it."""

    path: Path
    profile: Profile
    name: str

    @classmethod
    def of(cls, given: str) -> Known:
        """`given`: a preset's name, or a file. Raises CostModelError where it is neither."""
        path = preset_path(given) if given in preset_names() else Path(given)
        profile = Profile.load(path)
        return cls(path, profile, f"{given if given in preset_names() else path.name} of {profile.date}")


def plan(grid: Grid, known: Known | None) -> list[RunSettings]:
    """All cells, those of a topology and mode in a row. Raises ConfigError for settings that can't be, and where rates or adaptive
    mode need a profile and there is none."""
    loads = [at_rate(source, rate) for source in grid.sources() for rate in grid.rates or _rates(grid, source, known)]
    loads = [replace(load, seed=seed) for seed in grid.seeds for load in loads]
    for load in loads:
        if load.trace is None:  # whose requests are cut
            load.schedule(load.max_model_len)  # says so now where requests are too long
    cells = []
    for mode, topology in grid.ways():
        if mode == "adaptive" and known is None:
            raise ConfigError("adaptive mode needs a profile: give one, or leave it out")
        profile = known.name if mode == "adaptive" else None
        cells += [grid.settings(load, mode, topology, profile=profile) for load in loads]
    return cells


def _rates(grid: Grid, source: RunSettings, known: Known | None) -> list[float]:
    if known is None:
        raise ConfigError("shares of a capacity need a profile to estimate it by: give one, or rates")
    slo = grid.base.slo
    best = max(rate for _, rate in Planner(known.profile.cost, grid.size, slo).rank(grid.gpus, mix_of(source)))
    if not best:
        raise ConfigError(f"shares of nothing: by the profile, {name_of(source)!r} meets TTFT {slo.ttft:g} s and TPOT {slo.tpot:g} s at "
                          "no rate; loosen the SLO, or give rates")
    return [float(f"{share * best:.3g}") for share in grid.shares]


class Pace:
    """Estimates how long what is left takes: by the planner's throughput at first, then by what was seen."""

    def __init__(self, grid: Grid, known: Known | None, start_seconds: float) -> None:
        self._grid, self._cost = grid, known and known.profile.cost
        self.start_seconds = start_seconds
        self._slower = 1.0  # than estimated, lately

    def cell(self, cell: RunSettings) -> float:
        """Seconds of a cell: until its requests have come, and what is queued by then is answered."""
        return self._slower * self._estimate(cell)

    def _estimate(self, cell: RunSettings) -> float:
        if self._cost is None:
            return 1.1 * span(cell)
        planner = Planner(self._cost, self._grid.size)
        split = Split(**{role: sum(each.role == role for each in Topology.parse(cell.topology).placements) for role in "CPD"})
        capacity = max(planner.capacity(split, mix_of(cell)), 1e-3)
        return 1.0 + span(cell) * max(1.05, rate_of(cell) / capacity)

    def took(self, cell: RunSettings, seconds: float) -> None:
        self._slower = seconds / self._estimate(cell)

    def left(self, cells: Sequence[RunSettings]) -> float:
        """Seconds, the starts of clusters with them."""
        return sum(map(self.cell, cells)) + self.start_seconds * len(list(groupby(cells, way)))


def way(cell: RunSettings) -> tuple[str, str]:
    return cell.mode, cell.topology


# ----------------------------------------------------------------------------------------------------- the folder


class Store:
    """The cells that are done, a file each; of the ones that failed, why."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: RunSettings) -> Path:
        """Named by what one looks for, and by a hash of all settings: other settings are another cell."""
        settings = hashlib.sha256(json.dumps(asdict(cell), sort_keys=True).encode()).hexdigest()[:8]
        pace = f"x{cell.speed_up:g}" if cell.trace else f"{cell.rate:g}"
        parts = slug(cell.mode), slug(cell.topology), slug(name_of(cell)), pace, f"s{cell.seed}", settings
        return self.folder / f"{'_'.join(parts)}.json"

    def has(self, cell: RunSettings) -> bool:
        """Raises ValueError where a file of this name holds another cell."""
        path = self.path(cell)
        if not path.exists():
            return False
        if RunRecord.load(path).settings != asdict(cell):
            raise ValueError(f"{path} is not the cell that its name says: move it away")
        return True

    def save(self, cell: RunSettings, record: RunRecord) -> None:
        record.save(self.path(cell))
        self._failure(cell).unlink(missing_ok=True)

    def fail(self, cell: RunSettings, error: BaseException) -> None:
        """A later run tries the cell again."""
        write_whole(self._failure(cell), json.dumps({
            "settings": asdict(cell), "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exception(error),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}, indent=1) + "\n")

    def _failure(self, cell: RunSettings) -> Path:
        return self.path(cell).with_suffix(".failed")


# ------------------------------------------------------------------------------------------------------- the run


@dataclass
class Tallied:
    """How a sweep went."""

    done: int = 0  # by this run
    failed: int = 0
    left: int = 0  # for want of time

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 3 if self.left else 0


def run(cells: Sequence[RunSettings], store: Store, pace: Pace, known: Known | None = None, budget: float | None = None,
        stamp: Callable[[RunRecord], RunRecord] = lambda record: record) -> Tallied:
    """Do the cells that are not done yet. One that fails does not keep the others from being done.

    Args:
        budget: seconds; no cell is begun that is not expected to end within them.
        stamp: what is recorded of each is passed through this.
    """
    sweep = _Sweep([cell for cell in cells if not store.has(cell)], store, pace, known, budget, stamp)
    progress(f"{len(cells)} cells, {len(cells) - len(sweep.todo)} done already; about {_minutes(pace.left(sweep.todo))} left")
    return sweep.run()


class _Sweep:
    def __init__(self, todo: list[RunSettings], store: Store, pace: Pace, known: Known | None, budget: float | None,
                 stamp: Callable[[RunRecord], RunRecord]) -> None:
        self.todo, self.store, self.pace, self.known, self.stamp = todo, store, pace, known, stamp
        self.number = len(todo)
        self.deadline = None if budget is None else time.monotonic() + budget
        self.tally = Tallied()

    def run(self) -> Tallied:
        while self.todo and self._fits(self.pace.start_seconds):
            self._cluster_of(list(next(groupby(self.todo, way))[1]))
        self.tally.left = len(self.todo)
        return self.tally

    def _fits(self, start_seconds: float = 0.0) -> bool:
        return self.deadline is None or time.monotonic() + start_seconds + self.pace.cell(self.todo[0]) <= self.deadline

    def _cluster_of(self, cells: list[RunSettings]) -> None:
        """Start a cluster and do its cells, until one fails: who knows what that has left behind."""
        progress(f"starting '{cells[0].topology}', {cells[0].mode}")
        begin = time.monotonic()
        try:
            opened = self._open(cells[0])
        except Exception as error:
            for cell in cells:
                self._failed(cell, error)
            return
        self.pace.start_seconds = time.monotonic() - begin
        with opened as cluster:
            router = deepcopy(cluster.router) if cells[0].mode == "adaptive" else None
            for cell in cells:
                if not self._fits():
                    return
                if router is not None:
                    cluster.router = deepcopy(router)
                try:
                    self._cell(cell, cluster)
                except Exception as error:
                    self._failed(cell, error)
                    return

    def _open(self, cell: RunSettings) -> Cluster:
        """The seed of a cell is that of its requests; weights are the same for all."""
        return open_cluster(replace(cell, seed=0, profile=str(self.known.path) if cell.mode == "adaptive" else None))

    def _cell(self, cell: RunSettings, cluster: Cluster) -> None:
        begin = time.monotonic()
        record = run_on_cluster(cell, cluster)
        lost = cluster.topology.workers.keys() - cluster.status().keys()
        if lost:
            raise RuntimeError(f"lost while it was served: {', '.join(sorted(lost))}")
        self.store.save(cell, self.stamp(record))
        self.pace.took(cell, time.monotonic() - begin)
        self._over(cell, said(record))
        self.tally.done += 1

    def _failed(self, cell: RunSettings, error: Exception) -> None:
        self.store.fail(cell, error)
        self._over(cell, f"FAILED: {type(error).__name__}: {error}")
        self.tally.failed += 1

    def _over(self, cell: RunSettings, what: str) -> None:
        self.todo.remove(cell)
        left = _minutes(self.pace.left(self.todo))
        progress(f"[{self.number - len(self.todo)}/{self.number}] {title(cell)}: {what}; about {left} left")


def title(cell: RunSettings) -> str:
    return f"{cell.mode} '{cell.topology}', {words(cell)}, seed {cell.seed}"


def said(record: RunRecord) -> str:
    """A run in a few words."""
    metrics = record.metrics
    parts = [f"{metrics['output_throughput']:.0f} tok/s"]
    if metrics["p99_ttft_ms"] is not None:
        parts.append(f"p99 TTFT {metrics['p99_ttft_ms']:.0f} ms")
    if metrics["request_goodput"] is not None:
        parts.append(f"goodput {metrics['request_goodput']:.1f}/s")
    parts += [f"{metrics[status]} {status}" for status in ("failed", "dropped") if metrics[status]]
    return ", ".join(parts)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


# ----------------------------------------------------------------------------------------------------- the profile


def known_profile(grid: Grid, given: str | None, out: Path, device_name: str | None) -> Known | None:
    """What was asked for, or what this folder's cells were made by, or the preset of this device and model; None for none of them."""
    preset = f"{slug(device_name)}/{grid.base.model}" if device_name else ""
    found = given or (str(out / PROFILE) if (out / PROFILE).exists() else preset if preset in preset_names() else None)
    return Known.of(found) if found else None


def needs_profile(grid: Grid) -> bool:
    return not grid.rates or any(mode == "adaptive" for mode, _ in grid.ways())


def measure(grid: Grid, out: Path, seconds: float) -> Known:
    """Measure the machine, for this sweep and all that go on with it."""
    from nanopd.cost_model.profiler import profile_cluster

    topology = Topology.parse(default_topology("adaptive", grid.gpus, grid.device))
    progress(f"measuring '{topology}' first, about {seconds:.0f} s")
    with open_cluster(grid.settings(grid.base, "collocated", topology)) as cluster:
        profile_cluster(cluster, seconds=seconds).save(out / PROFILE)
    return Known.of(str(out / PROFILE))


def lines(cells: Sequence[RunSettings], store: Store, pace: Pace) -> Iterator[str]:
    """The plan in words."""
    todo = [cell for cell in cells if not store.has(cell)]
    for cell in cells:
        yield f"{title(cell)}: {'done' if cell not in todo else f'about {pace.cell(cell):.0f} s'}"
    yield f"{len(cells)} cells, {len(cells) - len(todo)} done already; about {_minutes(pace.left(todo))} left"
