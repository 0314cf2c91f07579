"""Where workers run. The central scheduler sees an executor, never a worker."""

from __future__ import annotations

from nanopd.engine.limits import Limits
from nanopd.messages import FromWorker, History, Status, ToWorker
from nanopd.workers.worker import Worker


class InlineExecutor:
    """All workers in this thread, stepped in turn: deterministic, and one can look between any two steps."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = {worker.worker_id: worker for worker in workers}
        self.roles = {worker.worker_id: worker.role for worker in workers}

    @property
    def limits(self) -> dict[str, Limits]:
        """What each worker can take."""
        return {worker_id: worker.engine.limits for worker_id, worker in self.workers.items()}

    def send(self, worker_id: str, message: ToWorker) -> None:
        """To a worker that is gone: dropped."""
        if worker_id in self.workers:
            self.workers[worker_id].inbox.append(message)

    def poll(self, timeout: float = 0.0) -> list[tuple[str, FromWorker]]:
        """Step every worker once. Returns what they have to say, as (worker id, message). There is nothing to wait for.

        Messages stay in the outboxes until all have stepped: an interrupted step (Ctrl-C) must not lose the others'.
        """
        for worker in self.workers.values():
            worker.step()
        messages = [(worker_id, message) for worker_id, worker in self.workers.items() for message in worker.outbox]
        for worker in self.workers.values():
            worker.outbox.clear()
        return messages

    @property
    def idle(self) -> bool:
        return not any(worker.has_work for worker in self.workers.values())

    def status(self) -> dict[str, Status]:
        """How each worker is doing."""
        return {worker_id: worker.status() for worker_id, worker in self.workers.items()}

    def history(self) -> dict[str, History]:
        """What each worker has done lately."""
        return {worker_id: worker.history() for worker_id, worker in self.workers.items()}

    def close(self) -> None:
        """Let the workers go, with all that they hold."""
        self.workers.clear()
        self.roles.clear()
