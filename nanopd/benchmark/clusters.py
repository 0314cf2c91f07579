"""Prefill and decode on two GPUs beside two GPUs that do both: what the transfer costs, and what the split gives.

One cluster holds the workers of both pipelines, P0 and C0 on one GPU, D0 and C1 on another; those of a GPU share its
process and its weights, and while one pipeline is measured the other one's workers have nothing to do and are not
stepped. All times are the workers' own (`StepRecord`, `TransferRecord`) or the client's, on one clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nanopd.benchmark.serving import random_prompt
from nanopd.benchmark.show import progress
from nanopd.client import Stream
from nanopd.cluster import Cluster
from nanopd.core import SamplingParams, StepRecord, TokenEvent

PD, C = "disaggregated", "collocated"


@dataclass(frozen=True)
class Case:
    """What is measured on a kind of device."""

    model: str
    devices: tuple[str, str]  # of P and of D
    options: dict[str, Any]
    prompts: tuple[int, ...]  # lone ones
    repeats: int  # of each of them
    decodes: int  # that are under way while long prompts stream in
    decode_prompt: int
    long_prompt: int
    steps: int  # to be measured, at most
    seconds: float  # at most
    clients: int  # each sends its next request when it has the answer to its last one
    client_prompt: int
    client_answer: int


CASES = {
    "cuda": Case(
        "qwen3-8b", ("0", "1"),
        dict(dtype="bfloat16", max_num_seqs=128, max_num_batched_tokens=8192, max_model_len=8192, num_gpu_blocks_override=14_336),
        prompts=(512, 2048, 8000), repeats=9, decodes=64, decode_prompt=1024, long_prompt=8000, steps=320, seconds=5.0,
        clients=96, client_prompt=1024, client_answer=128),
    "cpu": Case(
        "tiny", ("cpu", "cpu"),
        dict(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=512, num_gpu_blocks_override=512),
        prompts=(64, 200), repeats=3, decodes=3, decode_prompt=32, long_prompt=200, steps=40, seconds=1.0,
        clients=4, client_prompt=64, client_answer=8),
}


def run(case: Case) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and summary."""
    p, d = case.devices
    with _open(case, f"P:{p} D:{d} C:{p} C:{d}", "auto") as cluster:
        client = Client(cluster)
        idle = list(idle_rows(client, case, (PD, C)))
        load = [load_row(client, case, mode) for mode in (PD, C)]
        throughput = throughput_row(client, case)
    with _open(case, f"P:{p} D:{d}", "relay") as cluster:
        relay = list(idle_rows(Client(cluster), case, (PD,)))
    exposed = {rows[0]["transport"]: max(row["exposed_share"] for row in rows) for rows in (idle, relay)}
    return [*idle, *relay, *load, throughput], {
        "exposed_share": exposed, "prefill_ratio": max(row["prefill_ratio"] for row in idle),
        "ttft_ratio": {str(row["prompt"]): row["ttft_ratio"] for row in idle},
        "decode_p99_ratio": {row["mode"]: row["p99_ratio"] for row in load},
        "throughput_over_bound": throughput["over_bound"]}


def _open(case: Case, topology: str, transport: str) -> Cluster:
    progress(f"{case.model}: starting {topology}, transport {transport}")
    return Cluster(case.model, topology, PD, executor="process", transport=transport, load_format="dummy",
                   enable_prefix_caching=False, **case.options)


class Client:
    """Sends prompts to a cluster, and counts the tokens that come."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.tokens: Counter[str] = Counter()  # by request id
        self._open: dict[str, Stream] = {}
        self._num_sent = 0

    def send(self, length: int, max_tokens: int, mode: str) -> str:
        """Submit a prompt of random tokens. Returns its request id."""
        prompt = random_prompt(length, self.cluster.limits.vocab_size, self._num_sent)
        self._num_sent += 1
        stream = self.cluster.submit({"prompt_token_ids": prompt}, SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True), mode=mode)
        self._open[stream.request_id] = stream
        return stream.request_id

    def step(self) -> list[TokenEvent]:
        """Wait for something to happen. It has to go well."""
        events = self.cluster.step()
        for event in events:
            if event.error:
                raise RuntimeError(event.error)
            self.tokens[event.request_id] += event.token_id is not None
            if event.finish_reason is not None:
                self._open.pop(event.request_id, None)
        return events

    def await_tokens(self, request_ids: Iterable[str], count: int) -> None:
        """Until each of them has so many."""
        for request_id in request_ids:
            while self.tokens[request_id] < count:
                self.step()

    def clear(self) -> None:
        """Cancel what is open, and wait until no worker has anything to do or to give back."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()
        while any(status.num_free_blocks < status.num_blocks or status.num_waiting or status.num_running
                  or status.num_leases or status.num_transfers for status in self.cluster.status().values()):
            self.step()

    def steps(self, since: float, worker_ids: tuple[str, ...]) -> list[list[StepRecord]]:
        """Each worker's, of those that began at `since` or later."""
        history = self.cluster.history(since)
        return [history[worker_id].steps for worker_id in worker_ids]


# -------------------------------------------------------------------------------------------- one request at a time


@dataclass
class Lone:
    """Requests of one length through one pipeline, each alone in the cluster. Seconds."""

    ttft: list[float] = field(default_factory=list)  # the client's: from submission to the first token's arrival
    prefill: list[float] = field(default_factory=list)  # device time of the prompt's steps
    transport: str | None = None
    exposed: list[float] = field(default_factory=list)  # from the end of the prompt's last step to the last byte's arrival
    handover: list[float] = field(default_factory=list)  # from there to the start of D's first step with the request


def idle_rows(client: Client, case: Case, modes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """For each length of prompt the medians of `repeats` lone requests through each pipeline, in turns.

    `exposed_share` is the hand-over, from the end of the last prefill step on P to the start of the first decode step on
    D with all messages in between, as a share of the prefill's time. `prefill_ratio` is the time of P's prefill steps,
    whose layers leave while the next ones are computed, over that of the same prompts' on C of the same GPU.
    """
    for length in case.prompts:
        progress(f"alone: a prompt of {length}")
        lone = _lone(client, case, length, modes)
        split = lone[PD]
        row = {"transport": split.transport, "prompt": length, **_ms(
            prefill=split.prefill, transfer_exposed=split.exposed, handover=split.handover, ttft=split.ttft)}
        row["exposed_share"] = row["handover_ms"] / row["prefill_ms"]
        if C in lone:
            row |= _ms(collocated_prefill=lone[C].prefill, collocated_ttft=lone[C].ttft)
            row["prefill_ratio"] = row["prefill_ms"] / row["collocated_prefill_ms"]
            row["ttft_ratio"] = row["ttft_ms"] / row["collocated_ttft_ms"]
        yield row


def _lone(client: Client, case: Case, length: int, modes: tuple[str, ...]) -> dict[str, Lone]:
    begin = time.monotonic()
    found = {mode: Lone() for mode in modes}
    asked = []
    for number in range(case.repeats + 1):  # the first of each is for warming up
        for mode in modes:
            start = time.monotonic()
            request_id = client.send(length, 4, mode)
            client.await_tokens([request_id], 1)
            if number:
                found[mode].ttft.append(time.monotonic() - start)
                asked.append((mode, request_id))
            client.await_tokens([request_id], 4)
            client.clear()
    history = client.cluster.history(begin)
    for mode, request_id in asked:
        path = client.cluster.timeline(request_id).path
        prefills = [step for step in history[path[0]].steps if request_id in _rows(step, "prefill")]
        found[mode].prefill.append(sum(step.duration for step in prefills))
        if mode == PD:
            transfer, = (sent for sent in history[path[0]].transfers if sent.request_id == request_id)
            decode = next(step for step in history[path[1]].steps if request_id in _rows(step, "decode"))
            found[mode].transport = transfer.transport
            found[mode].exposed.append(transfer.end - transfer.computed)
            found[mode].handover.append(decode.start - _end(prefills[-1]))
    return found


def _ms(**seconds: list[float]) -> dict[str, float]:
    return {f"{name}_ms": statistics.median(values) * 1e3 for name, values in seconds.items()}


# ------------------------------------------------------------------------------------------------------- full load


def load_row(client: Client, case: Case, mode: str) -> dict[str, Any]:
    """The time from the end of a step that decodes to the end of the next one, with long prompts streaming in and without.

    Each time `decodes` sequences start anew and are measured from when all of them decode, so that their contexts are
    the same; then as many long prompts are sent as keep two waiting for their first token, each to be decoded once
    where it arrives. Steps count that hold a worker's whole share of the decodes. On C a step may hold prompts, too.
    """
    progress(f"{mode}: {case.decodes} decodes, alone and with prompts of {case.long_prompt} streaming in")
    pure, _ = _decode_periods(client, case, mode, streaming=False)
    loaded, num_prompts = _decode_periods(client, case, mode, streaming=True)
    return {"mode": mode, "decodes": case.decodes, "long_prompts": num_prompts, "steps": len(loaded),
            "pure_p50_ms": _quantile(pure, 0.5) * 1e3, "pure_p99_ms": _quantile(pure, 0.99) * 1e3,
            "p50_ms": _quantile(loaded, 0.5) * 1e3, "p99_ms": _quantile(loaded, 0.99) * 1e3,
            "p99_ratio": _quantile(loaded, 0.99) / _quantile(pure, 0.99)}


def _decode_periods(client: Client, case: Case, mode: str, streaming: bool) -> tuple[list[float], int]:
    """Seconds, and how many long prompts were computed meanwhile."""
    longest = case.options["max_model_len"] - case.decode_prompt
    decodes = [client.send(case.decode_prompt, longest, mode) for _ in range(case.decodes)]
    client.await_tokens(decodes, 8)
    begin, first = time.monotonic(), client.tokens[decodes[0]]
    waiting: set[str] = set()
    num_prompts = 0
    while client.tokens[decodes[0]] < first + case.steps and time.monotonic() < begin + case.seconds:
        while streaming and len(waiting) < 2:
            waiting.add(client.send(case.long_prompt, 2, mode))
        client.step()
        arrived = {request_id for request_id in waiting if client.tokens[request_id]}
        num_prompts += len(arrived)
        waiting -= arrived
    end = time.monotonic()
    client.clear()
    workers = ("D0",) if mode == PD else ("C0", "C1")
    periods = [period for steps in client.steps(begin, workers)
               for period in _periods(steps, end, case.decodes // len(workers))]
    return periods, num_prompts


def _periods(steps: list[StepRecord], end: float, decodes: int) -> list[float]:
    return [_end(step) - _end(before) for before, step in pairwise(steps)
            if _end(step) <= end and len(_rows(step, "decode")) >= decodes]


# ------------------------------------------------------------------------------------------------------ throughput


def throughput_row(client: Client, case: Case) -> dict[str, Any]:
    """Requests a second of P + D, over what two collocated workers' rate and the times of the phases allow.

    A GPU that does both takes tP + tD for a request, so two reach 2 / (tP + tD); P + D reach 1 / max(tP, tD), as the
    slower of them does nothing else. So the bound is the rate measured of two collocated workers times
    (tP + tD) / (2 max(tP, tD)).

    Rates: `clients` clients send their next request when they have the whole answer to the last one; counted are two
    answers a client, after as many as there are clients.
    tP: device time of P's steps while it computes a prompt for each client, sent all at once, divided by their number.
    tD: device time of a step that decodes one sequence of each client and nothing else, divided by their number, times
    the tokens of an answer after the first. Taken on C0 and C1, the same engines, where so many sequences start together.
    """
    prefill, decode = _prefill_time(client, case), _decode_time(client, case)
    rates = {mode: _closed_loop(client, case, mode) for mode in (PD, C)}
    share = (prefill + decode) / (2 * max(prefill, decode))
    return {"clients": case.clients, "prompt": case.client_prompt, "answer": case.client_answer,
            "prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3, "collocated_requests_s": rates[C],
            "requests_s": rates[PD], "bound_requests_s": rates[C] * share, "over_bound": rates[PD] / (rates[C] * share)}


def _prefill_time(client: Client, case: Case) -> float:
    progress(f"P alone: {case.clients} prompts of {case.client_prompt}")
    begin = time.monotonic()
    asked = {client.send(case.client_prompt, 1, PD) for _ in range(case.clients)}
    client.await_tokens(asked, 1)
    client.clear()
    steps, = client.steps(begin, ("P0",))
    return sum(step.duration for step in steps if asked & _rows(step, "prefill")) / case.clients


def _decode_time(client: Client, case: Case) -> float:
    progress(f"decode alone: {case.clients} sequences on each worker")
    begin = time.monotonic()
    asked = {client.send(case.client_prompt, case.client_answer, C) for _ in range(2 * case.clients)}
    client.await_tokens(asked, case.client_answer)
    client.clear()
    found = [step.duration for steps in client.steps(begin, ("C0", "C1")) for step in steps
             if len(_rows(step, "decode") & asked) == len(step.rows) == case.clients]
    return (case.client_answer - 1) * statistics.median(found) / case.clients


def _closed_loop(client: Client, case: Case, mode: str) -> float:
    """Requests a second."""
    progress(f"{mode}: {case.clients} clients")
    for _ in range(case.clients):
        client.send(case.client_prompt, case.client_answer, mode)
    ended: list[float] = []
    while len(ended) < 3 * case.clients:
        for event in client.step():
            if event.finish_reason is not None:
                ended.append(time.monotonic())
                client.send(case.client_prompt, case.client_answer, mode)
    client.clear()
    return (len(ended) - case.clients) / (ended[-1] - ended[case.clients - 1])


# ----------------------------------------------------------------------------------------------------------- parts


def _rows(step: StepRecord, kind: str) -> set[str]:
    """The requests of which a step held rows of a kind."""
    return {row.request_id for row in step.rows if row.kind == kind}


def _end(step: StepRecord) -> float:
    return step.start + step.duration


def _quantile(values: list[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    if not values:
        raise RuntimeError("no step held all of the decodes: measure for longer, or fewer decodes")
    return sorted(values)[math.ceil(share * len(values)) - 1]
