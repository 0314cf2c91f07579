"""A load on a `Cluster` in this process."""

from __future__ import annotations

import time

from nanopd.benchmark.load.record import ClientRecord, Load
from nanopd.benchmark.load.schedule import Schedule
from nanopd.benchmark.serving import random_prompt
from nanopd.cluster import Cluster
from nanopd.core import Overloaded, SamplingParams, TokenEvent

LONGEST_WAIT = 0.05  # seconds; as long may Ctrl-C wait


def serve_cluster(cluster: Cluster, schedule: Schedule, mode: str | None = None, seed: int = 0) -> Load:
    """Send prompts of random tokens when they are due, and wait until all have ended.

    Answers have as many tokens as the schedule says, whatever the model draws; the cluster knows only the longest. `mode`: the
    pipeline of all requests, where it is not to be the cluster's.
    """
    return _Driver(cluster, schedule, mode, seed).run()


class _Driver:
    def __init__(self, cluster: Cluster, schedule: Schedule, mode: str | None, seed: int) -> None:
        self.cluster, self.schedule, self.mode = cluster, schedule, mode
        number_of = len(schedule.arrivals)
        self.prompts = [random_prompt(one.prompt_len, cluster.limits.vocab_size, seed * number_of + number)
                        for number, one in enumerate(schedule.arrivals)]
        self.records = schedule.records()
        self.open: dict[str, ClientRecord] = {}
        self.num_sent = 0

    def run(self) -> Load:
        self.start = time.monotonic()
        while self.num_sent < len(self.records) or self.open:
            self._send_due()
            for event in self.cluster.step(self._wait()):
                self._take(event)
        return Load(self.records, self.schedule.begin, self.schedule.end)

    def _send_due(self) -> None:
        while self.num_sent < len(self.records) and self.records[self.num_sent].arrival <= self._now():
            self._send(self.num_sent)
            self.num_sent += 1

    def _send(self, number: int) -> None:
        record = self.records[number]
        record.sent = self._now()
        params = SamplingParams(temperature=0, max_tokens=record.output_len, ignore_eos=True)
        try:
            stream = self.cluster.submit({"prompt_token_ids": self.prompts[number]}, params, mode=self.mode)
        except Overloaded as error:
            record.status, record.error = "dropped", str(error)
        else:
            self.open[stream.request_id] = record

    def _take(self, event: TokenEvent) -> None:
        record = self.open[event.request_id]
        if event.token_id is not None:
            record.tokens.append(event.time - self.start)
        if event.finish_reason is not None:
            del self.open[event.request_id]
            path = self.cluster.timeline(event.request_id).path
            record.mode = "disaggregated" if len(path) > 1 else "collocated"
            record.status, record.error = ("completed" if event.error is None else "failed"), event.error

    def _wait(self) -> float:
        """Until the next request is due, at most."""
        if self.num_sent == len(self.records):
            return LONGEST_WAIT
        return min(max(0.0, self.records[self.num_sent].arrival - self._now()), LONGEST_WAIT)

    def _now(self) -> float:
        return time.monotonic() - self.start
