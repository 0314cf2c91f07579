"""Shares out parts among workers that could do all: which of them compute prompts for others and which write, as the load is.
No torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from statistics import fmean

from nanopd.router.planner import Mix, Planner, Split
from nanopd.router.routing import Question, WorkerView

REMEMBERED = 256  # arrivals at most: the load as it is now
RECENT = 5.0  # seconds in which those came, unless they are too few
TOGETHER = 4  # of them, alike, that are reckoned with as one
ENOUGH = 16  # of them, to judge by
EVERY = 0.5  # seconds between two judgements
GAIN = 1.05  # times the present split's capacity that another must have
BUSY = 0.6  # share of its capacity from which on the present split is in question


class RoleKeeper:
    """Watches what arrives, and gives each collocated worker of an adaptive cluster the part that lets all of them together
    serve most in time. A part is for new requests: it takes effect at once, and what a worker has begun it ends.

    Args:
        expected: of a request, how many tokens its answer will have.
    """

    def __init__(self, planner: Planner, expected: Callable[[Question], float]) -> None:
        self._planner = planner
        self._expected = expected
        self._arrivals: deque[Question] = deque(maxlen=REMEMBERED)
        self._judged = 0.0
        self._num_workers = 0  # at that time: who is lost may have been the only one of its part
        self._parts: dict[str, str] = {}  # by worker: "P" or "D"; those that are not here do all

    def arrived(self, question: Question) -> None:
        """A request has come."""
        self._arrivals.append(question)

    def parts(self, now: float, workers: Sequence[WorkerView]) -> dict[str, str]:
        """Of collocated workers that are to do one part only: "P" or "D", by id. All others are as their roles say."""
        if len(self._arrivals) >= ENOUGH and (now - self._judged >= EVERY or len(workers) != self._num_workers):
            self._judged, self._num_workers = now, len(workers)
            self._judge(now, workers)
        return self._parts

    def _judge(self, now: float, workers: Sequence[WorkerView]) -> None:
        soft = {worker.worker_id: worker for worker in workers if worker.role == "C"}
        self._parts = {worker_id: part for worker_id, part in self._parts.items() if worker_id in soft}
        if not soft:
            return
        roles = Counter(worker.role for worker in workers)
        fixed = Split(P=roles["P"], D=roles["D"])
        present = Split(**Counter(self._parts.get(worker.worker_id, worker.role) for worker in workers))
        number = sum(now - question.arrival <= RECENT for question in self._arrivals)
        latest = list(self._arrivals)[-max(number, ENOUGH):]
        alike = sorted((question.prompt_len, self._expected(question)) for question in latest)  # as one knows it now
        groups = [alike[first : first + TOGETHER] for first in range(0, len(alike), TOGETHER)]
        mix = Mix(tuple((fmean(prompt for prompt, _ in group), fmean(answer for _, answer in group)) for group in groups))
        capacity = self._planner.capacity(present, mix)
        rate = len(latest) / max(now - latest[0].arrival, 1e-9)
        if rate < BUSY * capacity:
            return
        # One that does both beside others that do one part helps little where it happens to be busy with the other part.
        best, best_capacity = next((split, rate) for split, rate in self._planner.rank(len(workers), mix, fixed)
                                   if split.C in (0, roles["C"]))
        if best_capacity >= GAIN * capacity:
            self._share_out(best, fixed, list(soft.values()))

    def _share_out(self, split: Split, fixed: Split, workers: Sequence[WorkerView]) -> None:
        """Those that write least compute prompts, those that write most go on with that."""
        by_writing = sorted(workers, key=lambda worker: worker.running.decodes)
        prompts, answers = split.P - fixed.P, split.D - fixed.D
        self._parts = {worker.worker_id: "P" for worker in by_writing[:prompts]}
        self._parts |= {worker.worker_id: "D" for worker in by_writing[len(by_writing) - answers :]}
