"""Where workers run. The central scheduler sees an executor, never a worker."""

from __future__ import annotations

from nanopd.messages import FromWorker, ToWorker
from nanopd.workers.worker import Worker


class InlineExecutor:
    """All workers in this thread, stepped in turn: deterministic, and one can look between any two steps."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = {worker.worker_id: worker for worker in workers}

    @property
    def roles(self) -> dict[str, str]:
        """The workers' ids and their roles."""
        return {worker_id: worker.role for worker_id, worker in self.workers.items()}

    def send(self, worker_id: str, message: ToWorker) -> None:
        self.workers[worker_id].inbox.append(message)

    def poll(self) -> list[tuple[str, FromWorker]]:
        """Step every worker once. Returns what they have to say, as (worker id, message)."""
        messages: list[tuple[str, FromWorker]] = []
        for worker_id, worker in self.workers.items():
            worker.step()
            messages += [(worker_id, message) for message in worker.outbox]
            worker.outbox.clear()
        return messages

    @property
    def idle(self) -> bool:
        return not any(worker.has_work for worker in self.workers.values())
