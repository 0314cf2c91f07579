"""A load on a cluster, served in a thread of its own that alone touches the cluster. No widgets.

    driver = LoadDriver(lambda: Cluster("tiny", "C:cpu P:cpu D:cpu", "adaptive"), Load(rate=4))
    driver.start()
    driver.change(rate=8, mix="long")
    driver.call(lambda cluster: cluster.status())
    driver.picture().requests[-1].mode
    driver.shutdown()

The load is open-loop: requests come when they come, however many are waiting.
"""

from __future__ import annotations

import gc
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from nanopd.config import MODES
from nanopd.core import Overloaded, SamplingParams, TokenEvent
from nanopd.router.routing import Decision
from nanopd.router.timeline import Timeline

if TYPE_CHECKING:
    from nanopd.cluster import Cluster

LENGTHS = {"short": (64, 256), "long": (1024, 2048)}  # tokens of a prompt, evenly between; the seed's
MIXES = {"short": ("short",), "long": ("long",), "mixed": ("short", "long")}
CPU_SHRINK = 4  # by this much prompts are shorter on a CPU, which is slower by more
UNIFORM = 1e4  # a temperature at which every token is as likely as any other
LONGEST = 8  # times the mean: no answer gets longer
KEPT = 1024  # requests, and samples
SAMPLE_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class Load:
    """What comes. Answers end by chance, each token being as likely to be the last one, so nobody knows their length before.

    Raises ValueError for a value that can't be.
    """

    rate: float = 2.0  # requests a second on average, at independent moments; 0: none
    mix: str = "mixed"  # of prompts, one of MIXES
    output_tokens: int = 32  # of an answer, on average
    mode: str | None = None  # of each request; None: the cluster's

    def __post_init__(self) -> None:
        if not (self.rate >= 0 and math.isfinite(self.rate)):
            raise ValueError(f"rate must be a number of requests a second of at least 0, got {self.rate!r}")
        if self.mix not in MIXES:
            raise ValueError(f"unknown mix {self.mix!r}; mixes are {', '.join(MIXES)}")
        if self.output_tokens < 2:
            raise ValueError(f"output_tokens must be at least 2, got {self.output_tokens!r}")
        if self.mode not in (None, *MODES):
            raise ValueError(f"unknown mode {self.mode!r}; modes are {', '.join(MODES)}")


@dataclass
class Seen:
    """A request as its client sees it. Times in seconds since the start; None: not yet."""

    request_id: str
    prompt_len: int
    arrival: float
    sent: float | None = None  # when it was decided where it goes
    mode: str | None = None  # the way it took
    path: str = ""
    first_token: float | None = None
    finish: float | None = None
    num_tokens: int = 0
    error: str | None = None
    expected: dict[str, Sequence[float]] = field(default_factory=dict)  # by the router of each way: (end to end, what others lose)

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot(self) -> float | None:
        if self.finish is None or self.first_token is None or self.num_tokens < 2:
            return None
        return (self.finish - self.first_token) / (self.num_tokens - 1)


@dataclass(frozen=True)
class Sample:
    """How things stood. `queue`: requests without a first token; `rate`: tokens a second since the sample before."""

    time: float
    queue: int
    rate: float


@dataclass(frozen=True)
class Picture:
    """All that there is to show: copies, the latest last."""

    elapsed: float
    requests: list[Seen]
    samples: list[Sample]
    num_open: int
    num_finished: int
    num_turned_away: int


@dataclass(frozen=True)
class Course:
    """Of a run. `loads`: (since when, which), seconds since the start; `turned_away`: when requests were."""

    loads: list[tuple[float, Load]]
    turned_away: list[float]


class LoadDriver:
    """Starts, serves and stops a load.

    Args:
        make_cluster: called in the driver's thread, at the first start.
        seed: of moments and lengths: with the same one, and the same rates, the same requests come at each start.
        keep: so many requests and samples, the latest; None: all.
    """

    def __init__(self, make_cluster: Callable[[], Cluster], load: Load | None = None, *, seed: int = 0,
                 keep: int | None = KEPT) -> None:
        self.make_cluster = make_cluster
        self.load = load or Load()
        self.cluster: Cluster | None = None
        self.error: Exception | None = None  # what ended the latest run, if it did not end well
        self._seed, self._keep = seed, keep
        self._words = random.Random(seed)  # of prompts; never begun anew, or they would be in the prefix cache at the next start
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()  # of all that `picture` shows
        self._clear()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def serving(self) -> bool:
        """Whether the cluster is up and the load is on."""
        return self.running and self._started is not None

    def start(self) -> None:
        """Begin anew, on the cluster of the last time where there is one. Raises RuntimeError while it runs."""
        if self.running:
            raise RuntimeError("the load is running: stop it first")
        self._clear()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="nanopd-load", daemon=True)
        self._thread.start()

    def change(self, **fields: Any) -> None:
        """Another load, from the next request on; `fields` are those of `Load`. Raises ValueError as it does."""
        self.load = replace(self.load, **fields)
        self._commands.put(self._keep_pace)

    def call(self, function: Callable[[Cluster], Any], timeout: float | None = 30.0) -> Any:
        """What a function of the cluster returns, called where and when nobody else touches it.

        Raises RuntimeError where there is no cluster, and what the function raises.
        """
        if not self.running:
            return function(self._there())
        future: Future[Any] = Future()
        self._commands.put(lambda: _settle(future, lambda: function(self._there())))
        return future.result(timeout)

    def wait(self, seconds: float) -> None:
        """Until they have passed, or the load has ended."""
        if self._thread is not None:
            self._thread.join(seconds)

    def stop(self) -> None:
        """End what is open, and return when nothing runs any more. The cluster stays up."""
        self._stopping.set()
        self._commands.put(lambda: None)  # wakes it
        if self._thread is not None:
            self._thread.join()

    def shutdown(self) -> None:
        """Stop, and give the memory back."""
        self.stop()
        if self.cluster is not None:
            self.cluster.shutdown()
            self.cluster = None
            gc.collect()

    def picture(self) -> Picture:
        """From any thread, at any time."""
        with self._lock:
            return Picture(self._elapsed(), [replace(one) for one in self._requests], list(self._samples), len(self._open),
                           self._num_finished, len(self._turned_away))

    def course(self) -> Course:
        """What was asked for, and when it was refused. From any thread, at any time."""
        with self._lock:
            return Course(list(self._loads), list(self._turned_away))

    # ------------------------------------------------------------------------------- in the driver's thread

    def _clear(self) -> None:
        with self._lock:
            self.error = None
            self._random = random.Random(self._seed)
            self._started: float | None = None
            self._ended: float | None = None
            self._requests: deque[Seen] = deque(maxlen=self._keep)
            self._samples: deque[Sample] = deque(maxlen=self._keep)
            self._loads: list[tuple[float, Load]] = []
            self._turned_away: list[float] = []
            self._open: dict[str, Seen] = {}
            self._unsent: dict[str, tuple[Timeline, str | None]] = {}  # with the mode that was asked for
            self._num_finished = self._num_tokens = 0
            self._pace, self._to_come, self._next_arrival = 0.0, self._random.expovariate(1.0), math.inf

    def _run(self) -> None:
        try:
            if self.cluster is None:
                self.cluster = self.make_cluster()
            self._started = time.monotonic()
            self._keep_pace()
            while not self._stopping.is_set():
                self._turn()
        except Exception as error:  # a thread's own words would be lost: whoever looks at the driver finds them
            self.error = error
        finally:
            self._end()

    def _turn(self) -> None:
        self._obey()
        self._submit_due()
        if self.cluster.has_work:
            events = self.cluster.step()
            with self._lock:
                self._take(events)
        else:
            self._wait()
        with self._lock:
            self._sample()

    def _end(self) -> None:
        with self._lock:
            self._ended = time.monotonic()
            still_open, self._open, self._unsent = list(self._open), {}, {}
        for request_id in still_open:
            with suppress(Exception):  # of a cluster that has failed
                self.cluster.cancel(request_id)
        self._obey()

    def _obey(self) -> None:
        with suppress(Empty):
            while True:
                self._commands.get_nowait()()

    def _wait(self) -> None:
        """Until the next arrival, command or sample."""
        with suppress(Empty):
            self._commands.get(timeout=min(max(0.0, self._next_arrival - time.monotonic()), SAMPLE_EVERY))()

    def _keep_pace(self) -> None:
        """Another rate changes when the next request comes, not which one it is: requests are `_to_come` apart in what is expected
        to come meanwhile, and a Poisson process of any rate is one of rate 1 in that measure."""
        now, load = time.monotonic(), self.load
        if self._pace:
            self._to_come = max(0.0, self._next_arrival - now) * self._pace
        self._pace = load.rate
        self._next_arrival = now + self._to_come / self._pace if self._pace else math.inf
        if not self._loads or self._loads[-1][1] != load:
            with self._lock:
                self._loads.append((self._elapsed(), load))

    def _submit_due(self) -> None:
        while self._next_arrival <= time.monotonic():
            due = self._next_arrival
            self._next_arrival = due + self._random.expovariate(1.0) / self._pace
            self._submit(due, self.load)

    def _submit(self, due: float, load: Load) -> None:
        limits = self.cluster.limits
        prompt, seed = self._prompt(load.mix), self._random.getrandbits(32)
        stops = tuple(range(max(1, round(limits.vocab_size / load.output_tokens))))
        sampling = SamplingParams(temperature=UNIFORM, stop_token_ids=stops, max_tokens=LONGEST * load.output_tokens, seed=seed)
        try:
            stream = self.cluster.submit({"prompt_token_ids": prompt}, sampling, mode=load.mode)
        except Overloaded:
            with self._lock:
                self._turned_away.append(due - self._started)
            return
        with self._lock:
            seen = Seen(stream.request_id, len(prompt), due - self._started)
            self._requests.append(seen)
            self._open[stream.request_id] = seen
            self._unsent[stream.request_id] = self.cluster.timeline(stream.request_id), load.mode

    def _prompt(self, mix: str) -> list[int]:
        low, high = LENGTHS[self._random.choice(MIXES[mix])]
        shrink = CPU_SHRINK if self.cluster.topology.devices[0] == "cpu" else 1
        return self._words.choices(range(self.cluster.limits.vocab_size), k=self._random.randint(low, high) // shrink)

    def _take(self, events: list[TokenEvent]) -> None:
        for request_id, (timeline, asked) in list(self._unsent.items()):
            if timeline.path:
                self._note_way(self._open[request_id], timeline, asked or self.cluster.mode)
                del self._unsent[request_id]
        for event in events:
            seen = self._open[event.request_id]
            moment = event.time - self._started
            if event.token_id is not None:
                seen.num_tokens += 1
                self._num_tokens += 1
                if seen.first_token is None:
                    seen.first_token = moment
            if event.finish_reason is not None:
                seen.finish, seen.error = moment, event.error
                seen.path = str(self.cluster.timeline(event.request_id))
                del self._open[event.request_id]
                self._unsent.pop(event.request_id, None)
                self._num_finished += 1

    def _note_way(self, seen: Seen, timeline: Timeline, asked: str) -> None:
        """The router's choice, where it was asked: a worker's role may have changed since the cluster was made."""
        seen.mode = timeline.decision.route.mode if timeline.decision else asked
        seen.expected = expected(timeline.decision) if timeline.decision else {}
        seen.sent = dict(timeline.marks)[f"sent to {timeline.path[0]}"] - self._started

    def _sample(self) -> None:
        elapsed = self._elapsed()
        last = self._samples[-1].time if self._samples else 0.0
        if elapsed - last < SAMPLE_EVERY:
            return
        queue = sum(seen.first_token is None for seen in self._open.values())
        self._samples.append(Sample(elapsed, queue, self._num_tokens / (elapsed - last)))
        self._num_tokens = 0

    def _elapsed(self) -> float:
        if self._started is None:
            return 0.0
        return (self._ended or time.monotonic()) - self._started

    def _there(self) -> Cluster:
        if self.cluster is None:
            raise RuntimeError("there is no cluster yet: start the load first")
        return self.cluster


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # whoever waits for it gets it
        future.set_exception(error)


def expected(decision: Decision) -> dict[str, Sequence[float]]:
    """Of each way the best route, see `Seen.expected`. Empty where the router gives no scores."""
    found: dict[str, Sequence[float]] = {}
    for score in decision.scores:  # the best first
        found.setdefault(score.route.mode, (score.e2e, score.terms.get("others", 0.0)))
    return found
