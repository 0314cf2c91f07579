"""Routing on simulated clusters: what adaptive mode serves in time, beside each fixed way to use as many workers.

A cell is a kind of device, a number of workers, a mix of requests and an SLO. For each way to use the workers, the highest
rate is sought at which 90% of the requests meet the SLO; and at shares of the best rate, how many a second do. All are
simulations: the real schedulers and routers with times that a cost model says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nanopd.benchmark.show import progress
from nanopd.config import SLO, CacheConfig, SchedulerConfig
from nanopd.cost_model.analytical import CostModel, StepWork
from nanopd.metrics import Outcome, quantile, summarize
from nanopd.router.planner import ATTAINMENT, Mix, Planner, Split, WorkerSize
from nanopd.router.policies import make_router
from nanopd.simulator.cost_runner import ModelCosts
from nanopd.simulator.hardware import hardware
from nanopd.simulator.simulate import Simulation
from nanopd.simulator.workload import Arrival, lengths, poisson

CACHE = CacheConfig(num_blocks=32_768, enable_prefix_caching=False)
SCHEDULER = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=16_384)
SIZE = WorkerSize.of(SCHEDULER, CACHE.num_blocks, CACHE.block_size)
MIXES = {"mixed": ("mixed", "128"), "documents": ("4000-8000", "100-300"), "chat": ("200-800", "200-500"),
         "summaries": ("4000-8000", "20-60"), "stories": ("50-200", "500-1000")}  # prompts, answers
SLOS = {"tight": 1.6, "loose": 4.0}  # TPOT over what a step of 32 answers takes alone
WARM_UP, WINDOW = 5.0, 10.0  # seconds
LASTING = 6  # answers, one after the other, that the requests come for at least: a load that is too much takes a while to show it
MOST = 2400  # requests of a simulation
RANGE, PRECISION = (0.4, 1.2), 1.03  # of the estimated capacity, where the highest rate is sought first; and by which factor it is known
STEPS_UP = 6  # by a half each, from there
LOADS = (0.5, 0.8, 1.0)  # shares of the best rate
TURN = 60.0  # seconds, after which a mix that shifts is another


@dataclass(frozen=True)
class Cell:
    hardware: str
    num_workers: int
    mix: str  # one of MIXES, or two that take turns: "summaries, stories"
    slo: str

    def __str__(self) -> str:
        return f"{self.hardware}, {self.num_workers} workers, {self.mix}, {self.slo}"


HARDWARE = ("seed/h20", "seed/rtx-4090", "nvidia-h200/qwen3-8b")
STEADY = ("mixed", "documents", "chat")
CELLS = [Cell("seed/h20", 4, "summaries, stories", slo) for slo in SLOS]
CELLS += [Cell(name, 4, mix, slo) for name in HARDWARE for mix in STEADY for slo in SLOS]
CELLS += [Cell("seed/h20", 8, mix, slo) for mix in STEADY for slo in SLOS]


def run(cells: Sequence[Cell], jobs: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, one for each cell, and summary. `jobs`: processes that work side by side."""
    with ProcessPoolExecutor(jobs) as pool:
        rates: dict[Cell, dict[str, float]] = {cell: {} for cell in cells}
        asked = [(cell, way) for cell in cells for way in _Bench(cell).ways]
        for (cell, way), rate in zip(asked, pool.map(_highest_rate, asked)):
            progress(f"{cell}: {way} {rate:.1f} requests/s")
            rates[cell][way] = rate
        loads = [(cell, way, load * best) for cell in cells if (best := max(_fixed(rates[cell]).values())) for load in LOADS
                 for way in ("adaptive", *_best_fixed(rates[cell], 2))]
        goodputs: dict[tuple[Cell, float], dict[str, float]] = {}
        for (cell, way, rate), goodput in zip(loads, pool.map(_goodput, loads)):
            goodputs.setdefault((cell, rate), {})[way] = goodput
    rows = [_row(cell, rates[cell], [each for (other, _), each in goodputs.items() if other == cell]) for cell in cells]
    return rows, _summary(rows)


def _highest_rate(asked: tuple[Cell, str]) -> float:
    cell, way = asked
    return _Bench(cell).highest_rate(way)


def _goodput(asked: tuple[Cell, str, float]) -> float:
    cell, way, rate = asked
    return _Bench(cell).outcome(way, rate)[1]


def _fixed(rates: dict[str, float]) -> dict[str, float]:
    return {way: rate for way, rate in rates.items() if way != "adaptive"}


def _best_fixed(rates: dict[str, float], number: int) -> list[str]:
    fixed = _fixed(rates)
    return sorted(fixed, key=fixed.__getitem__, reverse=True)[:number]


def _row(cell: Cell, rates: dict[str, float], loads: list[dict[str, float]]) -> dict[str, Any]:
    """`regrets`: by which share the best of the ways beat adaptive mode at each load, seen afterwards. Where no fixed way serves
    any in time, there is nothing to compare with."""
    best, slo = _best_fixed(rates, 1)[0], _Bench(cell).slo
    return {"hardware": cell.hardware, "workers": cell.num_workers, "mix": cell.mix, "slo": cell.slo,
            "slo_ttft_ms": 1e3 * slo.ttft, "slo_tpot_ms": 1e3 * slo.tpot, "best_fixed": best, "rates": rates,
            "over_best_fixed": rates["adaptive"] / rates[best] if rates[best] else None,
            "regrets": [1 - goodput["adaptive"] / max(goodput.values()) for goodput in loads]}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, shifts in (("steady", False), ("shifting", True)):
        those = [row for row in rows if ("," in row["mix"]) == shifts and row["over_best_fixed"] is not None]
        regrets = [regret for row in those for regret in row["regrets"]]
        if those:
            found[name] = {"cells": len(those), "least_over_best_fixed": min(row["over_best_fixed"] for row in those),
                           "mean_regret": fmean(regrets), "p95_regret": quantile(regrets, 0.95)}
    return found


# ------------------------------------------------------------------------------------------------- one cell


class _Bench:
    def __init__(self, cell: Cell) -> None:
        self.hardware = hardware(cell.hardware)
        self.cost: CostModel = self.hardware.cost
        self.num_workers = cell.num_workers
        self.draws = [lengths(*MIXES[mix]) for mix in cell.mix.split(", ")]
        drawn = random.Random(0)
        self.mixes = [Mix(tuple(draw(drawn) for _ in range(256))) for draw in self.draws]
        self.slo = self._slo(SLOS[cell.slo])
        self.seconds = max(WARM_UP + WINDOW, LASTING * self.mixes[0].answer * self.slo.tpot)
        planner = Planner(self.cost, SIZE, self.slo)
        ranks = [dict(planner.rank(cell.num_workers, mix)) for mix in self.mixes]
        self.capacities = [max(rank.values()) for rank in ranks]
        pairs = [split for split in Split.all_of(cell.num_workers) if not split.C]
        near = {best.P for rank in ranks for best in [max((s for s in rank if not s.C), key=rank.__getitem__)]}
        chosen = [split for split in pairs if cell.num_workers <= 4 or any(abs(split.P - P) <= 1 for P in near)]
        self.ways: dict[str, Split | None] = {"adaptive": None, f"C={cell.num_workers}": Split(C=cell.num_workers)}
        self.ways |= {str(split): split for split in chosen}

    def _slo(self, patience: float) -> SLO:
        """From what the device can do: a TPOT over the step of 32 answers, a TTFT of some prompts in line."""
        context = fmean(mix.context for mix in self.mixes)
        prompt = max(fmean(prompt for prompt, _ in mix.lengths) for mix in self.mixes)
        return SLO(ttft=max(0.25, 6 * self.cost.step_seconds(StepWork.chunk(round(prompt)))),
                   tpot=patience * self.cost.decode.seconds(32, 32 * context))

    def arrivals(self, rate: float) -> list[Arrival]:
        """At this rate; of mixes that take turns each at its share of what the workers can serve of it."""
        if len(self.draws) == 1:
            return poisson(rate, max(32, min(MOST, round(rate * self.seconds))), self.draws[0])
        found: list[Arrival] = []
        for number in range(4):
            turn = number % len(self.draws)
            own = rate * self.capacities[turn] / self.capacities[0]
            found += [Arrival(number * TURN + each.time, each.prompt_len, each.output_len)
                      for each in poisson(own, round(own * TURN), self.draws[turn], seed=number) if each.time < TURN]
        return found

    def outcome(self, way: str, rate: float) -> tuple[float, float]:
        """Attainment and goodput of the requests that came after the warming up."""
        split, arrivals = self.ways[way], self.arrivals(rate)
        if split is None:
            workers, mode = {"C": self.num_workers}, "adaptive"
        else:
            workers = {role: number for role in "CPD" if (number := getattr(split, role))}
            mode = "collocated" if split.C else "disaggregated"
        router = make_router("cost", self.cost, slo=self.slo, size=SIZE) if split is None else None
        simulation = Simulation(workers, mode, self.cost.shape, ModelCosts(self.cost), CACHE, SCHEDULER, router=router,
                                latency=self.cost.message_seconds, runs_ahead=self.hardware.runs_ahead)
        served: list[Outcome] = simulation.run(arrivals).requests
        warm = arrivals[-1].time * WARM_UP / (WARM_UP + WINDOW)
        counted = [each for each in served if each.arrival >= warm]
        attainment = summarize(counted, self.slo).attainment
        return attainment, attainment * len(counted) / (arrivals[-1].time - warm)

    def highest_rate(self, way: str) -> float:
        """At which the attainment suffices, sought by halving; 0 where that is below what is worth a look."""
        found, high = 0.0, RANGE[1] * self.capacities[0]
        for _ in range(STEPS_UP):
            if self.outcome(way, high)[0] < ATTAINMENT:
                break
            found, high = high, 1.5 * high
        low = found or RANGE[0] * self.capacities[0]
        while high > PRECISION * low:
            rate = (low + high) / 2
            if self.outcome(way, rate)[0] >= ATTAINMENT:
                found = low = rate
            else:
                high = rate
        return found
