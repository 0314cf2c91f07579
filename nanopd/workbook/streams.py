"""Transports for chapter 05: one that takes notes; and for its break-it lab the two streams of a GPU, played on a CPU, with
a transport that copies on the second.

On a GPU the CPU only queues work. It has queued a whole step, and the copies of all its layers on a stream of their own, before
the first layer has run. Nothing but an event makes a copy wait for what it copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from nanopd import Cluster
from nanopd.core import StepPlan
from nanopd.engine.engine import OnLayer
from nanopd.workers.transfer import Arrived, LocalTransport


class Ledger:
    """A transport that takes notes, and copies nothing: `sends` are the layers and the destination's blocks of each call."""

    name = "ledger"

    def __init__(self) -> None:
        self.sends: list[tuple[range, list[int]]] = []

    def send(self, layers: range, source_blocks: list[int], destination_blocks: list[int]) -> Arrived:
        self.sends.append((layers, destination_blocks))
        return Arrived()

    def close(self) -> None:
        pass


class CopyStream:
    """Runs what it is given in order, each as early as it may. The other stream is the step itself; its events are the layers
    that it has stored."""

    def __init__(self) -> None:
        self._queue: deque[int | Callable[[], object]] = deque()  # an int: wait until that layer is stored
        self._stored = 0  # layers of the step that runs

    def wait_event(self, layer: int) -> None:
        """What is queued from now on waits until the step has stored this layer."""
        self._queue.append(layer)
        self._run()

    def launch(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        self._run()

    def begin_step(self) -> None:
        self._stored = 0

    def record_event(self, layer: int) -> None:
        """The step has stored this layer."""
        self._stored = layer + 1
        self._run()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether all that was queued has run; the ticket of each transfer."""
        return not self._queue

    def _run(self) -> None:
        while self._queue:
            first = self._queue[0]
            if isinstance(first, int):
                if first >= self._stored:
                    return
            else:
                first()
            self._queue.popleft()


class StreamTransport(LocalTransport):
    """Copies on a stream of its own, each layer behind the event that says it is stored."""

    name = "stream"

    def __init__(self, stream: CopyStream, *caches) -> None:
        super().__init__(*caches)
        self.stream = stream

    def send(self, layers: range, source_blocks: list[int], destination_blocks: list[int]) -> CopyStream:
        self.stream.wait_event(layers.stop - 1)
        self.stream.launch(partial(super().send, layers, source_blocks, destination_blocks))
        return self.stream


class HastyTransport(StreamTransport):
    """The same, by somebody in a hurry."""

    name = "hasty"

    def send(self, layers: range, source_blocks: list[int], destination_blocks: list[int]) -> CopyStream:
        # an event wait belongs here
        self.stream.launch(partial(LocalTransport.send, self, layers, source_blocks, destination_blocks))
        return self.stream


def use(cluster: Cluster, transport: type[StreamTransport]) -> None:
    """Let P0 send by this transport from now on, queueing a step's copies before the step runs, as the CPU does for a GPU."""
    worker, stream = cluster.workers["P0"], CopyStream()
    worker._connect = lambda target: transport(stream, worker.cache, cluster.workers[target].cache)

    def queue_copies(plan: StepPlan) -> OnLayer | None:
        send = worker._on_layer(plan)
        if send is None:
            return None
        stream.begin_step()
        for layer in range(worker.cache.num_layers):
            send(layer)
        return stream.record_event

    worker.engine.layer_hook = queue_copies
