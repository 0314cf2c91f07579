"""Measures a running cluster: a crafted load goes through its workers, and what they recorded of it becomes a profile.

    with Cluster("tiny", topology="C:cpu P:cpu D:cpu") as cluster:
        profile = profile_cluster(cluster)

Prompts are random, so that no prefix cache serves them and no two share blocks. Workers and devices of a kind are taken
to be alike: steps are measured on one worker, links between one pair of workers for each pair of devices.
"""

from __future__ import annotations

import platform
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import count
from typing import TYPE_CHECKING

import nanopd
from nanopd.core import Overloaded, SamplingParams, StepRecord
from nanopd.cost_model.analytical import Shape
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.fit import fit_mixed
from nanopd.cost_model.measurements import (
    DecodeRow,
    Measurements,
    MessageRow,
    MixedRow,
    PrefillRow,
    TransferRow,
)
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.records import decode_rows, gap_between, mixed_rows, prefill_rows, typical

if TYPE_CHECKING:
    from nanopd.client import Stream
    from nanopd.cluster import Cluster

Progress = Callable[[str, float], object]

SECONDS = {"cpu": 25.0, "cuda": 50.0}  # to be spent on a kind of device
PREFILL_UNTIL, DECODE_UNTIL = 0.3, 0.95  # shares of the time by which these are to be over; links take what is left
SHORTEST = 16  # prompt, in tokens
CONTEXTS = (64, 1024, 4096)  # in tokens, that decodes begin with
ROOM = 1024  # tokens that those may write meanwhile, at most
PROBES = (32, 128, 512, 2048)  # tokens of prompts that arrive while others decode
PROBES_SHARE = 0.3  # of the time that is left for a context
TIMES = 4  # that a prompt is computed, the first for warming up
STEPS, DECODE_FOR = 12, 0.2  # of a batch at least, and for so many seconds
BATCHES_SEEN = 20  # batches that those of the first one should live to see
LEAST = 4  # prompts that are measured whatever time it takes: fewer can't be fitted
LEAST_BATCHES = (4, 3)  # of the first contexts, likewise
LEAST_PROBES = 3  # lengths beside the first of those batches, one beside the others: of two, pairs look like tokens
USABLE = 0.9  # share of the blocks: nobody shall be preempted


def profile_cluster(cluster: Cluster, progress: Progress = lambda text, share: None, seconds: float | None = None) -> Profile:
    """Measure a cluster that has nothing else to do, whatever its topology and mode, and fit a cost model to it.

    However it ends, no request of it is left. What prefix caches held may have made room.

    Args:
        progress: is told what is being measured, and which share of the time is over.
        seconds: to be spent, about; more where they don't suffice for the least that has to be known.

    Raises:
        RuntimeError: requests are open, or one that was measured failed.
        CostModelError: what could be measured does not suffice.
    """
    budget = _Budget(seconds or SECONDS[cluster.topology.devices[0].partition(":")[0]], progress)
    worker_id = _worker_to_measure(cluster)
    with cluster.cast({worker_id: "C"}), _Load(cluster, worker_id) as load:
        prefill, messages = _measure_prefill(load, budget)
        decode, mixed = _measure_decode(load, budget)
        transfer = [row for pair in _pairs(cluster) for row in _measure_link(cluster, budget, *pair)]
    budget.say("fitting")
    notes = [f"steps: of {worker_id} in '{cluster.topology}', {cluster.executor} executor; workers and devices of a kind are "
             "taken to be alike",
             "links: sends between idle workers, whole" if transfer else
             "links: none, for there are no two workers of which one can compute prompts and another one write answers"]
    if not mixed:
        notes.append("what decodes add to a step with a prompt is assumed, not measured")
    return Profile.of(
        Measurements(tuple(prefill), tuple(decode), tuple(mixed), tuple(transfer), tuple(messages)),
        Shape(cluster.spec.num_layers, cluster.spec.kv_bytes_per_token(cluster.dtype.itemsize)),
        device=cluster.device_name, model=cluster.model, dtype=str(cluster.dtype).removeprefix("torch."),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"nanopd": nanopd.__version__, "python": platform.python_version(), "torch": version("torch")},
        notes=tuple(notes))


def _worker_to_measure(cluster: Cluster) -> str:
    """The first that does both phases, else the first that decodes, for its batches tell most."""
    workers, living = cluster.topology.workers, cluster.status()
    return min(living, key=lambda worker_id: "CDP".index(workers[worker_id].role))


def _pairs(cluster: Cluster) -> list[tuple[str, str]]:
    """Of each pair of devices, one with a worker that can compute prompts and one with another that can write answers, those two
    workers."""
    workers, living = cluster.topology.workers, cluster.status()
    pairs: dict[tuple[str, str], tuple[str, str]] = {}
    for p in living:
        for d in living:
            if p != d and living[p].role in "CP" and living[d].role in "CD":
                pairs.setdefault((workers[p].device, workers[d].device), (p, d))
    return list(pairs.values())


class _Budget:
    """The time there is, and where it goes."""

    def __init__(self, seconds: float, progress: Progress) -> None:
        self._seconds = seconds
        self._progress = progress
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        self._progress(text, min(1.0, self._share()))

    def has(self, seconds: float, until: float) -> bool:
        """Whether so many more fit in before this share of the time is over."""
        return self._share() + seconds / self._seconds <= until

    def part(self, share: float, until: float) -> float:
        """The share of the time by which so much of what is left until then is over."""
        return self._share() + share * max(0.0, until - self._share())

    def _share(self) -> float:
        return (time.monotonic() - self._begin) / self._seconds


# -------------------------------------------------------------------------------------------- what is measured


def _measure_prefill(load: _Load, budget: _Budget) -> tuple[list[PrefillRow], list[MessageRow]]:
    """Lone prompts of more and more tokens; long ones come in chunks. And how long they took to get there."""
    for _ in range(TIMES):  # whatever happens once, or is slow at first
        load.prompt(SHORTEST)
    begin = time.monotonic()
    for number, length in enumerate(sizes(SHORTEST, min(load.max_len - 1, load.num_tokens))):
        if number >= LEAST and not budget.has(2 * length * load.token_seconds, PREFILL_UNTIL):
            break
        budget.say(f"a prompt of {length} tokens")
        for turn in range(TIMES):
            if turn < 2 or budget.has(length * load.token_seconds, PREFILL_UNTIL):
                load.prompt(length)
    load.decode([load.send(SHORTEST, STEPS)])  # it shows what passes between steps, should every prompt be one step
    steps = load.steps(begin)
    load.clear()
    messages = [MessageRow(step.start - load.sent[step.rows[0].request_id]) for step in steps if not step.rows[0].num_cached]
    return prefill_rows(steps, gap_between(steps)), messages


def _measure_decode(load: _Load, budget: _Budget) -> tuple[list[DecodeRow], list[MixedRow]]:
    """Batches of several contexts, alone and with prompts that arrive meanwhile."""
    decodes, mixes = [], []
    room = min(ROOM, load.max_len // 3)
    contexts = _contexts(load.max_len - room - 1)
    for number, context in enumerate(contexts):
        until = PREFILL_UNTIL + (DECODE_UNTIL - PREFILL_UNTIL) * (number + 1) / len(contexts)
        least = LEAST_BATCHES[number] if number < len(LEAST_BATCHES) else 0
        for alone, with_prompts in _climb(load, budget, context, room, least, until):
            gap = gap_between(alone)
            decodes += decode_rows(alone, gap)
            mixes += mixed_rows(with_prompts, gap)
    return decodes, mixes if _suffice(mixes) else []


def _suffice(mixes: list[MixedRow]) -> bool:
    try:
        fit_mixed(mixes)
    except CostModelError:
        return False
    return True


def _contexts(longest: int) -> list[int]:
    """At least two, or what a sequence costs could not be told from what its context does."""
    found = [context for context in CONTEXTS if context <= longest]
    if len(found) < len(CONTEXTS):
        found.append(longest)
    return found if len(found) > 1 else [max(1, longest // 8), longest]


def _climb(load: _Load, budget: _Budget, context: int, room: int, least: int,
           until: float) -> Iterator[tuple[list[StepRecord], list[StepRecord]]]:
    """Larger and larger batches: their steps alone, and those with prompts that arrive meanwhile."""
    most = min(load.max_num_seqs, load.num_tokens // (context + room))
    batch: list[str] = []
    for number, size in enumerate(sizes(1, max(1, most))):
        batch = load.unfinished(batch)
        missing = size - len(batch)
        if number >= least and not budget.has(missing * context * load.token_seconds + DECODE_FOR, until):
            break
        budget.say(f"{size} sequences of {context} tokens")
        try:
            batch += [load.send(context, room) for _ in range(missing)]
            alone, between = load.decode(batch, max(STEPS, room // BATCHES_SEEN)), time.monotonic()
            if number % 2 == 0 and size < most:
                needed = 0 if number >= least else 1 if number else LEAST_PROBES
                _send_probes(load, budget, needed, budget.part(PROBES_SHARE, until))
        except Overloaded:  # the cluster lets no more in
            break
        yield alone, load.steps(between)
    load.clear()


def _send_probes(load: _Load, budget: _Budget, needed: int, until: float) -> None:
    """Prompts, one after the other. `needed`: so many of the shortest in any case."""
    for length in PROBES:
        for turn in range(TIMES):
            has_time = (length in PROBES[:needed] and turn < 2) or budget.has(length * load.token_seconds, until)
            if length < load.max_len and has_time:
                load.prompt(length)


def _measure_link(cluster: Cluster, budget: _Budget, source_id: str, destination_id: str) -> list[TransferRow]:
    budget.say(f"the link from {source_id} to {destination_id}")
    limits, workers = cluster.limits, cluster.topology.workers
    link = cluster.time_link(source_id, destination_id, min(limits.max_len, max(1, limits.num_blocks // 2) * limits.block_size))
    sends = defaultdict(list)
    for num_bytes, seconds in link.sends:
        sends[num_bytes].append(seconds)
    return [TransferRow(typical(seconds), workers[source_id].device, workers[destination_id].device, link.transport, num_bytes)
            for num_bytes, seconds in sends.items()]


def sizes(least: int, most: int) -> list[int]:
    """Powers of two and the middles between them, and `most`: the model bends where no power of two would show it."""
    found, power = [], 1
    while power < most:
        found += [power, power * 3 // 2]
        power *= 2
    return sorted({size for size in found if least <= size < most} | {most})


# ---------------------------------------------------------------------------------------------------- the load


_loads = count()


class _Load:
    """Puts requests through one worker. What is open of them at the end is cancelled."""

    def __init__(self, cluster: Cluster, worker_id: str) -> None:
        limits = cluster.limits
        self.max_len, self.max_num_seqs = limits.max_len, limits.max_num_seqs
        self.num_tokens = int(USABLE * limits.num_blocks) * limits.block_size  # that fit into the cache
        self.token_seconds = 0.0  # of the last lone prompt
        self._cluster = cluster
        self._worker_id = worker_id
        self._random = random.Random(next(_loads))  # another one each time: prefix caches remember the last one's prompts
        self._open: dict[str, Stream] = {}
        self._written: dict[str, int] = {}  # tokens, of those that are open
        self.sent: dict[str, float] = {}  # when, by request id

    def __enter__(self) -> _Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()

    def send(self, length: int, max_tokens: int) -> str:
        """A prompt of random tokens. Returns its request id."""
        prompt, now = self._random.choices(range(self._cluster.limits.vocab_size), k=length), time.monotonic()
        stream = self._cluster.submit({"prompt_token_ids": prompt}, SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True), mode="collocated")
        self._open[stream.request_id] = stream
        self._written[stream.request_id] = 0
        self.sent[stream.request_id] = now
        return stream.request_id

    def prompt(self, length: int) -> None:
        """One prompt, until it is computed."""
        start = time.monotonic()
        self._await([self.send(length, 1)], 1)
        if not self._open:
            self.token_seconds = (time.monotonic() - start) / length

    def decode(self, batch: list[str], most_steps: int = STEPS) -> list[StepRecord]:
        """Some steps of all of a batch together."""
        self._await(batch, 1)
        begin, first = time.monotonic(), self._written.get(batch[-1], 0)
        for steps in range(STEPS, most_steps + 1, STEPS):
            self._await(batch[-1:], first + steps)
            if time.monotonic() > begin + DECODE_FOR:
                break
        return self.steps(begin)

    def unfinished(self, request_ids: Iterable[str]) -> list[str]:
        return [request_id for request_id in request_ids if request_id in self._open]

    def steps(self, since: float) -> list[StepRecord]:
        """The worker's, of those that began then or later."""
        return self._cluster.history(since)[self._worker_id].steps

    def clear(self) -> None:
        """Cancel what is open, and wait until no worker has anything to do or to give back."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()
        self._written.clear()
        self._cluster.step()
        while any(status.num_waiting or status.num_running or status.num_leases or status.num_transfers
                  for status in self._cluster.status().values()):
            self._cluster.step()

    def _await(self, request_ids: list[str], num_tokens: int) -> None:
        """Until each of them has so many tokens, or has ended."""
        for request_id in request_ids:
            while request_id in self._open and self._written[request_id] < num_tokens:
                self._step()

    def _step(self) -> None:
        for event in self._cluster.step():
            if event.error:
                raise RuntimeError(f"a request that was to be measured failed: {event.error}")
            if event.request_id in self._open:
                self._written[event.request_id] += event.token_id is not None
                if event.finish_reason is not None:
                    del self._open[event.request_id], self._written[event.request_id]
