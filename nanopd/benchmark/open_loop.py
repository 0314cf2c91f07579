"""Requests that come when they come, however busy the cluster is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanopd.benchmark.serving import random_prompt
from nanopd.cluster import Cluster
from nanopd.core import SamplingParams
from nanopd.simulator.workload import Arrival

LONGEST_WAIT = 0.05  # seconds; as long may Ctrl-C wait


@dataclass
class Measured:
    """One request as the client saw it. Times in seconds on the monotonic clock; `arrival` is when it was due, which is not
    later than when it was sent."""

    arrival: float
    sent: float
    mode: str = ""
    tokens: list[float] = field(default_factory=list)  # when each was drawn

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def e2e(self) -> float:
        return self.tokens[-1] - self.arrival


def serve_open_loop(cluster: Cluster, arrivals: Sequence[Arrival], mode: str | None = None, seed: int = 0) -> list[Measured]:
    """Send prompts of random tokens at the arrivals' times and wait until all have ended.

    Answers have as many tokens as the arrivals say, whatever the model draws; the cluster knows only the longest.
    Raises RuntimeError where one ends with an error.
    """
    vocab_size = cluster.limits.vocab_size
    prompts = [random_prompt(arrival.prompt_len, vocab_size, seed * len(arrivals) + number)
               for number, arrival in enumerate(arrivals)]
    requests: list[Measured] = []
    by_id: dict[str, Measured] = {}
    begin = time.monotonic()
    while len(requests) < len(arrivals) or by_id:
        now = time.monotonic() - begin
        while len(requests) < len(arrivals) and arrivals[len(requests)].time <= now:
            number = len(requests)
            arrival = arrivals[number]
            stream = cluster.submit({"prompt_token_ids": prompts[number]}, SamplingParams(
                temperature=0, max_tokens=arrival.output_len, ignore_eos=True), mode=mode)
            requests.append(Measured(begin + arrival.time, time.monotonic()))
            by_id[stream.request_id] = requests[-1]
        left = arrivals[len(requests)].time - now if len(requests) < len(arrivals) else LONGEST_WAIT
        for event in cluster.step(min(max(left, 0.0), LONGEST_WAIT)):
            request = by_id[event.request_id]
            if event.error is not None:
                raise RuntimeError(event.error)
            if event.token_id is not None:
                request.tokens.append(event.time)
            if event.finish_reason is not None:
                path = cluster.timeline(event.request_id).path
                del by_id[event.request_id]
                request.mode = "collocated" if len(path) == 1 else "disaggregated"
    return requests
