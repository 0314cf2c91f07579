"""Where the routers of chapter 08 meet: the traces, what is promised, and one run that ends whatever the router does.

All of it is simulated, by the costs of the H200's profile, as in `nanopd.workbook.routing`.
"""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random, SystemRandom
from threading import Thread
from time import perf_counter
from typing import Any, TypeVar

from nanopd.config import SLO
from nanopd.metrics import Summary
from nanopd.router.routing import Decision, Ended, Question, Router, WorkerView
from nanopd.simulator import Arrival, Result, Simulation
from nanopd.simulator.traces import read_trace
from nanopd.workbook import routing

WORKERS = {"C": 2, "P": 2, "D": 2}
PROMISE = SLO(ttft=0.5, tpot=0.010)
REQUESTS = 80  # of a trace
PATIENCE = 120.0  # seconds of waiting for a run, which takes one or two
STOPS = 10  # times that a thread is told to stop, within a second
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------ traces


@dataclass(frozen=True)
class Load:
    """What comes. `name` says which kind: see the strings "capstone.load.…", or it is a file's."""

    name: str
    arrivals: tuple[Arrival, ...]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self.arrivals[-1].time - self.arrivals[0].time


def turn(seed: int) -> Load:
    """Short questions with long answers, many a second; halfway they become long documents with short ones, and fewer."""
    random, now, arrivals = Random(seed), 0.0, []
    for number in range(REQUESTS):
        is_document = number >= REQUESTS // 2
        now += random.expovariate(22.5 if is_document else 90.0)
        prompt_len = random.randint(2000, 8000) if is_document else random.randint(50, 600)
        arrivals.append(_arrival(random, now, prompt_len, 4.0 if is_document else 5.3, 0.6))
    return Load("turn", tuple(arrivals))


def bursts(seed: int) -> Load:
    """Short questions, and of every twenty requests six long documents in quick succession."""
    random, now, arrivals = Random(seed), 0.0, []
    for number in range(REQUESTS):
        place = number % 20
        now += random.expovariate(50.0 if place > 14 else 45.0)
        prompt_len = random.randint(3000, 8000) if place >= 14 else random.randint(50, 600)
        arrivals.append(_arrival(random, now, prompt_len, 4.3, 0.8))
    return Load("bursts", tuple(arrivals))


def library(seed: int) -> Load:
    """Questions about sixteen documents, which the workers come to know."""
    random, now, arrivals = Random(seed), 0.0, []
    for _ in range(REQUESTS):
        now += random.expovariate(70.0)
        document = random.randrange(16)
        num_pieces = 4 + 2 * (document % 5)
        prompt_len = 512 * num_pieces + random.randint(20, 200)
        pieces = tuple(range(16 * document, 16 * document + num_pieces))
        arrivals.append(_arrival(random, now, prompt_len, 4.3, 0.7, pieces))
    return Load("library", tuple(arrivals))


def _arrival(random: Random, now: float, prompt_len: int, level: float, spread: float, prefix: tuple[int, ...] = ()) -> Arrival:
    output_len = min(max(round(random.lognormvariate(level, spread)), 2), 600)
    return Arrival(now, prompt_len, output_len, 1024, prefix)


def practice() -> Load:
    """The open one, always the same."""
    return turn(88)


def hidden(seed: int | None = None) -> list[Load]:
    """Three that nobody has seen. Without a seed, one is drawn as dice are, once in a session."""
    random = Random(_drawn() if seed is None else seed)
    return [kind(random.randrange(2**32)) for kind in (bursts, library, turn)]


@cache
def _drawn() -> int:
    return SystemRandom().randrange(2**32)


def from_file(path: str | Path, speed_up: float = 1.0, num_requests: int = REQUESTS) -> Load:
    """The first requests of a recorded trace, see `nanopd.simulator.traces`. Raises TraceError, or ConfigError for what can't be."""
    trace = read_trace(path).sped_up(speed_up).first(num_requests).cut_to(routing.SCHEDULER.max_model_len)
    return Load(trace.name, tuple(trace.arrivals))


# -------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Run:
    """What came of a router on a trace. Either `error`, or all the others."""

    summary: Summary | None = None
    goodput: float = 0.0  # requests a second that came, and met the SLO
    microseconds: float = 0.0  # a choice, on this machine
    error: BaseException | None = None

    @property
    def attainment(self) -> float:
        """Share of the requests that met the SLO; none where the run failed."""
        return self.summary.attainment or 0.0 if self.summary else 0.0


def run(make: Callable[[], Router], load: Load, patience: float = PATIENCE) -> Run:
    """Serve a trace with the router that `make` makes. What goes wrong, in it or by it, is in the answer."""
    try:
        return within(patience, lambda: _run(make(), load))
    except TimeoutError:
        return Run(error=TimeoutError(f"not done after {patience:g} s, where other routers need one or two"))
    except BaseException as error:  # a learner's code may raise what it likes, SystemExit too
        if isinstance(error, KeyboardInterrupt):
            raise
        return Run(error=error)


def simulate(router: Router, load: Load) -> tuple[Simulation, Result]:
    """For a look inside: `simulation.central.explain(request_id)`."""
    return routing.simulate(router, load.arrivals, WORKERS)


def _run(router: Router, load: Load) -> Run:
    watched = _watch(router)
    try:
        _, result = simulate(watched, load)
    except RuntimeError as error:
        raise watched.error or error from None
    if watched.error is not None:
        raise watched.error
    summary = result.summary(PROMISE)
    goodput = (summary.attainment or 0.0) * summary.num_requests / load.seconds
    return Run(summary, goodput, 1e6 * watched.seconds / watched.num_choices)


class _Watched:
    """A router whose choices are timed. Its first error is kept: the cluster has only words of it."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.seconds, self.num_choices = 0.0, 0
        self.error: Exception | None = None

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        if self.error is not None:  # in ended(), of which the cluster only warns
            raise self.error
        begin = perf_counter()
        try:
            return self._kept(self.router.choose, question, workers)
        finally:
            self.seconds += perf_counter() - begin
            self.num_choices += 1

    def ended(self, answer: Ended) -> None:
        tell = getattr(self.router, "ended", None)
        if tell is not None and self.error is None:
            with suppress(Exception):  # kept, and raised at the next choice
                self._kept(tell, answer)

    def _kept(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            self.error = self.error or error
            raise


def _watch(router: Router) -> _Watched:
    """Under the router's own name, which is in what the cluster says of it."""
    return type(type(router).__name__, (_Watched,), {})(router)


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, or raises. TimeoutError where it takes longer: then it is told to stop, and left behind."""
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def do() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    thread = Thread(target=do, daemon=True)
    thread.start()
    try:
        result, error = done.get(timeout=seconds)
    except (queue.Empty, KeyboardInterrupt) as reason:
        _stop(thread)
        if isinstance(reason, KeyboardInterrupt):
            raise
        raise TimeoutError(f"it takes longer than {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def _stop(thread: Thread) -> None:
    """Raise SystemExit in it, and again where that was lost, as it is in a finalizer. One that waits in C is left behind."""
    for _ in range(STOPS):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        thread.join(1 / STOPS)
        if not thread.is_alive():
            return
