"""Three modes under the same open loop, beside what the cost model and the simulator say of them.

One cluster of collocated workers is measured and then serves all modes: "disaggregated" while its workers are cast as P and
D. What it is profiled with is not what is served, so that the errors are those of held-out steps.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from nanopd.benchmark.load import ClientRecord, Schedule, serve_cluster
from nanopd.benchmark.show import progress
from nanopd.cluster import Cluster
from nanopd.config import SLO, CacheConfig, SchedulerConfig
from nanopd.core import StepRecord
from nanopd.cost_model.analytical import CostModel, StepWork
from nanopd.cost_model.fit import error_quantile, prediction_errors
from nanopd.cost_model.measurements import Measurements, TransferRow
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.profiler import profile_cluster
from nanopd.cost_model.records import gap_between
from nanopd.metrics import Outcome, Summary, summarize
from nanopd.router.planner import Mix, Planner, Split, WorkerSize
from nanopd.router.policies import make_router
from nanopd.router.routing import Router
from nanopd.simulator.cost_runner import ModelCosts
from nanopd.simulator.simulate import Simulation
from nanopd.simulator.workload import Arrival, lengths, poisson

WARM_UP = 0.2  # share of the requests
ALIKE, LEAST = 1.1, 5  # steps whose predictions differ by less than this factor, and how many of them say something
MODES = ("collocated", "disaggregated", "adaptive")


@dataclass(frozen=True)
class Case:
    """What is served on a kind of device."""

    model: str
    devices: tuple[str, ...]
    options: dict[str, Any]
    slo: SLO
    prompts: tuple[str, ...]  # kinds of mixes, see `workload.lengths`
    output: str
    loads: tuple[str, ...]  # as shares of what the lesser fixed mode is estimated to serve in time
    seconds: float  # of arrivals, for each load
    profile_seconds: float


CASES = {
    "cuda": Case(
        "qwen3-8b", ("0", "1"),
        dict(dtype="bfloat16", max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192, num_gpu_blocks_override=24_576),
        SLO(ttft=0.5, tpot=0.012), prompts=("mixed", "long"), output="128", loads=("0.3", "0.6", "0.9"), seconds=6.0,
        profile_seconds=40.0),
    "cpu": Case(
        "tiny", ("cpu", "cpu"),
        dict(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=512, num_gpu_blocks_override=512),
        SLO(ttft=1.0, tpot=0.1), prompts=("16-200",), output="8-24", loads=("0.3",), seconds=3.0, profile_seconds=6.0),
}


def run(case: Case) -> tuple[list[dict[str, Any]], dict[str, Any], Profile]:
    """Rows, summary, and the profile that the predictions are made from."""
    topology = " ".join(f"C:{device}" for device in case.devices)
    progress(f"{case.model}: starting {topology}")
    with Cluster(case.model, topology, "adaptive", executor="process", router="collocated", load_format="dummy",
                 enable_prefix_caching=False, **case.options) as cluster:
        profile = profile_cluster(cluster, lambda text, share: progress(f"profile: {text}"), case.profile_seconds)
        turns, steps = [], []
        for turn in _turns(case, profile):
            progress(f"{turn.prompts}, {turn.rate:.1f} requests/s: {turn.mode}")
            begin = time.monotonic()
            turns.append((turn, _measure(cluster, case, profile, turn)))
            steps += [history.steps for history in cluster.history(begin).values() if history.steps]
        errors = _errors(profile.cost, steps, _links(cluster))
    with ProcessPoolExecutor() as pool:
        simulated = pool.map(partial(_simulate, case, profile.cost), [turn for turn, _ in turns])
        rows = [_row(turn, measured, each) for (turn, measured), each in zip(turns, simulated)]
    summary: dict[str, Any] = {
        "prediction": {quantity: {"rows": len(those), "median": error_quantile(those, 0.5), "p95": error_quantile(those, 0.95)}
                       for quantity, those in errors.items() if those},
        "simulation": {name: max(abs(row[f"{name}_simulated"] / row[f"{name}_ms"] - 1) for row in rows if row["load"] in case.loads)
                       for name in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50", "e2e_p99")},
        "adaptive_over_best_fixed": _over_best_fixed(rows)}
    return rows, summary, profile


# --------------------------------------------------------------------------------------------------- serving


@dataclass(frozen=True)
class Turn:
    """One mode under one load."""

    prompts: str
    load: str
    rate: float
    mode: str
    arrivals: list[Arrival]

    def counted(self, requests: Sequence[Outcome], slo: SLO) -> Summary:
        """What came of those that came after the warming up, of all in the order of their arrival."""
        return summarize(requests[round(WARM_UP * len(requests)):], slo)


def _turns(case: Case, profile: Profile) -> Iterator[Turn]:
    """Loads that either fixed mode can bear, and what the better one just can."""
    for prompts in case.prompts:
        draw, drawn = lengths(prompts, case.output), random.Random(0)
        planner = Planner(profile.cost, _size(case), case.slo)
        mix = Mix(tuple(draw(drawn) for _ in range(256)))
        capacities = [planner.capacity(split, mix) for split in (Split(C=len(case.devices)), Split(P=1, D=len(case.devices) - 1))]
        rates = {load: float(load) * min(capacities) for load in case.loads} | {"full": max(capacities)}
        for number, (load, rate) in enumerate(rates.items()):
            arrivals = poisson(rate, max(10, round(rate * case.seconds)), draw, seed=number)
            yield from (Turn(prompts, load, rate, mode, arrivals) for mode in MODES)


def _measure(cluster: Cluster, case: Case, profile: Profile, turn: Turn) -> Summary:
    roles = dict(zip(cluster.status(), "P" + "D" * len(case.devices)))
    if turn.mode == "adaptive":
        cluster.router = _router(case, profile.cost)
    with cluster.cast(roles) if turn.mode == "disaggregated" else nullcontext():
        return turn.counted(_served(cluster, turn), case.slo)


def _served(cluster: Cluster, turn: Turn) -> list[ClientRecord]:
    """All of them, or RuntimeError: what is compared with a simulation has to have been answered."""
    records = serve_cluster(cluster, Schedule(turn.arrivals, 0.0, math.inf), turn.mode).records
    for record in records:
        if record.status != "completed":
            raise RuntimeError(f"a request was {record.status}: {record.error}")
    return records


def _simulate(case: Case, cost: CostModel, turn: Turn) -> Summary:
    options, number = case.options, len(case.devices)
    workers = {"P": 1, "D": number - 1} if turn.mode == "disaggregated" else {"C": number}
    simulation = Simulation(
        workers, turn.mode, cost.shape, ModelCosts(cost),
        CacheConfig(options["num_gpu_blocks_override"], enable_prefix_caching=False),
        SchedulerConfig(options["max_num_seqs"], options["max_num_batched_tokens"], max_model_len=options["max_model_len"]),
        router=_router(case, cost) if turn.mode == "adaptive" else None, latency=cost.message_seconds,
        runs_ahead=case.devices[0] != "cpu")
    # As measured: the cluster is told where an answer ends, for the model's own draws would end it anywhere.
    arrivals = [replace(arrival, max_tokens=arrival.output_len) for arrival in turn.arrivals]
    return turn.counted(simulation.run(arrivals).requests, case.slo)


def _router(case: Case, cost: CostModel) -> Router:
    return make_router("cost", cost, slo=case.slo, size=_size(case))


def _size(case: Case) -> WorkerSize:
    return WorkerSize(case.options["max_num_seqs"], case.options["max_num_batched_tokens"],
                      16 * case.options["num_gpu_blocks_override"])


def _row(turn: Turn, measured: Summary, simulated: Summary) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompts": turn.prompts, "load": turn.load, "rate": turn.rate, "mode": turn.mode, "requests": measured.num_requests,
        "attainment": measured.attainment, "attainment_simulated": simulated.attainment,
        "goodput": measured.goodput, "goodput_simulated": simulated.goodput,
        "disaggregated": measured.shares.get("disaggregated", 0.0)}
    for name in ("ttft", "tpot", "e2e"):
        for share_name in ("p50", "p99"):
            row[f"{name}_{share_name}_ms"] = 1e3 * getattr(getattr(measured, name), share_name)
            row[f"{name}_{share_name}_simulated"] = 1e3 * getattr(getattr(simulated, name), share_name)
    return row


def _over_best_fixed(rows: Sequence[dict[str, Any]]) -> float | None:
    """The least, over all loads, of the adaptive goodput over the better fixed one's. None where no fixed mode has any."""
    goodput = {(row["prompts"], row["load"], row["mode"]): row["goodput"] for row in rows}
    cells = {key[:2] for key in goodput}
    return min((goodput[(*cell, "adaptive")] / best for cell in cells if (best := max(goodput[(*cell, mode)] for mode in MODES[:2]))),
               default=None)


# -------------------------------------------------------------------------------------------------- held out


def _links(cluster: Cluster) -> tuple[TransferRow, ...]:
    """Sends of other sizes than were fitted."""
    first, second = list(cluster.topology.workers.items())[:2]
    largest = min(cluster.limits.max_len, cluster.limits.num_blocks * cluster.limits.block_size // 4)
    sends: dict[float, list[float]] = {}
    for num_tokens in {max(1, largest * part // 16) for part in (3, 5, 11)}:
        timed = cluster.time_link(first[0], second[0], num_tokens)
        for num_bytes, seconds in timed.sends:
            sends.setdefault(num_bytes, []).append(seconds)
    return tuple(TransferRow(median(seconds), first[1].device, second[1].device, timed.transport, num_bytes)
                 for num_bytes, seconds in sends.items())


def _errors(cost: CostModel, turns: Sequence[list[StepRecord]], links: tuple[TransferRow, ...]) -> dict[str, tuple[float, ...]]:
    """Predicted / measured - 1: of sends, and of steps of a kind that were predicted alike, their median."""
    gap = median(map(gap_between, turns))
    ratios: dict[tuple[str, int], list[float]] = defaultdict(list)
    for step in (step for turn in turns for step in turn):
        work = StepWork.of(step.rows)
        kind = "decode" if not work.prompt_tokens else "mixed" if work.decodes else "prefill"
        predicted = cost.step_seconds(work)
        ratios[kind, round(math.log(predicted) / math.log(ALIKE))].append(predicted / (step.duration + gap))
    errors = prediction_errors(cost, Measurements(transfer=links))
    return errors | {kind: tuple(median(found) - 1 for (other, _), found in ratios.items() if other == kind and len(found) >= LEAST)
                     for kind in ("prefill", "decode", "mixed")}
