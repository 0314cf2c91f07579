"""The central scheduler: every request's way through the workers, by messages only. No torch.

Collocated, one worker does it all: Serve to C, as soon as one has a seat for it. Disaggregated, in order:

    Reserve to D  ->  Granted, or Refused: the request stays in line (backpressure)
    Prefill to P  ->  P computes the prompt, writes its KV into D's leased blocks layer by layer, draws the first token
    Prefilled     ->  Resume to D, which decodes from there

D's blocks are leased to two holders, the request and the writer, and are free once both have let go.

When an attempt comes to nothing (a worker is lost, a transfer fails, what arrived is not what was sent), the request goes
back to its place in line with the tokens that are written, and goes on from those: the client sees neither a gap nor a
repeat.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from itertools import count
from operator import attrgetter

from nanopd.config import MODES, ConfigError, check_mode
from nanopd.core import FinishReason, InvalidRequest, Overloaded, Request, TokenEvent
from nanopd.engine.limits import Limits
from nanopd.messages import (
    Cancel,
    Corrupted,
    FromWorker,
    Granted,
    LinkTimed,
    Lost,
    Prefill,
    Prefilled,
    Refused,
    Reserve,
    Resume,
    Serve,
    TimeLink,
    Tokens,
    TransferFailed,
    WriteEnded,
    Written,
)
from nanopd.router.bookkeeper import Bookkeeper
from nanopd.router.desk import Desk, RouterError
from nanopd.router.entry import Entry, Stage
from nanopd.router.explain import Explanation, explain
from nanopd.router.fleet import Executor, Fleet
from nanopd.router.routing import Router
from nanopd.router.timeline import Timeline

MAX_ATTEMPTS = 4
TIMELINES_KEPT = 4096
BY_TICKET = attrgetter("ticket")


class CentralScheduler:
    """Admits requests, sends each along its pipeline, and returns what the workers draw.

    Args:
        mode: the pipeline of requests that don't ask for another: "collocated" or "disaggregated".
        limits: what every worker can take.
        max_queued: how many requests may be open at once.
        clock: gives seconds; deadlines and timelines go by it.
        router: is asked where requests in mode "adaptive" go. None: there can be none.
        devices: of the workers, by id: what the router is told.
        prefix_caching: whether workers keep the prompts that they have computed.
    """

    def __init__(self, executor: Executor, mode: str, limits: Limits, *, max_queued: int = 16_384,
                 clock: Callable[[], float] = time.monotonic, router: Router | None = None,
                 devices: Mapping[str, str] | None = None, prefix_caching: bool = True) -> None:
        if mode == "adaptive" and router is None:
            raise ConfigError("mode 'adaptive' needs a router: see nanopd.router.policies.make_router")
        self.mode = mode
        self.limits = limits
        self.max_queued = max_queued
        self.clock = clock
        self.timelines: dict[str, Timeline] = {}
        self.fleet = Fleet(executor, limits.max_num_seqs, limits.num_blocks if router and prefix_caching else 0)
        self.books = Bookkeeper(self.fleet, clock, limits.block_size)
        self.desk = None if router is None else Desk(router, self.fleet, self.books, limits, clock, devices or {})
        self._entries: dict[str, Entry] = {}  # by request id
        self._jobs: dict[str, Entry] = {}  # by the job of the current attempt
        self.link_times: dict[str, LinkTimed | str] = {}  # by job; a text says why there are none
        self._links: dict[str, str] = {}  # by job: the worker that is to time its link to another
        self._lines: dict[str, list[Entry]] = {mode: [] for mode in MODES}  # queued or reserving, by ticket
        self._deadlines: list[tuple[float, str]] = []  # a heap; of requests that may have ended
        self._tickets = count()
        self._said: deque[tuple[str, FromWorker]] = deque()
        self._events: list[TokenEvent] = []
        self._handlers: dict[type, Callable] = {
            Tokens: self._on_tokens, Granted: self._on_granted, Refused: self._on_refused, Prefilled: self._on_prefilled,
            WriteEnded: self._on_write_ended, TransferFailed: self._on_transfer_failed, Corrupted: self._on_corrupted,
            LinkTimed: self._on_link_timed, Lost: self._on_lost,
        }

    # ----------------------------------------------------------------------------------- what clients ask for

    def submit(self, request: Request, mode: str | None = None) -> None:
        """Take a request in.

        Raises:
            InvalidRequest: no worker could ever serve it.
            Overloaded: `max_queued` requests are open.
        """
        mode = mode or self.mode
        self._check_mode(mode)
        self.limits.check(request)
        if len(self._entries) >= self.max_queued:
            raise Overloaded(f"{len(self._entries)} requests are open, and no more are let in (max_queued): "
                             "try again when some have ended, or raise max_queued")
        answers = {index: Written(index, [], []) for index in range(request.num_answers)}
        entry = Entry(self.limits.bound(request), mode, next(self._tickets), answers)
        entry.timeline.mark("queued", self.clock())
        self._entries[request.request_id] = entry
        self.timelines[request.request_id] = entry.timeline
        if len(self.timelines) > TIMELINES_KEPT:
            del self.timelines[next(iter(self.timelines))]
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, request.request_id))
        self._enqueue(entry)

    def _check_mode(self, mode: str) -> None:
        try:
            check_mode(mode, self.fleet.roles, "this cluster has")
        except ConfigError as error:
            raise InvalidRequest(str(error)) from None
        if mode == "adaptive" and self.desk is None:
            raise InvalidRequest("mode 'adaptive' needs a router, and this cluster was made without one: make it with "
                                 "mode='adaptive'")

    def step(self, timeout: float = 0.0) -> list[TokenEvent]:
        """Send out what is in line, wait up to `timeout` seconds for what the workers say, and take it in.

        Returns the tokens drawn.
        """
        self._end_overdue()
        for mode in MODES:
            if self._lines[mode]:
                self._dispatch(mode)
        self._poll(0.0 if self._events else self._until_deadline(timeout))
        self.fleet.change_roles()
        self._settle()
        events, self._events = self._events, []
        return events

    def catch_up(self) -> None:
        """Take in what workers have said already. Tokens among it are the next step's to return."""
        self._poll(0.0)

    @property
    def has_work(self) -> bool:
        """Whether requests are open, or have an end that was not told yet."""
        return bool(self._entries or self._events)

    def cancel(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """End a request, or one of the answers it has begun, wherever it is. What it held on workers is given back.

        A beam search has no answers until it is over, so it ends as a whole or not at all. Returns what is new of the
        request: after its end nothing more comes.
        """
        entry = self._entries.get(request_id)
        if entry is not None and index is None:
            self._end(entry, FinishReason.ABORT)
        elif entry is not None and index in entry.answers and entry.answers[index].token_ids:
            self._cancel_answer(entry, index)
        self._settle()
        events = [event for event in self._events if event.request_id == request_id]
        self._events = [event for event in self._events if event.request_id != request_id]
        return events

    def set_role(self, worker_id: str, role: str) -> None:
        """Give a worker another role: it gets no more work of its old one, and changes when it has ended what it has.

        Raises ConfigError if there is no such worker or role, or if requests would be left without a worker they need.
        """
        modes = {self.mode, *(entry.mode for entry in self._entries.values())}
        self.fleet.set_role(worker_id, role, self.fleet.needed(modes))

    @property
    def router(self) -> Router | None:
        """Who is asked where requests in mode "adaptive" go. Another one may be set at any time, where there is one."""
        return self.desk and self.desk.router

    @router.setter
    def router(self, router: Router) -> None:
        if self.desk is None:
            raise ConfigError("this cluster was made without a router: make it with mode='adaptive'")
        self.desk.router = router

    def explain(self, request_id: str) -> Explanation:
        """Why the router sent a request where it did, and what that cost.

        Raises KeyError where it is not among the last TIMELINES_KEPT, and InvalidRequest where the router was not asked.
        """
        if request_id not in self.timelines:
            raise KeyError(f"no request {request_id!r}; timelines are kept of the last {TIMELINES_KEPT} requests")
        return explain(self.timelines[request_id])

    def time_link(self, source_id: str, destination_id: str, prompt_token_ids: list[int]) -> str:
        """Have a worker send as many blocks to another as a prompt takes, and say how long that takes: `link_times` has it
        later, by the job returned. They are sent to blocks leased as for any prompt.

        Raises ConfigError if there is no such worker.
        """
        for worker_id in (source_id, destination_id):
            self.fleet.check_worker(worker_id)
        job = f"link {next(self._tickets)}"
        self._links[job] = source_id
        self.fleet.seat(destination_id, job, 1)
        self.fleet.send(destination_id, Reserve(Request(job, prompt_token_ids)))
        return job

    # ------------------------------------------------------------------------------------------ in line

    def _enqueue(self, entry: Entry) -> None:
        self._jobs[entry.job] = entry
        entry.timeline.jobs.append(entry.job)
        insort(self._lines[entry.mode], entry, key=BY_TICKET)

    def _dequeue(self, entry: Entry) -> None:
        line = self._lines[entry.mode]
        del line[bisect_left(line, entry.ticket, key=BY_TICKET)]

    def _dispatch(self, mode: str) -> None:
        """First come, first served: one that finds no room holds back those behind it."""
        line = self._lines[mode]
        error = self.fleet.lack(mode)
        if error is not None:
            for entry in list(line):
                self._end(entry, FinishReason.ERROR, error)
        if mode == "collocated":
            while line and self._serve(line[0], self.fleet.choose("C", len(line[0].answers))):
                pass
            return
        if mode == "adaptive":
            self._route(line)
            return
        for entry in line:
            if entry.stage is Stage.QUEUED and not self._reserve(entry, self.fleet.choose("D", len(entry.answers))):
                return
            if entry.was_refused:
                return

    def _route(self, line: list[Entry]) -> None:
        """As the router says. Those that are served leave the line, those that wait for their blocks stay in it."""
        place = 0
        while place < len(line):
            entry = line[place]
            if entry.stage is Stage.QUEUED and not self._ask(entry):
                return
            if entry.stage is Stage.RESERVING:
                if entry.was_refused:
                    return
                place += 1

    def _ask(self, entry: Entry) -> bool:
        """Send a request where the router says. False: nowhere yet."""
        try:
            route = self.desk.ask(entry)
        except RouterError as error:
            self._end(entry, FinishReason.ERROR, str(error))
            return True
        if route is None:
            return False
        entry.route = route
        return self._serve(entry, route.decode) if route.mode == "collocated" else self._reserve(entry, route.decode)

    def _serve(self, entry: Entry, worker_id: str | None) -> bool:
        if worker_id is None:
            return False
        self._dequeue(entry)
        entry.stage = Stage.DECODE
        entry.server = worker_id
        self.books.serve(entry)
        self._enter(entry, worker_id)
        self.fleet.send(worker_id, Serve(entry.job_request, entry.written() if entry.begun else []))
        return True

    def _reserve(self, entry: Entry, worker_id: str | None) -> bool:
        if worker_id is None:
            return False
        entry.stage = Stage.RESERVING
        entry.server = worker_id
        self.books.reserve(entry)
        if entry.route is not None:
            self.fleet.intend(entry.route.prefill, entry.job)
        entry.news_when_asked = self.fleet.workers[worker_id].news
        self.fleet.send(worker_id, Reserve(entry.job_request))
        return True

    def _end_reserving(self, entry: Entry) -> None:
        """Its blocks are granted, refused, or wanted no more. No effect where none were asked for."""
        if entry.route is not None:
            self.fleet.intend_no_more(entry.route.prefill, entry.job)

    def _enter(self, entry: Entry, worker_id: str) -> None:
        entry.timeline.path.append(worker_id)
        entry.timeline.mark(f"sent to {worker_id}", self.clock())

    # ----------------------------------------------------------------------------------------- taking in

    def _poll(self, timeout: float) -> None:
        self._said.extend(self.fleet.poll(timeout))
        while self._said:  # an interrupt (Ctrl-C) must not lose what others have said
            worker_id, message = self._said.popleft()
            self._handlers[type(message)](worker_id, message)

    def _settle(self) -> None:
        """When the last request has ended, see to it that every lease and cancel reaches its worker now."""
        while not self._entries and not self.fleet.executor.idle:
            self._poll(0.0)

    def _on_tokens(self, worker_id: str, message: Tokens) -> None:
        for event in message.events:
            entry = self._jobs.get(event.request_id)
            if entry is None:
                continue  # ended meanwhile, or begun anew
            if entry.recomputes and entry.stage is Stage.PREFILL:
                if event.error is not None:
                    self._end(entry, FinishReason.ERROR, event.error)
                else:
                    self.books.computed(entry)
            elif event.index in entry.answers:
                self._take(entry, event)

    def _take(self, entry: Entry, event: TokenEvent) -> None:
        event.request_id = entry.request.request_id
        self._events.append(event)
        if event.token_id is not None:
            if entry.timeline.first_token is None:
                entry.timeline.first_token = event.time
            self.books.token(entry)
            entry.answers[event.index].token_ids.append(event.token_id)
            entry.answers[event.index].logprobs.append(event.logprob)
        if event.finish_reason is not None:
            self._note_end(entry, event.index, event.finish_reason, event.time)
            self._drop_answer(entry, event.index)

    def _on_refused(self, worker_id: str, message: Refused) -> None:
        self.fleet.let_go(worker_id, message.request_id)
        self._end_link(message.request_id, f"{worker_id} has no room for so many blocks now")
        entry = self._jobs.get(message.request_id)
        if entry is not None:
            self._end_reserving(entry)
            self.fleet.workers[worker_id].refused_at = entry.news_when_asked
            entry.stage = Stage.QUEUED
            entry.was_refused = True
            entry.timeline.num_refusals += 1

    def _on_granted(self, worker_id: str, message: Granted) -> None:
        if message.request_id in self._links:
            self._on_link_granted(worker_id, message)
            return
        entry = self._jobs.get(message.request_id)
        prefiller = self.fleet.choose("P", wanted=entry and entry.route and entry.route.prefill)
        if entry is None or prefiller is None:  # ended meanwhile, or about to: nobody will write, nobody will read
            self.fleet.release(message.destination, "request", "writer")
            self.fleet.let_go(worker_id, message.request_id)
            if entry is not None:
                self._end_reserving(entry)
                entry.stage = Stage.QUEUED
            return
        self._dequeue(entry)
        entry.timeline.mark(f"blocks granted by {worker_id}", self.clock())
        entry.stage = Stage.PREFILL
        entry.destination = message.destination
        entry.prefiller = prefiller
        entry.recomputes = entry.begun
        self.books.prefill(entry)
        self._end_reserving(entry)
        self._enter(entry, prefiller)
        self.fleet.send(prefiller, Prefill(entry.prefill_request, message.destination))

    def _on_prefilled(self, worker_id: str, message: Prefilled) -> None:
        self.fleet.wrote(worker_id, message.request_id)
        entry = self._jobs.get(message.request_id)
        if entry is None:  # ended meanwhile, and the request side of the lease was given back then
            self.fleet.release(message.destination, "writer")
            return
        entry.timeline.mark("KV transferred", self.clock())
        entry.stage = Stage.DECODE
        self.books.resume(entry)
        self._enter(entry, entry.server)
        written = message.written if entry.request.beam else entry.written()
        self.fleet.send(entry.server, Resume(entry.job, message.destination.lease_id, written, message.checksum))

    def _on_write_ended(self, worker_id: str, message: WriteEnded) -> None:
        self.fleet.wrote(worker_id, message.request_id)
        self.fleet.release(message.destination, "writer")

    # --------------------------------------------------------------------------------------- timing a link

    def _on_link_granted(self, worker_id: str, message: Granted) -> None:
        """Blocks that nobody will read."""
        job, destination = message.request_id, message.destination
        self.fleet.let_go(worker_id, job)
        self.fleet.release(destination, "request")
        if self._links[job] not in self.fleet.workers:
            self.fleet.release(destination, "writer")
            self._end_link(job, f"{self._links[job]} is gone")
            return
        self.fleet.write(self._links[job], job, destination)
        self.fleet.send(self._links[job], TimeLink(job, destination))

    def _on_link_timed(self, worker_id: str, message: LinkTimed) -> None:
        self.fleet.wrote(worker_id, message.request_id)
        self.fleet.release(message.destination, "writer")
        self._end_link(message.request_id, message)

    def _end_link(self, job: str, result: LinkTimed | str) -> None:
        if self._links.pop(job, None) is not None:
            self.link_times[job] = result

    # -------------------------------------------------------------------------------------- what goes wrong

    def _on_transfer_failed(self, worker_id: str, message: TransferFailed) -> None:
        self.fleet.wrote(worker_id, message.request_id)
        self.fleet.release(message.destination, "writer")
        self._end_link(message.request_id, message.error)
        self._retry(message.request_id, f"the transfer from {worker_id} to {message.destination.worker_id} failed "
                                        f"({message.error})")

    def _on_corrupted(self, worker_id: str, message: Corrupted) -> None:
        self._retry(message.request_id, f"what arrived at {worker_id} was not what was sent (checksum)")

    def _on_lost(self, worker_id: str, message: Lost) -> None:
        what, jobs = self.fleet.lose(worker_id, message.reason)
        if self.desk is not None:
            self.desk.lose(worker_id)
        for job in jobs:
            self._end_link(job, what)
            self._retry(job, what)

    def _retry(self, job: str, what: str) -> None:
        """An attempt came to nothing: back in line with what is written, unless that happened too often."""
        entry = self._jobs.get(job)
        if entry is None:
            return
        entry.timeline.mark(what, self.clock())
        failures = [*entry.failures, what]
        if len(failures) == MAX_ATTEMPTS:
            self._end(entry, FinishReason.ERROR, f"gave up after {MAX_ATTEMPTS} attempts: " + "; ".join(failures))
            return
        self._withdraw(entry)
        entry.fail(what)
        self._enqueue(entry)

    def _end_overdue(self) -> None:
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heappop(self._deadlines)
            entry = self._entries.get(request_id)
            if entry is not None and entry.request.deadline == deadline:
                seconds = deadline - entry.request.arrival_time
                self._end(entry, FinishReason.ERROR, f"timed out after {seconds:g} s (deadline given at submission)")

    def _until_deadline(self, timeout: float) -> float:
        """Seconds to wait: no longer than `timeout`, nor past the next deadline."""
        while self._deadlines and self._deadlines[0][1] not in self._entries:
            heappop(self._deadlines)
        return min(timeout, max(0.0, self._deadlines[0][0] - self.clock())) if self._deadlines else timeout

    # -------------------------------------------------------------------------------------------- endings

    def _end(self, entry: Entry, reason: FinishReason, error: str | None = None, was_stopped: bool = False) -> None:
        """End all that is open of a request, wherever it is. `was_stopped`: its last answer came to an end the client saw."""
        entry.timeline.mark(error or "cancelled", self.clock())
        self._withdraw(entry)
        for index in entry.answers:
            self._note_end(entry, index, FinishReason.STOP if was_stopped else reason, self.clock())
            self._say_end(entry, index, reason, error)
        self._forget(entry)

    def _cancel_answer(self, entry: Entry, index: int) -> None:
        if len(entry.answers) == 1:
            self._end(entry, FinishReason.ABORT, was_stopped=True)
            return
        self._note_end(entry, index, FinishReason.STOP, self.clock())
        self._say_end(entry, index, FinishReason.ABORT)
        if entry.stage is Stage.DECODE:
            self.fleet.send(entry.server, Cancel(entry.job, index))
        elif entry.stage is Stage.PREFILL and not entry.recomputes:
            self.fleet.send(entry.prefiller, Cancel(entry.job, index))
        self._drop_answer(entry, index)

    def _say_end(self, entry: Entry, index: int, reason: FinishReason, error: str | None = None) -> None:
        self._events.append(TokenEvent(
            entry.request.request_id, index, finish_reason=reason, error=error, time=self.clock()))

    def _note_end(self, entry: Entry, index: int, reason: FinishReason, when: float) -> None:
        """For the timeline and for the router, before the answer is dropped."""
        entry.timeline.ends.append((len(entry.answers[index].token_ids), when))
        if self.desk is not None:
            self.desk.tell(entry, index, reason)

    def _drop_answer(self, entry: Entry, index: int) -> None:
        """One answer has ended; with the last one, so has the request."""
        self.books.end(entry, index)
        del entry.answers[index]
        if not entry.answers:
            self._withdraw(entry, cancel=False)
            self._forget(entry)
        elif entry.stage is not Stage.QUEUED:
            self.fleet.seat(entry.server, entry.job, len(entry.answers))

    def _withdraw(self, entry: Entry, cancel: bool = True) -> None:
        """End an attempt; `cancel` says whether its worker has to be told. A worker that was asked to set blocks aside is
        answered when it answers, and one that writes a prompt's KV says itself when it has stopped."""
        del self._jobs[entry.job]
        if entry.stage in (Stage.QUEUED, Stage.RESERVING):
            self._end_reserving(entry)
            self._dequeue(entry)
            return
        if cancel:
            self.fleet.send(entry.prefiller if entry.stage is Stage.PREFILL else entry.server, Cancel(entry.job))
        if entry.stage is Stage.PREFILL:  # D has not adopted the lease
            self.fleet.release(entry.destination, "request")
        self.fleet.let_go(entry.server, entry.job)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.request.request_id]
        entry.stage = Stage.CLOSED
        entry.timeline.mark("finished", self.clock())
