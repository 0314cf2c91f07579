"""KV caches that travel in virtual time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nanopd.simulator.clock import VirtualClock
from nanopd.simulator.cost_runner import LinkCosts


@dataclass(frozen=True)
class TimedTicket:
    """Arrives at a moment that is known. Whoever waits for it spends the time."""

    arrives: float
    clock: VirtualClock

    def wait(self, timeout: float | None = None) -> bool:
        latest = self.arrives if timeout is None else self.clock.now + timeout
        self.clock.now = max(self.clock.now, min(self.arrives, latest))
        return self.arrives <= self.clock.now


class TimedLink:
    """A transport from one worker to another, one send after the other, while the workers compute.

    Some layers of a chunk take their share of what it takes in one piece.
    """

    name = "simulated"

    def __init__(self, costs: LinkCosts, clock: VirtualClock, block_size: int, num_layers: int) -> None:
        self._costs = costs
        self._clock = clock  # the sender's
        self._block_size = block_size
        self._num_layers = num_layers
        self._free = 0.0  # when all that was sent will have left
        self._arrivals: deque[float] = deque()

    def send(self, layers: range, source_blocks: list[int], destination_blocks: list[int]) -> TimedTicket:
        moving = len(source_blocks) * self._block_size * self._costs.token
        self._free = max(self._free, self._clock.now) + moving * len(layers) / self._num_layers
        arrives = self._free + self._costs.latency
        self._arrivals.append(arrives)
        return TimedTicket(arrives, self._clock)

    def next_arrival(self, now: float) -> float | None:
        """When something arrives next, after `now`; None if nothing is on its way."""
        while self._arrivals and self._arrivals[0] <= now:
            self._arrivals.popleft()
        return self._arrivals[0] if self._arrivals else None

    def close(self) -> None:
        pass
