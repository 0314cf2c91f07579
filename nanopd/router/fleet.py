"""The living workers as the central scheduler sees them: what each has in hand, which one is chosen, who is gone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from nanopd.config import MODES, ROLES, ConfigError
from nanopd.messages import Destination, FromWorker, Refused, ReleaseLease, Reserve, SetRole, ToWorker
from nanopd.router.book import Book


class Executor(Protocol):
    """Carries messages to workers and back. A sign of life is between it and them."""

    roles: dict[str, str]  # of the living workers, by id. One that is lost leaves before its Lost is returned by `poll`

    def send(self, worker_id: str, message: ToWorker) -> None:
        """Never waits. What is sent to a worker that is gone is dropped."""

    def poll(self, timeout: float = 0.0) -> list[tuple[str, FromWorker]]:
        """What workers say, as (worker id, message), each one's in order. Waits at most `timeout` seconds for the first."""

    @property
    def idle(self) -> bool:
        """Whether `poll` has nothing to carry on: no worker has work, or they carry on by themselves."""


@dataclass
class WorkerState:
    """What one worker has in hand, or was asked to take.

    `news` counts what it said and was told that may have made room: after a refusal it is asked again once there is some.
    """

    role: str
    next_role: str | None = None  # to be taken when nothing is in hand any more; until then no new work
    answers: dict[str, int] = field(default_factory=dict)  # job -> answers it writes, or is to set blocks aside for
    writes: dict[str, Destination] = field(default_factory=dict)  # job -> where the KV of the prompt it computes goes
    intended: set[str] = field(default_factory=set)  # jobs whose prompts it is to compute, as soon as room is granted elsewhere
    book: Book = field(default_factory=Book)  # what that amounts to
    news: int = 1
    refused_at: int = 0  # its news when it was asked for the blocks that it refused

    @property
    def load(self) -> int:
        return self.book.total.seats + len(self.writes)

    @property
    def awaits(self) -> bool:
        """Whether it keeps room for answers whose prompts are computed elsewhere."""
        pages = self.book.pages
        return any(page.seats and not (page.queued or page.decodes) for page in map(pages.__getitem__, self.answers))

    def can(self, role: str) -> bool:
        """Whether a router may give it that part of a request: a collocated worker can do either part for another one too."""
        return self.role in (role, "C") and self.next_role is None


class Fleet:
    """Talks to the workers that live, and keeps account of them.

    Args:
        max_num_seqs: answers that a worker can seat.
        prefix_blocks: of the prompts that each worker is sent, to be remembered.
    """

    def __init__(self, executor: Executor, max_num_seqs: int, prefix_blocks: int = 0) -> None:
        self.executor = executor
        self.workers = {worker_id: WorkerState(role, book=Book(prefix_blocks)) for worker_id, role in executor.roles.items()}
        self.prefix_blocks = prefix_blocks
        self._changing: dict[str, WorkerState] = {}  # those that have a next role
        self._takers: dict[str, dict[str, WorkerState]] = {}  # role -> those that get new work of it
        self.losses: dict[str, list[str]] = {}  # role -> what became of the workers of that role that are gone
        self._own_roles: dict[str, str] = {}  # while they are cast in others
        # A collocated worker has a few in line, to seat them at once; the rest waits where no worker's loss can touch it.
        self._room = {"C": max_num_seqs + max_num_seqs // 4 + 1, "P": math.inf, "D": max_num_seqs}
        self._sort()

    def send(self, worker_id: str, message: ToWorker) -> None:
        """Pass a message on, if the worker lives."""
        if worker_id in self.workers:
            if not isinstance(message, Reserve):
                self.workers[worker_id].news += 1
            self.executor.send(worker_id, message)

    def poll(self, timeout: float) -> list[tuple[str, FromWorker]]:
        """See `Executor.poll`."""
        said = self.executor.poll(timeout)
        for worker_id, message in said:
            if not isinstance(message, Refused):
                self.workers[worker_id].news += 1
        return said

    def release(self, destination: Destination, *holders: str) -> None:
        """Let go of a lease."""
        for holder in holders:
            self.send(destination.worker_id, ReleaseLease(destination.lease_id, holder))

    def choose(self, role: str, num_answers: int = 1, wanted: str | None = None) -> str | None:
        """The least loaded worker of a role among those that may have room; None if there is none. The one that is wanted to
        compute a prompt, if it can do that."""
        if wanted in self.workers and self.workers[wanted].can(role) and not self.workers[wanted].awaits:
            return wanted
        chosen, least = None, self._room[role] - num_answers + 1
        for worker_id, worker in self._takers.get(role, {}).items():  # of which there may be a thousand
            if worker.refused_at != worker.news and (load := worker.load) < least:
                chosen, least = worker_id, load
                if load == 0:
                    break
        return chosen

    def has_room(self, worker: WorkerState, num_answers: int) -> bool:
        """Whether a worker may be given a request, in the role that it has."""
        return (worker.next_role is None and worker.refused_at != worker.news
                and worker.book.total.seats + len(worker.writes) + num_answers <= self._room.get(worker.role, 0))

    def may_pair(self, prefill: str, decode: str) -> bool:
        """Whether one worker may now compute a prompt for another. None both keeps room for others and computes for others: in a
        circle of such workers each could wait for room that the next one keeps, for ever."""
        writer = self.workers[decode]
        return not (self.workers[prefill].awaits or writer.writes or writer.intended)

    def intend(self, worker_id: str, job: str) -> None:
        """The worker is to compute a job's prompt, once another has granted room for it."""
        if worker_id in self.workers:
            self.workers[worker_id].intended.add(job)

    def intend_no_more(self, worker_id: str, job: str) -> None:
        """It does so now, or won't."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.intended.discard(job)
            if job not in worker.writes:
                worker.book.close(job)

    def seat(self, worker_id: str, job: str, num_answers: int) -> None:
        """The worker is to write so many answers of a job."""
        worker = self.workers[worker_id]
        worker.answers[job] = num_answers
        worker.book.seat(job, num_answers)

    @contextmanager
    def cast(self, roles: Mapping[str, str]) -> Iterator[None]:
        """For the time being these workers alone get new work, each in the role given. They are not told: the role they have
        is theirs again afterwards. Raises ConfigError if there is no such worker."""
        for worker_id in roles:
            self.check_worker(worker_id)
        self._own_roles = {worker_id: worker.role for worker_id, worker in self.workers.items()}
        for worker_id, worker in self.workers.items():
            worker.role = roles.get(worker_id, "")
        self._sort()
        try:
            yield
        finally:
            for worker_id, worker in self.workers.items():
                worker.role = self._own_roles[worker_id]
            self._own_roles = {}
            self._sort()

    def let_go(self, worker_id: str, job: str) -> None:
        """The worker has a job's answers in hand no more."""
        if worker_id in self.workers and self.workers[worker_id].answers.pop(job, None) is not None:
            self.workers[worker_id].book.close(job)

    def write(self, worker_id: str, job: str, destination: Destination) -> None:
        """The worker is to compute a job's prompt, and to write its KV there."""
        self.workers[worker_id].writes[job] = destination

    def wrote(self, worker_id: str, job: str) -> None:
        """The worker computes a job's prompt no more, nor writes its KV."""
        del self.workers[worker_id].writes[job]
        self.workers[worker_id].book.close(job)

    def lose(self, worker_id: str, reason: str) -> tuple[str, list[str]]:
        """A worker is gone. Returns what to say about it, and the jobs that it had in hand."""
        worker = self.workers.pop(worker_id)
        self._changing.pop(worker_id, None)
        what = f"{worker_id} was lost ({reason})"
        self.losses.setdefault(self._own_roles.get(worker_id, worker.role), []).append(what)
        self._sort()
        for destination in worker.writes.values():  # it can't say itself that it writes no more
            self.release(destination, "writer")
        return what, [*worker.writes, *worker.answers]

    def lack(self, mode: str) -> str | None:
        """What to say where no pipeline of a mode is complete any more: each lacks a role."""
        lacking = [self._lacking(pipeline) for pipeline in MODES[mode]]
        if None in lacking:
            return None
        lost = [role for role in lacking if role in self.losses]
        return "; ".join(f"no {ROLES[role]} worker is left" + "".join(f": {'; '.join(self.losses[role])}" * (role in lost))
                         for role in lost or lacking)

    def needed(self, modes: Collection[str]) -> set[str]:
        """The roles without which requests in these modes could not go on. A mode with two complete pipelines can do without
        either."""
        roles: set[str] = set()
        for mode in modes:
            pipelines = MODES[mode]
            if len(pipelines) > 1:
                pipelines = [pipeline for pipeline in pipelines if self._lacking(pipeline) is None]
            if len(pipelines) == 1:
                roles.update(pipelines[0])
        return roles

    def _lacking(self, pipeline: Collection[str]) -> str | None:
        """A role of which nobody takes new work."""
        return next((role for role in pipeline if role not in self._takers), None)

    def _sort(self) -> None:
        """Workers by role, after a change: that is rare, and who is there is asked for with every request."""
        self.roles = {worker.role for worker in self.workers.values()} - {""} | self.losses.keys()  # those before a loss too
        self._takers = {}
        for worker_id, worker in self.workers.items():
            if worker.next_role is None:
                self._takers.setdefault(worker.role, {})[worker_id] = worker

    def set_role(self, worker_id: str, role: str, needed: Collection[str]) -> None:
        """See `CentralScheduler.set_role`. `needed`: roles that must not lose their last worker."""
        self.check_worker(worker_id)
        if role not in ROLES:
            raise ConfigError(f"unknown role {role!r}; roles are "
                              + ", ".join(f"{letter} ({name})" for letter, name in ROLES.items()))
        worker = self.workers[worker_id]
        if worker.role in needed and role != worker.role and self._takers.get(worker.role, {}).keys() <= {worker_id}:
            raise ConfigError(f"{worker_id} is the last {ROLES[worker.role]} worker, and requests need one: "
                              "give another worker that role first")
        self._changing.pop(worker_id, None)
        worker.next_role = None if role == worker.role else role
        if worker.next_role is not None:
            self._changing[worker_id] = worker
        self._sort()
        self.change_roles()

    def check_worker(self, worker_id: str) -> None:
        """Raises ConfigError where there is none of that id."""
        if worker_id not in self.workers:
            raise ConfigError(f"no worker {worker_id!r}; workers are {', '.join(self.workers)}")

    def change_roles(self) -> None:
        """Those that are to change, and have nothing in hand any more, do."""
        for worker_id, worker in list(self._changing.items()):
            lives = worker_id in self.executor.roles  # it may be gone, and its loss not told yet
            if lives and not worker.answers and not worker.writes:
                del self._changing[worker_id]
                worker.role, worker.next_role = worker.next_role, None
                self._sort()
                self.executor.roles[worker_id] = worker.role
                self.send(worker_id, SetRole(worker.role))
