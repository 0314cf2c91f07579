"""Both pipelines over fake models: real schedulers, workers and central scheduler, dicts for caches. Torch-free.

One executor steps the workers in turn; the other lets messages and workers dawdle, as processes would.
"""

from __future__ import annotations

from collections import deque

from scheduler.fakes import Ledger, assert_engine_is_empty, assert_plans_were_sound, make_engine

from nanopd.config import Topology
from nanopd.router.central_scheduler import CentralScheduler
from nanopd.workers.executors import InlineExecutor
from nanopd.workers.transfer import Arrived
from nanopd.workers.worker import Worker

NUM_LAYERS = 2


class FakeTransport:
    """Copies whole blocks. Keeps what it was asked to send, a layer at a time."""

    name = "fake"

    def __init__(self, source, destination, block_size, sent):
        self.source, self.destination, self.block_size, self.sent = source, destination, block_size, sent

    def send(self, layers, source_blocks, destination_blocks):
        for layer in layers:
            self.sent.append((layer, list(source_blocks), list(destination_blocks)))
            for source, destination in zip(source_blocks, destination_blocks, strict=True):
                for offset in range(self.block_size):
                    self.destination.layers[layer][destination, offset] = self.source.layers[layer].get((source, offset))
        return Arrived()


class DawdlingExecutor:
    """Messages arrive in order between two parties, but some polls late; workers skip turns.

    `is_late()` decides, each time anew. What is on the way is in `inboxes` and `outboxes`.
    """

    def __init__(self, workers, is_late):
        self.workers = {worker.worker_id: worker for worker in workers}
        self.roles = {worker.worker_id: worker.role for worker in workers}
        self.inboxes = {worker_id: deque() for worker_id in self.workers}
        self.outboxes = {worker_id: deque() for worker_id in self.workers}
        self.is_late = is_late

    def send(self, worker_id, message):
        self.inboxes[worker_id].append(message)

    def poll(self):
        for worker_id, worker in self.workers.items():
            while self.inboxes[worker_id] and not self.is_late():
                worker.inbox.append(self.inboxes[worker_id].popleft())
            if not self.is_late():
                worker.step()
            self.outboxes[worker_id] += worker.outbox
            worker.outbox.clear()
        return [(worker_id, outbox.popleft()) for worker_id, outbox in self.outboxes.items()
                for _ in list(outbox) if not self.is_late()]

    @property
    def idle(self):
        return not (any(self.inboxes.values()) or any(self.outboxes.values())
                    or any(worker.has_work for worker in self.workers.values()))


class FakeCluster:
    """`options` are make_engine's; those in `by_role`, {"D": dict(num_blocks=6)}, go before them."""

    def __init__(self, topology="P:cpu D:cpu", mode="disaggregated", *, is_late=None, by_role=None, **options):
        self.sent = []
        self.workers = {}
        for placement in Topology.parse(topology).placements:
            worker_id = f"{placement.role}{sum(worker.role == placement.role for worker in self.workers.values())}"
            engine = make_engine(num_layers=NUM_LAYERS, **{**options, **(by_role or {}).get(placement.role, {})})
            self.workers[worker_id] = Worker(worker_id, placement.role, engine, engine.runner.cache, self._connect(engine))
        workers = list(self.workers.values())
        self.executor = InlineExecutor(workers) if is_late is None else DawdlingExecutor(workers, is_late)
        limits = min((worker.engine.limits for worker in workers), key=lambda limits: (limits.max_len, limits.num_blocks))
        self.central = CentralScheduler(self.executor, mode, limits)
        self.ledger = Ledger(limits.max_len, NUM_LAYERS)

    def _connect(self, engine):
        source, size = engine.runner.cache, engine.scheduler.manager.block_size
        return lambda worker_id: FakeTransport(source, self.workers[worker_id].cache, size, self.sent)

    def submit(self, request):
        self.central.submit(request)
        self.ledger.add(request)

    def step(self, times=1):
        for _ in range(times):
            self.ledger.take(self.central.step())
            for worker in self.workers.values():
                worker.manager.check()
                assert_plans_were_sound(worker.engine.runner)

    def cancel(self, request_id, index=None):
        return self.ledger.take(self.central.cancel(request_id, index))

    def settle(self, max_steps=1000):
        """Step until nobody has anything left to do or to say. Returns how many steps that took."""
        for steps in range(max_steps):
            if not self.central.has_work and self.executor.idle:
                return steps
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {self.ledger.open}")

    def assert_empty(self):
        assert_cluster_is_empty(self.central, self.workers)
        self.ledger.assert_every_answer_ended_once()
        self.ledger.assert_tokens_are_right()


def assert_cluster_is_empty(central, workers):
    """Every request has ended and been forgotten, on every worker too."""
    assert not central.has_work and not central._queue
    assert not +central._load and not -central._load, central._load
    for worker in workers.values():
        assert (worker.transfers, worker._leases, list(worker.inbox)) == ({}, {}, [])
        assert_engine_is_empty(worker.engine)
