"""An executor whose workers live in virtual time: from event to event, never by ticks, and an idle worker costs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heappop, heappush
from itertools import count

from nanopd.messages import FromWorker, ToWorker
from nanopd.simulator.clock import VirtualClock
from nanopd.simulator.link import TimedLink
from nanopd.workers.worker import Worker


class Station:
    """A worker, and the time it lives in.

    Its step is carried out as it begins, and puts its own clock forward to the step's end. Nobody else sees what came of it
    before that: what it says is said then, and what it is told meanwhile waits in its inbox, as it would for a real step.
    """

    def __init__(self, worker: Worker, clock: VirtualClock, links: Mapping[str, TimedLink]) -> None:
        self.worker = worker
        self.clock = clock
        self.links = links  # by destination; there are more as it first sends to a worker
        self.due: float | None = None  # when it is to step next

    def step(self, now: float) -> list[FromWorker]:
        """Step once, from `now` to what the clock says afterwards. Returns what it says then."""
        worker, engine = self.worker, self.worker.engine
        self.clock.now = now
        steps_before = engine.num_steps
        worker.step()
        said = list(worker.outbox)
        worker.outbox.clear()
        self.due = self.clock.now if engine.has_work and (said or engine.num_steps > steps_before) else self._next_arrival()
        return said

    def _next_arrival(self) -> float | None:
        """With nothing that can run, only KV that arrives changes anything, or a message."""
        if not self.worker.transfers:
            return None
        arrivals = (link.next_arrival(self.clock.now) for link in self.links.values())
        return min((arrival for arrival in arrivals if arrival is not None), default=None)


Event = tuple[float, int, Station, ToWorker | list[FromWorker] | None]  # when, tie-breaker, who, told / said / None: steps


class VirtualExecutor:
    """Carries messages between the central scheduler and workers, each message in `latency` seconds.

    `clock` is the central scheduler's; `poll` puts it forward to the next message to it.
    """

    idle = True  # workers carry on by themselves, as time goes by

    def __init__(self, stations: Mapping[str, Station], clock: VirtualClock, latency: float = 0.0) -> None:
        self.stations = stations
        self.clock = clock
        self.latency = latency
        self.roles = {worker_id: station.worker.role for worker_id, station in stations.items()}
        self._events: list[Event] = []  # a heap
        self._numbers = count()

    @property
    def pending(self) -> bool:
        """Whether anything is still going to happen."""
        return bool(self._events)

    def send(self, worker_id: str, message: ToWorker) -> None:
        self._plan(self.clock.now + self.latency, self.stations[worker_id], message)

    def poll(self, timeout: float = 0.0) -> list[tuple[str, FromWorker]]:
        """What workers say next, all of one moment, at most `timeout` virtual seconds from now; nothing if they never will."""
        said: list[tuple[str, FromWorker]] = []
        until = self.clock.now + timeout
        while self._events and self._events[0][0] <= until:
            self.clock.now, _, station, what = heappop(self._events)
            if isinstance(what, list):
                said += [(station.worker.worker_id, message) for message in what]
                until = self.clock.now
            elif what is not None:
                station.worker.inbox.append(what)
                self._wake(station)
            elif station.due == self.clock.now:  # else it was woken before
                self._step(station)
        if not said and until < math.inf:
            self.clock.now = until
        return said

    def _step(self, station: Station) -> None:
        said = station.step(self.clock.now)
        if said:
            self._plan(station.clock.now + self.latency, station, said)
        if station.due is not None:
            self._plan(station.due, station, None)

    def _wake(self, station: Station) -> None:
        """Have it read its inbox as soon as its step has ended."""
        soonest = max(self.clock.now, station.clock.now)
        if station.due is None or station.due > soonest:
            station.due = soonest
            self._plan(soonest, station, None)

    def _plan(self, when: float, station: Station, what: ToWorker | list[FromWorker] | None) -> None:
        heappush(self._events, (when, next(self._numbers), station, what))
