"""An executor whose workers live in virtual time: from event to event, never by ticks, and an idle worker costs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heappop, heappush
from itertools import count

from nanopd.messages import FromWorker, Granted, Refused, Tokens, ToWorker
from nanopd.simulator.clock import VirtualClock
from nanopd.simulator.leap import Leap, steps_alike
from nanopd.simulator.link import TimedLink
from nanopd.workers.worker import PATIENCE, Worker


class Station:
    """A worker, and the time it lives in.

    Its step is carried out as it begins, and puts its own clock forward to the step's end. Nobody else sees what came of it
    before that: what it says is said then, and what it is told meanwhile waits in its inbox, as it would for a real step.
    With `leaps`, steps in which nothing is decided are taken many at once, and their tokens are told with the last one's.
    """

    def __init__(self, worker: Worker, clock: VirtualClock, links: Mapping[str, TimedLink], leaps: bool) -> None:
        self.worker = worker
        self.clock = clock
        self.links = links  # by destination; there are more as it first sends to a worker
        self.due: float | None = None  # when it is to act next
        self._leaps = leaps
        self._leap: Leap | None = None  # that it is in
        self._refused = False  # the last prompt it was to take: it is asked again whenever it says something, so it must

    def act(self, now: float) -> list[FromWorker]:
        """Take a step, or many. Returns what it says when the clock shows what it then shows."""
        self.clock.now = now
        if self._leap is not None:
            return self._land(self._leap)
        num_alike = steps_alike(self.worker.engine) if self._may_leap else 0
        if num_alike < 2:
            return self._step()
        self._leap = Leap(self.worker.engine, now, num_alike)
        self.due = self._leap.end
        return []

    def wake(self, now: float) -> bool:
        """Have it read its inbox as soon as the step that runs has ended. Returns whether that makes it due earlier."""
        soonest = max(now, self.clock.now)
        if self._leap is not None:
            self._leap.cut(now)
            soonest = self._leap.end
        if self.due is not None and self.due <= soonest:
            return False
        self.due = soonest
        return True

    @property
    def _may_leap(self) -> bool:
        return self._leaps and not (self._refused or self.worker.inbox or self.worker.transfers)

    def _land(self, leap: Leap) -> list[FromWorker]:
        self._leap, self.due = None, self.clock.now
        return [Tokens(leap.land())]

    def _step(self) -> list[FromWorker]:
        worker, engine = self.worker, self.worker.engine
        steps_before = engine.num_steps
        worker.step()
        worker.finish_transfers(PATIENCE)  # as a worker's process does
        said = list(worker.outbox)
        worker.outbox.clear()
        for message in said:
            if isinstance(message, Granted | Refused):
                self._refused = isinstance(message, Refused)
        self.due = self.clock.now if engine.has_work and (said or engine.num_steps > steps_before) else self._next_arrival()
        return said

    def _next_arrival(self) -> float | None:
        """With nothing that can run, only KV that arrives changes anything, or a message."""
        if not self.worker.transfers:
            return None
        arrivals = (link.next_arrival(self.clock.now) for link in self.links.values())
        return min((arrival for arrival in arrivals if arrival is not None), default=None)


Event = tuple[float, int, Station, ToWorker | list[FromWorker] | None]  # when, tie-breaker, who, told / said / None: acts


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
                if station.wake(self.clock.now):
                    self._plan(station.due, station, None)
            elif station.due == self.clock.now:  # else it was woken before
                self._act(station)
        if not said and until < math.inf:
            self.clock.now = until
        return said

    def _act(self, station: Station) -> None:
        said = station.act(self.clock.now)
        if said:
            self._plan(station.clock.now + self.latency, station, said)
        if station.due is not None:
            self._plan(station.due, station, None)

    def _plan(self, when: float, station: Station, what: ToWorker | list[FromWorker] | None) -> None:
        heappush(self._events, (when, next(self._numbers), station, what))
