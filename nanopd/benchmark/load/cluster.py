"""A load on a `Cluster` in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from nanopd.benchmark.load.phases import note_phases
from nanopd.benchmark.load.prompts import prompts
from nanopd.benchmark.load.record import ClientRecord, Load, Stopped, Tally
from nanopd.benchmark.load.schedule import Schedule
from nanopd.core import Overloaded, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from nanopd.cluster import Cluster
    from nanopd.router.timeline import Timeline

LONGEST_WAIT = 0.05  # seconds; as long may Ctrl-C wait


def serve_cluster(cluster: Cluster, schedule: Schedule, mode: str | None = None, seed: int = 0,
                  progress: Callable[[Tally], None] | None = None) -> Load:
    """Send prompts of random tokens when they are due, and wait until all have ended.

    Answers have as many tokens as the schedule says, whatever the model draws; the cluster knows only the longest. `mode`: the
    pipeline of all requests, where it is not to be the cluster's. `progress` is told every second how far it is.

    Raises Stopped, with what there is by then, on Ctrl-C.
    """
    return _Driver(cluster, schedule, mode, seed, progress or (lambda tally: None)).run()


class _Driver:
    def __init__(self, cluster: Cluster, schedule: Schedule, mode: str | None, seed: int,
                 progress: Callable[[Tally], None]) -> None:
        self.cluster, self.schedule, self.mode, self.progress = cluster, schedule, mode, progress
        self.prompts = prompts(schedule.arrivals, cluster.limits.vocab_size, seed)
        self.records = schedule.records()
        self.open: dict[str, tuple[ClientRecord, Timeline]] = {}
        self.ended: list[tuple[ClientRecord, Timeline]] = []
        self.num_sent = self.num_told = 0

    def run(self) -> Load:
        self.start = time.monotonic()
        try:
            while self.num_sent < len(self.records) or self.open:
                self._send_due()
                for event in self.cluster.step(self._wait()):
                    self._take(event)
                self._tell()
        except KeyboardInterrupt:
            raise Stopped(self._so_far()) from None
        note_phases(self.ended, self.cluster.history(self.start), self.start)
        return Load(self.records, self.schedule.begin, self.schedule.end)

    def _send_due(self) -> None:
        while self.num_sent < len(self.records) and self.records[self.num_sent].arrival <= self._now():
            self.num_sent += 1
            self._send(self.num_sent - 1)

    def _send(self, number: int) -> None:
        record = self.records[number]
        record.sent = self._now()
        params = SamplingParams(temperature=0, max_tokens=record.output_len, ignore_eos=True)
        try:
            stream = self.cluster.submit({"prompt_token_ids": self.prompts[number].tolist()}, params, mode=self.mode)
        except Overloaded as error:
            record.end(self._now(), "dropped", str(error))
        else:  # the cluster keeps the timelines of the latest requests only, and this one may stay open for long
            self.open[stream.request_id] = record, self.cluster.timeline(stream.request_id)

    def _take(self, event: TokenEvent) -> None:
        record, timeline = self.open[event.request_id]
        if event.token_id is not None:
            record.tokens.append(event.time - self.start)
        if event.finish_reason is not None:
            self.ended.append(self.open.pop(event.request_id))
            if timeline.path:
                record.mode = "disaggregated" if len(timeline.path) > 1 else "collocated"
            record.end(event.time - self.start, "completed" if event.error is None else "failed", event.error)

    def _so_far(self) -> Load:
        for request_id, (record, _) in self.open.items():
            self.cluster.cancel(request_id)
            record.end(self._now(), "failed", "the load was stopped")
        return Load(self.records, self.schedule.begin, self.schedule.end).so_far(self._now())

    def _tell(self) -> None:
        now = self._now()
        if now >= self.num_told + 1:
            self.num_told = int(now)
            self.progress(Tally(now, len(self.records), self.num_sent, len(self.open)))

    def _wait(self) -> float:
        """Until the next request is due, at most."""
        if self.num_sent == len(self.records):
            return LONGEST_WAIT
        return min(max(0.0, self.records[self.num_sent].arrival - self._now()), LONGEST_WAIT)

    def _now(self) -> float:
        return time.monotonic() - self.start
