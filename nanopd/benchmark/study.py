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
MIXES = {"mixed": ("mixed", "128"), "documents": ("4000-8000", "100-300"), "chat": ("200-800", "200-500")}  # prompts, answers
SLOS = {"tight": 1.6, "loose": 4.0}  # TPOT over what a step of 32 answers takes alone
WARM_UP, WINDOW = 6.0, 16.0  # seconds
MOST = 2400  # requests of a simulation
RANGE, HALVINGS = (0.4, 1.4), 6  # of the estimated capacity, in which the highest rate is sought
LOADS = (0.5, 0.8, 1.0)  # shares of the best rate
TURN = 15.0  # seconds, after which a mix that shifts is another


@dataclass(frozen=True)
class Cell:
    hardware: str
    num_workers: int
    mix: str  # one of MIXES, or two that take turns: "documents, chat"
    slo: str


CELLS = [Cell(name, 4, mix, slo) for name in ("nvidia-h200/qwen3-8b", "seed/h20", "seed/rtx-4090") for mix in MIXES for slo in SLOS]
CELLS += [Cell("nvidia-h200/qwen3-8b", 8, mix, slo) for mix in MIXES for slo in SLOS]
CELLS += [Cell("nvidia-h200/qwen3-8b", 4, "documents, chat", slo) for slo in SLOS]


def run(cells: Sequence[Cell], jobs: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, one for each cell, and summary. `jobs`: processes that work side by side."""
    rows = []
    with ProcessPoolExecutor(jobs) as pool:
        for cell, row in zip(cells, pool.map(measure, cells)):
            progress(f"{cell.hardware}, {cell.num_workers} workers, {cell.mix}, {cell.slo}: "
                     f"adaptive over the best fixed way {row['over_best_fixed']:.3f}")
            rows.append(row)
    steady, shifting = ([row for row in rows if ("," in row["mix"]) == shifts] for shifts in (False, True))
    regrets = [regret for row in steady for regret in row["regrets"]]
    return rows, {
        "least_over_best_fixed": min((row["over_best_fixed"] for row in steady), default=None),
        "least_over_best_fixed_where_the_mix_shifts": min((row["over_best_fixed"] for row in shifting), default=None),
        "mean_regret": fmean(regrets) if regrets else None, "p95_regret": quantile(regrets, 0.95) if regrets else None}


# ------------------------------------------------------------------------------------------------- one cell


def measure(cell: Cell) -> dict[str, Any]:
    """All ways to use the cell's workers."""
    bench = _Bench(cell)
    rates = {way: bench.highest_rate(way) for way in bench.ways}
    fixed = [way for way in bench.ways if way != "adaptive"]
    best = max(fixed, key=lambda way: rates[way])
    regrets = []
    for load in LOADS:
        goodput = {way: bench.outcome(way, load * rates[best])[1] for way in (best, "adaptive", bench.second_best(rates))}
        regrets.append(1 - goodput["adaptive"] / max(goodput.values()))
    return {"hardware": cell.hardware, "workers": cell.num_workers, "mix": cell.mix, "slo": cell.slo,
            "slo_ttft_ms": 1e3 * bench.slo.ttft, "slo_tpot_ms": 1e3 * bench.slo.tpot, "best_fixed": best,
            "rates": rates, "over_best_fixed": rates["adaptive"] / rates[best], "regrets": regrets}


class _Bench:
    def __init__(self, cell: Cell) -> None:
        self.hardware = hardware(cell.hardware)
        self.cost: CostModel = self.hardware.cost
        self.num_workers = cell.num_workers
        self.draws = [lengths(*MIXES[mix]) for mix in cell.mix.split(", ")]
        drawn = random.Random(0)
        self.mixes = [Mix(tuple(draw(drawn) for _ in range(256))) for draw in self.draws]
        self.slo = self._slo(SLOS[cell.slo])
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
            return poisson(rate, max(32, min(MOST, round(rate * (WARM_UP + WINDOW)))), self.draws[0])
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
                                runs_ahead=self.hardware.runs_ahead)
        served: list[Outcome] = simulation.run(arrivals).requests
        warm = arrivals[-1].time * WARM_UP / (WARM_UP + WINDOW)
        counted = [each for each in served if each.arrival >= warm]
        attainment = summarize(counted, self.slo).attainment
        return attainment, attainment * len(counted) / (arrivals[-1].time - warm)

    def highest_rate(self, way: str) -> float:
        """At which the attainment suffices, sought by halving; 0 where that is below what is worth a look."""
        low, high = (share * self.capacities[0] for share in RANGE)
        found = 0.0
        for _ in range(HALVINGS):
            rate = (low + high) / 2
            if self.outcome(way, rate)[0] >= ATTAINMENT:
                found = low = rate
            else:
                high = rate
        return found

    def second_best(self, rates: dict[str, float]) -> str:
        fixed = sorted((way for way in rates if way != "adaptive"), key=lambda way: -rates[way])
        return fixed[1] if len(fixed) > 1 else fixed[0]
