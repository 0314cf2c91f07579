"""What it is worth that the router knows which worker has computed a prompt's beginning before. Simulated, with a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nanopd.benchmark.show import progress
from nanopd.config import CacheConfig, SchedulerConfig
from nanopd.metrics import summarize
from nanopd.router.cost_router import CostRouter
from nanopd.router.length_predictor import BayesianLengthPredictor
from nanopd.simulator.cost_runner import ModelCosts
from nanopd.simulator.hardware import hardware
from nanopd.simulator.simulate import Simulation
from nanopd.simulator.traces import Trace

HARDWARE = "nvidia-h200/qwen3-8b"
WORKERS: tuple[dict[str, int], ...] = ({"C": 4}, {"C": 2, "P": 1, "D": 1})
CACHE = CacheConfig(num_blocks=49_152)
SCHEDULER = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=16_384)


def run(trace: Trace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, two for each set of workers, and by which share knowing shortens the times. Prompts that are too long are cut."""
    rows = list(_rows(trace.cut_to(SCHEDULER.max_model_len)))
    shorter = {names: 1 - aware / blind
               for row, other in zip(rows[::2], rows[1::2]) for names, aware, blind in _pairs(row, other)}
    return rows, {"shorter": shorter}


def _rows(trace: Trace) -> Iterator[dict[str, Any]]:
    cost = hardware(HARDWARE).cost
    for workers in WORKERS:
        for knows in (True, False):
            name = " ".join(f"{role}={number}" for role, number in workers.items())
            progress(f"{name}, {len(trace)} requests: a router that {'knows' if knows else 'does not know'}")
            router = CostRouter(cost, BayesianLengthPredictor(), chunk_tokens=SCHEDULER.max_num_batched_tokens,
                                message_seconds=2 * cost.message_seconds, reads_prefixes=knows)
            simulation = Simulation(workers, "adaptive", cost.shape, ModelCosts(cost), CACHE, SCHEDULER, router=router,
                                    latency=cost.message_seconds, runs_ahead=True)
            result = summarize(simulation.run(trace).requests)
            yield {"trace": trace.name, "hardware": HARDWARE, "workers": name, "router_knows": knows, "requests": result.num_requests,
                   "requests_per_second": result.requests_per_second,
                   **{f"{times}_{share}_ms": 1e3 * seconds for times in ("ttft", "e2e")
                      for share, seconds in asdict(getattr(result, times)).items()}}


def _pairs(row: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    for name in ("ttft_p50_ms", "ttft_p99_ms", "e2e_p50_ms"):
        yield f"{row['workers']} {name.removesuffix('_ms')}", row[name], other[name]
