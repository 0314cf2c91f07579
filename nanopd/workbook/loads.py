"""What chapter 07 tries its loads on: a worker that is held for a while, simulated H200s, recorded sweeps, and three benchmarks with
a fault each."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from nanopd import Cluster
from nanopd.benchmark.load import ClientRecord, Load, Schedule, serve_cluster
from nanopd.benchmark.report.runs import (
    Way,
    by_gpus,
    chosen,
    column,
    load_runs,
    source_of,
    values_of,
    way_of,
    ways_of,
)
from nanopd.benchmark.results import RECORDED
from nanopd.config import SLO, CacheConfig, SchedulerConfig
from nanopd.core import SamplingParams
from nanopd.cost_model.presets import preset
from nanopd.router.planner import WorkerSize
from nanopd.router.policies import make_router
from nanopd.simulator import ModelCosts, Served, Simulation
from nanopd.widgets.sweep_explorer import Cell

PROFILE = "nvidia-h200/qwen3-8b"
CACHE = CacheConfig(num_blocks=24_576, block_size=16, enable_prefix_caching=False)
LIMITS = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192)
PATIENT = 4  # requests that the client of `hold_back` has open at most
FAULTS = {"holds_back": "B", "counts_the_warm_up": "C", "leaves_out_the_refused": "A"}  # who among the suspects has which

# ------------------------------------------------------------------------------------------------- on the engine


def hold(cluster: Cluster, after: float, seconds: float) -> None:
    """Stop the first worker's process in `after` seconds, for so many seconds: what it was doing it goes on with then.

    The cluster's workers have to have processes of their own (executor="process").
    """
    pid = next(iter(cluster.status().values())).pid
    for delay, number in ((after, signal.SIGSTOP), (after + seconds, signal.SIGCONT)):
        timer = threading.Timer(delay, _send, (pid, number))
        timer.daemon = True
        timer.start()


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.kill(pid, number)


# ------------------------------------------------------------------------------------------------- simulated


def simulate(schedule: Schedule, workers: Mapping[str, int], mode: str = "collocated", slo: SLO | None = None) -> list[Served]:
    """The requests that count, on simulated H200s with Qwen3-8B: nothing here was measured on your machine. `slo`: what the
    router of mode "adaptive" goes by."""
    cost = preset(PROFILE).cost
    size = WorkerSize(LIMITS.max_num_seqs, LIMITS.max_num_batched_tokens, CACHE.num_blocks * CACHE.block_size)
    router = make_router("cost", cost, slo=slo, size=size) if mode == "adaptive" else None
    simulation = Simulation(workers, mode, cost.shape, ModelCosts(cost), CACHE, LIMITS, router=router,
                            latency=cost.message_seconds, runs_ahead=True)
    arrivals = [replace(one, max_tokens=one.output_len) for one in schedule.arrivals]
    return [one for one in simulation.run(arrivals).requests if schedule.begin <= one.arrival < schedule.end]


# ------------------------------------------------------------------------------------------------- recorded


class Sweep(NamedTuple):
    """What a `SweepExplorer` is made of, in its order."""

    cells: list[Cell]
    origin: str
    device: str
    slo: SLO


def recorded_sweep(folder: Path = RECORDED) -> Sweep | None:
    """From FOLDER/<device>/sweep, of GPUs rather than of a CPU; None where no sweep was recorded. Of its runs those on the fewest
    GPUs that can be shared out, of each mode with one topology, with prompts of the workload "long", or else the longest there are."""
    found = sorted(folder.glob("*/sweep"), key=lambda path: path.parent.name == "cpu")
    if not found:
        return None
    groups = by_gpus(load_runs(found[0]))
    runs = groups[min((number for number in groups if number > 1), default=min(groups))]
    by_workload = {name: chosen(runs, workload=name) for name in values_of(runs, "workload")}
    name = "long" if "long" in by_workload else max(by_workload, key=lambda name: fmean(column(by_workload[name], "prompt_len")))
    ways: dict[str, Way] = {}
    for way in ways_of(by_workload[name]):
        ways.setdefault(way.mode, way)
    runs = [run for run in by_workload[name] if way_of(run) in ways.values()]
    cells = [Cell.pooled(map(Cell.of_run, chosen(runs, way, rate=rate))) for way in ways.values()
             for rate in values_of(chosen(runs, way), "rate")]
    slo = SLO(runs[0].settings["slo_ttft_ms"] / 1e3, runs[0].settings["slo_tpot_ms"] / 1e3)
    return Sweep(cells, "recorded", f"{source_of(runs)}, {name}", slo)


# ------------------------------------------------------------------------------------------------- the suspects


def suspects(cluster: Cluster, schedule: Schedule) -> dict[str, Load]:
    """The schedule as an honest client serves it, and as three do whose benchmark has a fault: which one has which is for the
    reader to find. The cluster should be offered more than it can take."""
    honest = serve_cluster(cluster, schedule)
    return {"honest": honest, "A": answered_only(honest), "B": hold_back(cluster, schedule), "C": from_the_start(honest)}


def answered_only(load: Load) -> Load:
    """Who was refused, or whose answer broke off, isn't there."""
    return Load([record for record in load.records if record.status == "completed"], load.begin, load.end)


def from_the_start(load: Load) -> Load:
    """Those that came while the server was still empty count as well."""
    return Load([replace(record, counts=record.arrival < load.end) for record in load.records], 0.0, load.end)


def hold_back(cluster: Cluster, schedule: Schedule) -> Load:
    """By a client that sends only while few of its requests are open, and whose clock starts when it sends."""
    records = schedule.records()
    unsent, open_ones = list(records), {}
    start = time.monotonic()
    while unsent or open_ones:
        while unsent and len(open_ones) < PATIENT and unsent[0].arrival <= time.monotonic() - start:
            record = unsent.pop(0)
            record.arrival = record.sent = time.monotonic() - start
            open_ones[_submit(cluster, record)] = record
        for event in cluster.step(0.01):
            record = open_ones[event.request_id]
            record.tokens.append(event.time - start)
            if event.finish_reason is not None:
                open_ones.pop(event.request_id).end(event.time - start, "completed")
    return Load(records, schedule.begin, schedule.end)


def _submit(cluster: Cluster, record: ClientRecord) -> str:
    params = SamplingParams(temperature=0, max_tokens=record.output_len, ignore_eos=True)
    return cluster.submit({"prompt_token_ids": [300] * record.prompt_len}, params).request_id


def in_parts(load: Load, number: int = 4) -> list[float | None]:
    """Mean TTFT, in seconds, of those that were answered in each part of the window; None where nobody was."""
    counted, width = load.counted, (load.until - load.begin) / number
    parts: list[list[float]] = [[] for _ in range(number)]
    for record in counted:
        if record.status == "completed":
            parts[min(int((record.arrival - load.begin) / width), number - 1)].append(record.ttft)
    return [fmean(part) if part else None for part in parts]
