"""Where the router is asked, and told what came of it. What it answers is looked at before anybody acts on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from nanopd.core import FinishReason
from nanopd.cost_model.analytical import StepWork
from nanopd.engine.limits import Limits
from nanopd.router.bookkeeper import Bookkeeper
from nanopd.router.entry import Entry
from nanopd.router.fleet import Fleet, WorkerState
from nanopd.router.routing import Decision, Ended, Question, Route, Router


class RouterError(Exception):
    """The router gave no answer that one could act on. The message says why."""


class View:
    """A worker as a router sees it, see `WorkerView`. It always shows how things are now, and reckons only what is asked."""

    __slots__ = ("_book", "_desk", "_state", "device", "worker_id")

    def __init__(self, worker_id: str, state: WorkerState, device: str | None, desk: Desk) -> None:
        self.worker_id, self._state, self._book, self.device, self._desk = worker_id, state, state.book, device, desk

    @property
    def role(self) -> str:
        return self._state.role

    @property
    def is_open(self) -> bool:
        return self._desk.fleet.has_room(self._state, self._desk.num_answers)

    @property
    def queued(self) -> StepWork:
        return self._book.queue_work

    @property
    def queued_since(self) -> float:
        return self._book.queued_since

    @property
    def running(self) -> StepWork:
        return self._book.running

    @property
    def seats(self) -> int:
        return self._book.total.seats

    @property
    def free_seats(self) -> int:
        return self._desk.limits.max_num_seqs - self._book.total.seats

    @property
    def free_tokens(self) -> int:
        return self._desk.limits.num_blocks * self._desk.limits.block_size - self._book.total.held

    @property
    def sending_tokens(self) -> int:
        return self._book.total.sending

    @property
    def cached_tokens(self) -> int:
        num_blocks = self._book.prefixes.match(self._desk.hashes)
        return num_blocks and self._desk.books.cached_tokens(num_blocks, self._desk.prompt_len)

    @property
    def prompts_per_second(self) -> tuple[float, float]:
        return self._book.prompts_per_second(self._desk.clock())

    def __repr__(self) -> str:
        return f"<{self.worker_id}: {self.queued}, {self.running}>"


class Desk:
    """Between the central scheduler and a router.

    Args:
        devices: of the workers, by id.
    """

    def __init__(self, router: Router, fleet: Fleet, books: Bookkeeper, limits: Limits, clock: Callable[[], float],
                 devices: Mapping[str, str]) -> None:
        self.router = router
        self.fleet = fleet
        self.books = books
        self.limits = limits
        self.clock = clock
        self._views = {worker_id: View(worker_id, state, devices.get(worker_id), self)
                       for worker_id, state in fleet.workers.items()}
        # of the question that is being asked:
        self.num_answers = 1
        self.prompt_len = 1
        self.hashes: list[int] = []

    def ask(self, entry: Entry) -> Route | None:
        """Where a request is to go; None: nowhere yet.

        Raises RouterError where the router fails, or names workers that can't take it.
        """
        self.num_answers, self.prompt_len = len(entry.answers), len(entry.request.prompt_token_ids)
        self.hashes = self.books.hashes(entry)
        if not self._has_room():
            return None
        question = _question(entry, self.clock())
        try:
            decision = self.router.choose(question, list(self._views.values()))
        except Exception as error:
            raise RouterError(f"the router {self._name} failed: {type(error).__name__}: {error}") from error
        if decision is None:
            return None
        self._check(decision)
        decision = self._without_circle(decision)
        if decision is None:
            return None
        entry.timeline.question, entry.timeline.decision = question, decision
        return decision.route

    def tell(self, entry: Entry, index: int, reason: FinishReason) -> None:
        """An answer has ended. One that was broken off would have been longer, as one that was cut."""
        tell, num_tokens = getattr(self.router, "ended", None), len(entry.answers[index].token_ids)
        if tell is None or num_tokens == 0 or entry.request.beam or entry.request.sampling.ignore_eos:
            return
        try:
            tell(_ended(entry, num_tokens, cut=reason is not FinishReason.STOP))
        except Exception as error:  # its own affair: the answer is there
            warnings.warn(f"the router {self._name} failed in ended(): {type(error).__name__}: {error}", stacklevel=2)

    def lose(self, worker_id: str) -> None:
        """The worker is gone."""
        del self._views[worker_id]

    def _has_room(self) -> bool:
        """Whether there is a worker of each role that a pipeline needs: else there is nothing to choose from."""
        roles: set[str] = set()
        for state in self.fleet.workers.values():
            if state.role not in roles and self.fleet.has_room(state, self.num_answers):
                roles.add(state.role)
                if "C" in roles or len(roles) == 2:
                    return True
        return False

    def _without_circle(self, decision: Decision) -> Decision | None:
        """The route, or the best one scored where its workers would wait for each other; see `Fleet.may_pair`. None: later."""
        for route in (decision.route, *(score.route for score in decision.scores)):
            if route.mode == "collocated" or self.fleet.may_pair(route.prefill, route.decode):
                return decision if route == decision.route else Decision(route, decision.scores)
        return None

    def _check(self, decision: Decision) -> None:
        route = getattr(decision, "route", None)
        if not isinstance(route, Route):
            raise RouterError(f"the router {self._name} answered {decision!r:.80}: it must be Decision(Route(...)), or None "
                              "to wait")
        if route.prefill == route.decode:
            self._check_worker(route, route.decode, "C")
        else:
            self._check_worker(route, route.prefill, "P")
            self._check_worker(route, route.decode, "D")

    def _check_worker(self, route: Route, worker_id: str, role: str) -> None:
        state = self.fleet.workers.get(worker_id) if isinstance(worker_id, str) else None
        if state is None:
            what = f"there is no worker {worker_id!r}"
        elif state.role not in (role, "C"):
            needed = " or ".join(dict.fromkeys((role, "C")))
            what = f"{worker_id} has role {state.role}, and role {needed} is needed there"
        elif not self.fleet.has_room(state, self.num_answers):
            what = f"{worker_id} is not open now"
        else:
            return
        there = ", ".join(f"{view.worker_id} ({view.role})" for view in self._views.values() if view.is_open)
        raise RouterError(f"the router {self._name} sent it to {route}, but {what}; open are {there}")

    @property
    def _name(self) -> str:
        return type(self.router).__name__


def _question(entry: Entry, now: float) -> Question:
    request = entry.request
    written = max(len(answer.token_ids) for answer in entry.answers.values())
    sampling = request.sampling
    ends_at_will = not (request.beam or sampling).ignore_eos
    least = sampling.min_tokens if ends_at_will and not request.beam else 1 if ends_at_will else request.max_tokens
    return Question(entry.request.request_id, len(request.prompt_token_ids), request.max_tokens, least, len(entry.answers), written,
                    request.arrival_time, now)


def _ended(entry: Entry, num_tokens: int, cut: bool) -> Ended:
    timeline, arrival = entry.timeline, entry.request.arrival_time
    first, last = timeline.first_token, timeline.ends[-1][1]
    return Ended(entry.request.request_id, len(entry.request.prompt_token_ids), num_tokens, cut, first - arrival,
                 (last - first) / (num_tokens - 1) if num_tokens > 1 else None, timeline.decision if not entry.failures else None)
