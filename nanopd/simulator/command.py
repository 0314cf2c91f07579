"""What `nanopd simulate` does: from texts to a simulation, and from its result to a table and a JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopd.config import ROLES, SLO, CacheConfig, ConfigError, SchedulerConfig
from nanopd.metrics import Quantiles, Summary
from nanopd.router.planner import WorkerSize
from nanopd.router.policies import make_router
from nanopd.simulator.cost_runner import ModelCosts
from nanopd.simulator.hardware import Hardware
from nanopd.simulator.simulate import Result, Simulation
from nanopd.simulator.traces import read_trace
from nanopd.simulator.workload import Arrival, lengths, poisson

if TYPE_CHECKING:
    from rich.console import Console


def parse_workers(text: str) -> dict[str, int]:
    """"C=2 P=1 D=1": how many workers of each role. Raises ConfigError where it is something else."""
    workers: dict[str, int] = {}
    for part in text.split():
        match = re.fullmatch(r"([A-Z])=(\d+)", part)
        if match is None or match[1] not in ROLES:
            raise ConfigError(f"workers are counted as in 'C=4' or 'C=2 P=1 D=1', got {part!r}; roles are "
                              + ", ".join(f"{letter} ({name})" for letter, name in ROLES.items()))
        if match[1] in workers:
            raise ConfigError(f"workers of role {match[1]} are counted twice in {text!r}")
        workers[match[1]] = int(match[2])
    if not any(workers.values()):
        raise ConfigError("a simulation needs at least one worker, for example 'C=4' or 'P=1 D=1'")
    return workers


@dataclass(frozen=True)
class Workload:
    """`what` says in words what comes."""

    arrivals: list[Arrival]
    what: str

    @property
    def rate(self) -> float | None:
        """Requests a second; None where all come at the same time."""
        seconds = self.arrivals[-1].time - self.arrivals[0].time
        return len(self.arrivals) / seconds if seconds > 0 else None


def poisson_workload(rate: float, num_requests: int, prompts: str, outputs: str, seed: int) -> Workload:
    """See `poisson` and `lengths`."""
    return Workload(poisson(rate, num_requests, lengths(prompts, outputs), seed),
                    f"{num_requests:,} requests, {rate:g} a second (Poisson, seed {seed}); prompts {prompts}, answers {outputs} tokens")


def trace_workload(path: Path, speed_up: float, limit: int | None, max_len: int) -> Workload:
    """See `read_trace`."""
    trace = read_trace(path).sped_up(speed_up)
    trace = (trace if limit is None else trace.first(limit)).cut_to(max_len)
    faster = f", {speed_up:g} times as fast" if speed_up != 1 else ""
    cut = f"; {trace.num_cut:,} of them cut to {max_len:,} tokens" if trace.num_cut else ""
    return Workload(trace.arrivals, f"{len(trace):,} requests of {trace.name}{faster}{cut}")


def cache_for(workload: Workload, num_blocks: int) -> CacheConfig:
    """Of every worker. Where no prompts share a beginning, caches of them find nothing, and looking takes time."""
    return CacheConfig(num_blocks, enable_prefix_caching=any(one.prefix for one in workload.arrivals))


@dataclass(frozen=True)
class Report:
    """A simulation that is over."""

    hardware: Hardware
    workers: dict[str, int]
    mode: str
    router: str | None
    slo: SLO | None
    workload: Workload
    result: Result

    def to_json(self) -> str:
        summary, result = self.result.summary(self.slo), self.result
        return json.dumps({
            "simulated": True, "hardware": self.hardware.name, "notes": self.hardware.notes, "workers": self.workers,
            "mode": self.mode, "router": self.router, "slo": self.slo and asdict(self.slo), "workload": self.workload.what,
            "summary": asdict(summary), "utilisation": result.utilisation, "cached_tokens": result.cached_tokens,
        }, indent=1, allow_nan=False) + "\n"


def simulate(hardware: Hardware, workers: dict[str, int], mode: str, workload: Workload, cache: CacheConfig,
             scheduler: SchedulerConfig, *, router: str | None = None, slo: SLO | None = None,
             progress: Callable[[int], None] | None = None) -> Report:
    """Run it. `router`: the name of one, where the mode is adaptive (default: "cost"). `progress` is told how many requests
    have ended.

    Raises ConfigError where something can't be.
    """
    if router is not None and mode != "adaptive":
        raise ConfigError(f"mode {mode!r} asks no router: leave --router out, or take mode adaptive")
    router = (router or "cost") if mode == "adaptive" else None
    size = WorkerSize.of(scheduler, cache.num_blocks, cache.block_size)
    chooses = router and make_router(router, hardware.cost, slo=slo, size=size)
    simulation = Simulation(workers, mode, hardware.cost.shape, ModelCosts(hardware.cost), cache, scheduler, router=chooses,
                            latency=hardware.cost.message_seconds, runs_ahead=hardware.runs_ahead)
    return Report(hardware, workers, mode, router, slo, workload, simulation.run(workload.arrivals, progress))


# ---------------------------------------------------------------------------------------------- the table


def show(report: Report, console: Console) -> None:
    """A table of times, and what else there is to say."""
    from rich.table import Table

    summary = report.result.summary(report.slo)
    console.print(f"[bold]Simulated[/]: {report.hardware.name}, {_counts(report.workers)}, {report.mode}"
                  + (f", router {report.router}" if report.router else ""), highlight=False)
    table = Table("milliseconds")
    for name in ("p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for name, quantiles in (("time to first token", summary.ttft), ("time per token after it", summary.tpot),
                            ("whole answer", summary.e2e)):
        table.add_row(name, *_milliseconds(quantiles))
    console.print(table)
    for line in _lines(report, summary):
        console.print(line, highlight=False)


def _lines(report: Report, summary: Summary) -> list[str]:
    lines = [report.workload.what,
             f"{summary.requests_per_second:.2f} requests a second, {summary.tokens_per_second:,.0f} tokens a second, "
             f"over {summary.seconds:,.1f} simulated seconds"]
    if summary.attainment is not None and report.slo is not None:
        lines.append(f"{summary.attainment:.1%} met the SLO (first token within {report.slo.ttft * 1e3:g} ms, each after it within "
                     f"{report.slo.tpot * 1e3:g} ms): goodput {summary.goodput:.2f} requests a second")
    lines.append("went " + ", ".join(f"{mode} {share:.1%}" for mode, share in summary.shares.items()) + "; busy: "
                 + ", ".join(f"{role} {_mean_busy(report.result, role):.0%}" for role, count in report.workers.items() if count))
    return [*lines, "Nothing of this was measured: times are what a cost model says.",
            *(f"({note})" for note in report.hardware.notes)]


def _mean_busy(result: Result, role: str) -> float:
    shares = [share for worker_id, share in result.utilisation.items() if worker_id.startswith(role)]
    return sum(shares) / len(shares)


def _counts(workers: dict[str, int]) -> str:
    return " ".join(f"{role}={count}" for role, count in workers.items())


def _milliseconds(quantiles: Quantiles | None) -> list[str]:
    values: list[Any] = [None] * 3 if quantiles is None else [quantiles.p50, quantiles.p90, quantiles.p99]
    return ["-" if value is None else f"{value * 1e3:,.1f}" for value in values]
