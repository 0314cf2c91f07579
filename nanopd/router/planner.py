"""How many workers of each role suit a load. No torch.

An estimate by queueing formulas, quick enough to be asked while requests flow. Prompts wait for P workers, or for C workers,
as in a queue with several servers (Sakasegawa's and Kingman's approximations). Answers fill decode batches: by Little's law a
batch holds arrivals a second times how long an answer takes, which depends on the batch. A step of a C worker that has a part
of a prompt in it holds its decodes up. `nanopd.simulator` plays a split through instead, which takes longer and is nearer
to the truth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist, fmean

from nanopd.config import SLO, ConfigError, SchedulerConfig
from nanopd.cost_model.analytical import CostModel, StepWork, attended_pairs, chunks

ATTAINMENT = 0.9  # share of the requests that are to meet the SLO
PRECISION = 0.005  # of a capacity, relative
ROUNDS = 30  # of a fixed point at most
MANY = 10**6  # workers
FEW = 4  # workers, of which every split is looked at
LEFT = 2  # collocated workers at most beside P and D, of more than a few
_NORMAL = NormalDist()


@dataclass(frozen=True, order=True)
class Split:
    """How many workers there are of each role."""

    C: int = 0
    P: int = 0
    D: int = 0

    @classmethod
    def all_of(cls, num_workers: int) -> list[Split]:
        """Every way to share out so many workers in which no worker is idle."""
        return [cls(c, p, num_workers - c - p) for c in range(num_workers + 1) for p in range(num_workers - c + 1)
                if (p > 0) == (num_workers - c - p > 0)]

    @property
    def num_workers(self) -> int:
        return self.C + self.P + self.D

    def __str__(self) -> str:
        return " ".join(f"{role}={count}" for role, count in (("C", self.C), ("P", self.P), ("D", self.D)) if count)


@dataclass(frozen=True)
class WorkerSize:
    """What one worker takes."""

    max_num_seqs: int
    max_num_batched_tokens: int
    cache_tokens: int

    @classmethod
    def of(cls, scheduler: SchedulerConfig, num_blocks: int, block_size: int) -> WorkerSize:
        return cls(scheduler.max_num_seqs, min(scheduler.max_num_batched_tokens, scheduler.prefill_chunk_size or sys.maxsize),
                   num_blocks * block_size)


@dataclass(frozen=True)
class Mix:
    """A sample of requests, as (tokens of the prompt, tokens of the answer). Raises ConfigError for none."""

    lengths: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ConfigError("the sample of requests is empty: give the lengths of at least one")

    @cached_property
    def answer(self) -> float:
        """Tokens of an answer on average, at least 2, for with the first it is not over."""
        return max(2.0, fmean(answer for _, answer in self.lengths))

    @cached_property
    def context(self) -> float:
        """Tokens in the cache of a sequence that decodes, on average over the batch: long answers stay longer."""
        stay = sum(answer for _, answer in self.lengths)
        return sum(answer * (prompt + answer / 2) for prompt, answer in self.lengths) / stay


@dataclass(frozen=True)
class Queue:
    """Several servers, Poisson arrivals, and a sample of service times in seconds."""

    services: Sequence[float]
    servers: int

    def attainment(self, rate: float, limit: float) -> float:
        """Share of the arrivals, `rate` a second, that are served within `limit` seconds, their wait included."""
        mean = fmean(self.services)
        busy = rate * mean / self.servers
        if busy >= 1:
            return 0.0
        if math.isinf(limit):
            return 1.0
        waits = busy ** (math.sqrt(2 * (self.servers + 1)) - 1)  # how many wait at all
        wait = fmean(service * service for service in self.services) / (2 * mean * (1 - busy) * self.servers)
        return fmean(1 - waits * math.exp((service - limit) / wait) if service <= limit else 0.0 for service in self.services)


class Planner:
    """For one kind of worker and an SLO, which split serves the most requests in time.

    Args:
        slo: None where only throughput counts.
    """

    def __init__(self, cost: CostModel, size: WorkerSize, slo: SLO | None = None) -> None:
        self.cost = cost
        self.size = size
        self.ttft = slo.ttft if slo else math.inf
        self.tpot = slo.tpot if slo else math.inf

    def rank(self, num_workers: int, mix: Mix, least: Split = Split()) -> list[tuple[Split, float]]:
        """All splits with the requests a second that each serves so that 90% meet the SLO, the best first.

        Args:
            least: so many workers keep to P and D, whatever the load.

        Raises ConfigError where there is no worker.
        """
        if num_workers < 1:
            raise ConfigError(f"there must be at least 1 worker, got {num_workers}")
        load = _Load(self, mix)
        splits = Split.all_of(num_workers) if num_workers <= FEW else self._promising(num_workers, load, least)
        ranked = [(split, load.capacity(split)) for split in splits if split.P >= least.P and split.D >= least.D]
        return sorted(ranked, key=lambda each: (-each[1], -each[0].C))

    @staticmethod
    def _promising(num_workers: int, load: _Load, least: Split) -> list[Split]:
        """Of many workers: as many collocated as can be, or at most two, and the others so shared out that neither P nor D has
        more than a worker too many."""
        wanted, most = load.prefillers_for_each_decoder, num_workers - least.P - least.D
        found = [Split(most, least.P, least.D)]
        for others in range(num_workers - min(LEFT, most), num_workers + 1):
            share = others * wanted / (1 + wanted)
            low, high = max(least.P, 1), others - max(least.D, 1)
            found += [Split(num_workers - others, prompts, others - prompts)
                      for prompts in range(max(low, min(math.ceil(share - 1), high)), min(high, max(math.floor(share + 1), low)) + 1)]
        return list(dict.fromkeys(found))

    def capacity(self, split: Split, mix: Mix) -> float:
        """Requests a second of which 90% meet the SLO; both pipelines side by side add up."""
        return _Load(self, mix).capacity(split)


class _Load:
    """What a mix asks of one kind of worker."""

    def __init__(self, planner: Planner, mix: Mix) -> None:
        self.cost, self.ttft, self.tpot = planner.cost, planner.ttft, planner.tpot
        self.answer, self.context = mix.answer, mix.context
        self.seats = min(planner.size.max_num_seqs, planner.size.cache_tokens / mix.context)
        budget = planner.size.max_num_batched_tokens
        self.prompt_steps = [math.ceil(prompt / budget) for prompt, _ in mix.lengths]
        self.prefills = [self._prefill(round(prompt), budget) for prompt, _ in mix.lengths]
        # Prompts that wait share steps, and so what a step takes at least.
        self.shared_prefills = [max(self._linear(prompt), 1e-9) for prompt, _ in mix.lengths]
        self.floor = max(0.0, fmean(self.prefills) - fmean(self.shared_prefills))
        self.steps = fmean(self.prompt_steps)
        self.chunk = fmean(self.prefills) / self.steps  # seconds of a step with a part of a prompt alone
        self.chunk_tokens = fmean(prompt for prompt, _ in mix.lengths) / self.steps
        self.chunk_pairs = fmean(attended_pairs(prompt) for prompt, _ in mix.lengths) / self.steps

    def _prefill(self, prompt: int, budget: int) -> float:
        return sum(count * self.cost.step_seconds(StepWork(tokens, pairs)) for count, tokens, pairs in chunks(prompt, 0, budget))

    def _linear(self, prompt: float) -> float:
        """Of a prompt among many in a step."""
        return prompt * self.cost.prefill.token_seconds + attended_pairs(prompt) * self.cost.prefill.pair_seconds

    def capacity(self, split: Split) -> float:
        capacity = self._most(lambda rate: self._collocated(rate, split.C)) if split.C else 0.0
        if split.P and split.D:
            capacity += self._most(lambda rate: self._disaggregated(rate, split.P, split.D))
        return capacity

    @staticmethod
    def _most(attainment: Callable[[float], float]) -> float:
        """The highest rate at which the attainment, which falls with it, suffices."""
        top = 1.0
        while attainment(top) >= ATTAINMENT:
            top *= 2
        return _highest(top, lambda rate: attainment(rate) >= ATTAINMENT)

    # -------------------------------------------------------------------------------------- disaggregated

    @cached_property
    def prefillers_for_each_decoder(self) -> float:
        """So that both are as busy: by what one of each could do if it had many of the other."""
        prompts = self._most(lambda rate: self._disaggregated(rate, 1, MANY))
        answers = self._most(lambda rate: self._disaggregated(rate, MANY, 1))
        return answers / max(prompts, 1e-9)

    def _disaggregated(self, rate: float, prefillers: int, decoders: int) -> float:
        in_time = Queue(self.shared_prefills, prefillers).attainment(rate, self.ttft - self.floor)
        if in_time < ATTAINMENT:
            return in_time
        batch = self._batch(rate / decoders, self._decode_step)
        return in_time * self._seated(batch, lambda size: self._decode_step(size) <= self.tpot)

    def _decode_step(self, batch: float) -> float:
        return self.cost.decode.seconds(max(batch, 1.0), max(batch, 1.0) * self.context)

    def _batch(self, rate: float, step: Callable[[float], float]) -> float:
        """The batch that reproduces itself where a step takes `step(batch)` seconds; inf if none does."""
        batch = 1.0
        for _ in range(ROUNDS):
            following = rate * self.answer * step(batch)
            if following > 2 * self.seats:
                return math.inf
            if abs(following - batch) < 1e-3 * batch:
                break
            batch = following
        return batch

    def _seated(self, batch: float, in_time: Callable[[float], bool]) -> float:
        """Batches vary as a Poisson number does: the share of the time in which there is a seat and a step is in time."""
        if batch >= self.seats:
            return 0.0
        most = self.seats if in_time(self.seats) else _highest(self.seats, in_time)
        return _NORMAL.cdf((most - batch) / math.sqrt(max(batch, 0.1)))

    # ----------------------------------------------------------------------------------------- collocated

    def _collocated(self, rate: float, workers: int) -> float:
        each = rate / workers
        batch = self._batch(each, lambda batch: self._mean_step(batch, each))
        if math.isinf(batch):
            return 0.0
        longer = self._step_with_prompt(batch) - self.chunk
        services = [prefill + steps * longer for prefill, steps in zip(self.prefills, self.prompt_steps)]
        in_time = Queue(services, workers).attainment(rate, self.ttft)
        if in_time < ATTAINMENT:
            return in_time
        return in_time * self._seated(batch, lambda size: True) * self._undisturbed(batch, each)

    def _step_with_prompt(self, batch: float) -> float:
        return self.cost.beside_seconds(self.chunk_tokens, self.chunk_pairs, max(batch, 1.0), max(batch, 1.0) * self.context,
                                        self._decode_step(batch))

    def _share_of_prompts(self, batch: float, rate: float) -> float:
        """Of the time, by which prompts lengthen steps: 1 or more where they leave none."""
        return rate * self.steps * (self._step_with_prompt(batch) - self._decode_step(batch))

    def _mean_step(self, batch: float, rate: float) -> float:
        """Of steps with and without a prompt; inf where prompts leave no time."""
        share = self._share_of_prompts(batch, rate)
        return self._decode_step(batch) / (1 - share) if share < 1 else math.inf

    def _undisturbed(self, batch: float, rate: float) -> float:
        """Share of the answers that few enough steps with prompts hold up. How many do varies as a Poisson number does, and
        more: while there are many, answers stay longer, and meet more."""
        decode = self._decode_step(batch)
        longer = self._step_with_prompt(batch) - decode
        if math.isinf(self.tpot) or longer <= 0 or decode >= self.tpot:
            return float(decode < self.tpot)
        expected = self.answer * rate * self.steps * self._mean_step(batch, rate)
        allowed = self.answer * (self.tpot - decode) / longer
        deviation = math.sqrt(max(expected, 0.1)) / (1 - self._share_of_prompts(batch, rate))
        return _NORMAL.cdf((allowed - expected) / deviation)


def _highest(top: float, suffices: Callable[[float], bool]) -> float:
    """The highest x below `top` that suffices, where lower ones do too; 0 if none is found."""
    low, high = 0.0, top
    while high - low > PRECISION * high and high > top * 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if suffices(middle) else (low, middle)
    return low
