"""Three modes under the same open loop, beside what the cost model and the simulator say of them.

One cluster of collocated workers is measured and then serves all modes: "disaggregated" while its workers are cast as P and
D. What it is profiled with is not what is served, so that the errors are those of held-out steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

from nanopd.benchmark.open_loop import serve_open_loop
from nanopd.benchmark.show import progress
from nanopd.cluster import Cluster
from nanopd.config import SLO, CacheConfig, SchedulerConfig
from nanopd.core import StepRecord
from nanopd.cost_model.fit import error_quantile, prediction_errors
from nanopd.cost_model.measurements import Measurements, TransferRow
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.profiler import profile_cluster
from nanopd.cost_model.records import decode_rows, gap_between, mixed_rows, prefill_rows
from nanopd.metrics import Summary, summarize
from nanopd.router.planner import Mix, Planner, Split, WorkerSize
from nanopd.router.policies import make_router
from nanopd.simulator.cost_runner import ModelCosts
from nanopd.simulator.simulate import Simulation
from nanopd.simulator.workload import Arrival, lengths, poisson

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
    shares: tuple[float, ...]  # loads, as shares of what the better of both pipelines is estimated to serve
    seconds: float  # of arrivals, for each load
    profile_seconds: float


CASES = {
    "cuda": Case(
        "qwen3-8b", ("0", "1"),
        dict(dtype="bfloat16", max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192, num_gpu_blocks_override=24_576),
        SLO(ttft=0.5, tpot=0.02), prompts=("mixed", "long"), output="128", shares=(0.3, 0.6, 0.9), seconds=10.0,
        profile_seconds=40.0),
    "cpu": Case(
        "tiny", ("cpu", "cpu"),
        dict(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=512, num_gpu_blocks_override=512),
        SLO(ttft=1.0, tpot=0.1), prompts=("16-200",), output="8-24", shares=(0.2,), seconds=3.0, profile_seconds=6.0),
}


def run(case: Case) -> tuple[list[dict[str, Any]], dict[str, Any], Profile]:
    """Rows, summary, and the profile that the predictions are made from."""
    topology = " ".join(f"C:{device}" for device in case.devices)
    progress(f"{case.model}: starting {topology}")
    with Cluster(case.model, topology, "adaptive", executor="process", router="collocated", load_format="dummy",
                 enable_prefix_caching=False, **case.options) as cluster:
        profile = profile_cluster(cluster, lambda text, share: progress(f"profile: {text}"), case.profile_seconds)
        steps: list[list[StepRecord]] = []
        rows = [row for prompts in case.prompts for row in _served(cluster, case, profile, prompts, steps)]
        errors = _errors(profile, steps, _links(cluster))
    summary: dict[str, Any] = {
        "prediction": {quantity: {"rows": len(those), "median": error_quantile(those, 0.5), "p95": error_quantile(those, 0.95)}
                       for quantity, those in errors.items() if those},
        "simulation": {name: max(abs(row[f"{name}_simulated"] / row[f"{name}_ms"] - 1) for row in rows)
                       for name in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50", "e2e_p99")},
        "adaptive_over_best_fixed": _over_best_fixed(rows)}
    return rows, summary, profile


# --------------------------------------------------------------------------------------------------- serving


def _served(cluster: Cluster, case: Case, profile: Profile, prompts: str,
            steps: list[list[StepRecord]]) -> Iterator[dict[str, Any]]:
    """Each mode under each load. What the workers recorded, each of them in each turn, is added to `steps`."""
    draw = lengths(prompts, case.output)
    drawn = random.Random(0)
    planner = Planner(profile.cost, _size(case), case.slo)
    mix = Mix(tuple(draw(drawn) for _ in range(64)))
    pair = Split(P=1, D=len(case.devices) - 1)
    capacity = max(planner.capacity(Split(C=len(case.devices)), mix), planner.capacity(pair, mix))
    for number, share in enumerate(case.shares):
        rate = share * capacity
        arrivals = poisson(rate, max(8, round(rate * case.seconds)), draw, seed=number)
        for mode in MODES:
            progress(f"{prompts}, {rate:.1f} requests/s: {mode}")
            begin = time.monotonic()
            measured = _measure(cluster, case, profile, arrivals, mode)
            steps += [history.steps for history in cluster.history(begin).values() if history.steps]
            simulated = _simulate(case, profile, arrivals, mode)
            yield _row(prompts, rate, share, mode, measured, simulated)


def _measure(cluster: Cluster, case: Case, profile: Profile, arrivals: Sequence[Arrival], mode: str) -> Summary:
    roles = {worker_id: role for worker_id, role in zip(cluster.status(), "P" + "D" * len(case.devices))}
    if mode == "adaptive":
        cluster.router = _router(case, profile)
    with cluster.cast(roles) if mode == "disaggregated" else nullcontext():
        return summarize(serve_open_loop(cluster, arrivals, mode), case.slo)


def _simulate(case: Case, profile: Profile, arrivals: Sequence[Arrival], mode: str) -> Summary:
    options, number = case.options, len(case.devices)
    workers = {"P": 1, "D": number - 1} if mode == "disaggregated" else {"C": number}
    budget = options["max_num_batched_tokens"]
    simulation = Simulation(
        workers, mode, profile.cost.shape, ModelCosts(profile.cost), CacheConfig(options["num_gpu_blocks_override"],
                                                                               enable_prefix_caching=False),
        SchedulerConfig(options["max_num_seqs"], budget, max_model_len=options["max_model_len"]),
        router=_router(case, profile) if mode == "adaptive" else None, runs_ahead=case.devices[0] != "cpu")
    return simulation.run(arrivals).summary(case.slo)


def _router(case: Case, profile: Profile):
    return make_router("cost", profile.cost, slo=case.slo, size=_size(case))


def _size(case: Case) -> WorkerSize:
    return WorkerSize(case.options["max_num_seqs"], case.options["max_num_batched_tokens"],
                      16 * case.options["num_gpu_blocks_override"])


def _row(prompts: str, rate: float, share: float, mode: str, measured: Summary, simulated: Summary) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompts": prompts, "rate": rate, "share": share, "mode": mode, "requests": measured.num_requests,
        "attainment": measured.attainment, "attainment_simulated": simulated.attainment,
        "goodput": measured.goodput, "goodput_simulated": simulated.goodput,
        "disaggregated": measured.shares.get("disaggregated", 0.0)}
    for name in ("ttft", "tpot", "e2e"):
        for share_name in ("p50", "p99"):
            row[f"{name}_{share_name}_ms"] = 1e3 * getattr(getattr(measured, name), share_name)
            row[f"{name}_{share_name}_simulated"] = 1e3 * getattr(getattr(simulated, name), share_name)
    return row


def _over_best_fixed(rows: Sequence[dict[str, Any]]) -> float:
    """The least, over all loads, of the adaptive goodput over the better fixed one's."""
    cells = {(row["prompts"], row["rate"]) for row in rows}
    goodput = {(row["prompts"], row["rate"], row["mode"]): row["goodput"] for row in rows}
    return min(goodput[*cell, "adaptive"] / max(goodput[*cell, mode] for mode in MODES[:2]) for cell in cells)


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


def _errors(profile: Profile, turns: Sequence[list[StepRecord]], links: tuple[TransferRow, ...]) -> dict[str, tuple[float, ...]]:
    """Predicted / measured - 1: of steps that held as much as each other together, and of sends."""
    gap = median(map(gap_between, turns))
    steps = [step for turn in turns for step in turn]
    return prediction_errors(profile.cost, Measurements(
        tuple(prefill_rows(steps, gap)), tuple(decode_rows(steps, gap)), tuple(mixed_rows(steps, gap)), links))
