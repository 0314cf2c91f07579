"""Both pipelines over fake models: real schedulers, workers and central scheduler, dicts for caches, no tensor anywhere.

One executor steps the workers in turn; the other lets messages and workers dawdle, as processes would, and loses
workers. Transfers arrive when they are looked for, or later, fail, or bring something else than was sent.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import count

from scheduler.fakes import Ledger, assert_engine_is_empty, assert_plans_were_sound, make_engine

from nanopd.config import Topology
from nanopd.engine.limits import Limits
from nanopd.messages import Lost
from nanopd.router.book import FIELDS, Page
from nanopd.router.central_scheduler import CentralScheduler
from nanopd.router.entry import Stage
from nanopd.router.routing import Decision, Route
from nanopd.workers.executors import InlineExecutor
from nanopd.workers.transfer import TransferError
from nanopd.workers.worker import Worker

NUM_LAYERS = 2
REASON = "killed by SIGKILL"


class FakeClock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self):
        return self.now


class FakeWorker(Worker):
    def _checksum(self, request, block_ids, num_cached):
        size = self.manager.block_size
        positions = range(num_cached // size * size, len(request.prompt_token_ids))
        return hash(tuple(layer.get((block_ids[position // size], position % size))
                          for layer in self.cache.layers for position in positions))


class FakeTransport:
    """Copies whole blocks, at the last moment: when somebody looks whether they have arrived. Then `luck` decides: "late",
    "broken" (the link, with all that is on its way) or "corrupted", if it is anything.

    `sent` keeps what it was asked to send, a layer at a time.
    """

    name = "fake"

    def __init__(self, source, destination, block_size, sent, luck):
        self.source, self.destination, self.block_size, self.sent, self.luck = source, destination, block_size, sent, luck
        self.on_the_way = deque()  # (number, layer, source block, destination block)
        self.numbers = count(1)
        self.num_broken = 0  # tickets up to this number will never arrive
        self.gone = False  # the worker at the other end
        self.happened = Counter()

    def send(self, layers, source_blocks, destination_blocks):
        if self.gone:
            raise TransferError("it is gone")
        number = next(self.numbers)
        for layer in layers:
            self.sent.append((layer, list(source_blocks), list(destination_blocks)))
            self.on_the_way += [(number, layer, *pair) for pair in zip(source_blocks, destination_blocks, strict=True)]
        return FakeTicket(self, number)

    def arrived(self, number):
        what = self.luck() if any(waiting <= number for waiting, *_ in self.on_the_way) else None
        self.happened[what] += 1
        if what == "broken":
            self.on_the_way.clear()
            self.num_broken = next(self.numbers)
        if self.gone or number <= self.num_broken:
            raise TransferError("it is gone" if self.gone else "the link broke")
        if what == "late":
            return False
        while self.on_the_way and self.on_the_way[0][0] <= number:
            _, layer, source, destination = self.on_the_way.popleft()
            for offset in range(self.block_size):
                key = self.source.layers[layer].get((source, offset))
                self.destination.layers[layer][destination, offset] = "noise" if what == "corrupted" else key
        return True

    def close(self):
        """One of the two ends is gone."""
        self.gone = True
        self.on_the_way.clear()


class FakeTicket:
    def __init__(self, transport, number):
        self.transport, self.number = transport, number

    def wait(self, timeout=None):
        return self.transport.arrived(self.number)


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
        self.announced = set()  # workers whose loss has been told

    def send(self, worker_id, message):
        assert worker_id not in self.announced, f"{worker_id} is lost, and is sent {message}"
        if worker_id in self.workers:
            self.inboxes[worker_id].append(message)

    def poll(self, timeout=0.0):
        for worker_id, worker in self.workers.items():
            while self.inboxes[worker_id] and not self.is_late():
                worker.inbox.append(self.inboxes[worker_id].popleft())
            if not self.is_late():
                worker.step()
            self.outboxes[worker_id] += worker.outbox
            worker.outbox.clear()
        said = [(worker_id, outbox.popleft()) for worker_id, outbox in self.outboxes.items()
                for _ in list(outbox) if not self.is_late()]
        for worker_id, message in said:
            if isinstance(message, Lost):
                del self.roles[worker_id]
        return said

    def lose(self, worker_id, num_said):
        """The worker's process is killed. Of what is in its outbox, `num_said` messages are on their way already."""
        del self.workers[worker_id]
        self.inboxes[worker_id].clear()
        outbox = self.outboxes[worker_id]
        while len(outbox) > num_said:
            outbox.pop()
        outbox.append(Lost(REASON))

    @property
    def idle(self):
        return not (any(self.inboxes.values()) or any(self.outboxes.values())
                    or any(worker.has_work for worker in self.workers.values()))


class FakeCluster:
    """`options` are make_engine's; those in `by_role`, {"D": dict(num_blocks=6)}, go before them.

    `luck()` says what becomes of a transfer that is looked for, see FakeTransport.
    """

    def __init__(self, topology="P:cpu D:cpu", mode="disaggregated", *, is_late=None, by_role=None, luck=lambda: None,
                 max_queued=16_384, router=None, **options):
        self.sent = []
        self.workers = {}  # also those that are lost
        self.links = {}  # (source id, destination id) -> FakeTransport
        self.luck = luck
        for placement in Topology.parse(topology).placements:
            worker_id = f"{placement.role}{sum(worker.role == placement.role for worker in self.workers.values())}"
            engine = make_engine(num_layers=NUM_LAYERS, **{**options, **(by_role or {}).get(placement.role, {})})
            self.workers[worker_id] = FakeWorker(
                worker_id, placement.role, engine, engine.runner.cache, self._connect(worker_id, engine), checksums=True)
        workers = list(self.workers.values())
        self.executor = InlineExecutor(workers) if is_late is None else DawdlingExecutor(workers, is_late)
        limits = Limits.tightest(worker.engine.limits for worker in workers)
        self.clock = FakeClock()
        self.central = CentralScheduler(self.executor, mode, limits, max_queued=max_queued, clock=self.clock, router=router)
        self.ledger = Ledger(limits.max_len, NUM_LAYERS)

    def _connect(self, source_id, engine):
        source, size = engine.runner.cache, engine.scheduler.manager.block_size

        def connect(worker_id):
            if worker_id not in self.living:
                raise TransferError("it is gone")
            if (source_id, worker_id) not in self.links:
                self.links[source_id, worker_id] = FakeTransport(
                    source, self.workers[worker_id].cache, size, self.sent, self.luck)
            return self.links[source_id, worker_id]

        return connect

    @property
    def living(self):
        return self.executor.workers

    def submit(self, request, mode=None):
        self.central.submit(request, mode)
        self.ledger.add(request)

    def step(self, times=1, check=True):
        for _ in range(times):
            self.ledger.take(self.central.step())
            if check:
                assert_books_balance(self.central)
            if isinstance(self.executor, DawdlingExecutor):
                self.executor.announced = self.workers.keys() - self.executor.roles.keys()
            for worker in self.living.values() if check else ():
                worker.manager.check()
                assert_plans_were_sound(worker.engine.runner)

    def cancel(self, request_id, index=None):
        return self.ledger.take(self.central.cancel(request_id, index))

    def lose(self, worker_id, num_said=0):
        """Kill a worker. Whatever was on its way to it or from it is gone, but for `num_said` messages."""
        self.executor.lose(worker_id, num_said)
        for ends, link in self.links.items():
            if worker_id in ends:
                link.close()

    def settle(self, max_steps=1000, check=True):
        """Step until nobody has anything left to do or to say. Returns how many steps that took."""
        for steps in range(max_steps):
            if not self.central.has_work and self.executor.idle:
                return steps
            self.step(check=check)
        raise AssertionError(f"not done after {max_steps} steps: {self.ledger.open}")

    def assert_empty(self):
        assert_cluster_is_empty(self.central, self.living)
        self.ledger.assert_every_answer_ended_once()
        self.ledger.assert_tokens_are_right()


def assert_nothing_in_hand(central):
    """Every request has ended and been forgotten, and no worker is thought to have one."""
    assert not central.has_work and not central._jobs and not any(central._lines.values())
    for worker_id, worker in central.fleet.workers.items():
        assert (worker.answers, worker.writes, worker.intended, worker.load) == ({}, {}, set(), 0), worker_id
        assert (worker.book.pages, worker.book.total) == ({}, Page()), worker_id


def assert_books_balance(central):
    """What the books say is what the open requests amount to, and the sums are those of the pages."""
    entries = {entry.job: entry for entry in central._entries.values()}
    for worker_id, worker in central.fleet.workers.items():
        book, pages = worker.book, worker.book.pages
        for name in FIELDS:
            assert getattr(book.total, name) == sum(getattr(page, name) for page in pages.values()), (worker_id, name)
        assert pages.keys() == worker.answers.keys() | worker.writes.keys() | worker.intended, worker_id
        assert not (worker.awaits and worker.writes), f"{worker_id} keeps room for others and computes for others"
        for job, page in pages.items():
            assert page.seats == worker.answers.get(job, 0)
            if job in entries:
                assert_page_is_right(page, entries[job], worker_id)


def assert_page_is_right(page, entry, worker_id):
    prompt_len, answers = len(entry.request.prompt_token_ids), entry.answers.values()
    written = sum(len(answer.token_ids) for answer in answers)
    if worker_id == entry.server:
        assert page.seats == len(answers) and page.sending == 0
        assert entry.stage is Stage.DECODE or (page.held, page.queued, page.decodes) == (prompt_len, 0, 0)
        if page.decodes:
            assert (page.decodes, page.contexts) == (len(answers), prompt_len * len(answers) + written) and page.queued == 0
            assert page.held == prompt_len + written
        elif entry.stage is Stage.DECODE:
            assert 0 < page.queued <= prompt_len + written == page.held and page.contexts == 0
    else:
        prefiller = entry.route.prefill if entry.stage is Stage.RESERVING else entry.prefiller
        assert worker_id == prefiller and page.held == prompt_len and (page.decodes, page.contexts) == (0, 0)
        assert (page.queued == 0) == (page.pairs == 0) and page.queued <= prompt_len
        assert page.queued == 0 or page.sending == 0


class ErraticRouter:
    """Goes wherever there is room, hesitates, and now and then is wrong or breaks."""

    def __init__(self, luck, wrong=0.0):
        self.luck, self.wrong = luck, wrong
        self.happened = Counter()

    def choose(self, question, workers):
        what = self.luck.choices(["right", "hesitates", "wrong", "breaks"], [0.8 - self.wrong, 0.2, self.wrong / 2, self.wrong / 2])[0]
        self.happened[what] += 1
        if what == "breaks":
            raise IndexError("out of luck")
        if what == "wrong":
            return self.luck.choice([Decision(Route("X0", "D0")), Decision(Route("D0", "P0")), Decision("C0"), Route("P0", "D0"), 7])
        open_ones = {role: [worker.worker_id for worker in workers if worker.role == role and worker.is_open] for role in "CPD"}
        routes = [Route(p, d) for p in open_ones["P"] + open_ones["C"] for d in open_ones["D"] + open_ones["C"]]
        assert routes, "a router is asked where there is something to choose from"
        return Decision(self.luck.choice(routes)) if what == "right" else None


def assert_cluster_is_empty(central, workers):
    """Nor does any worker."""
    assert_nothing_in_hand(central)
    for worker in workers.values():
        assert (worker.transfers, worker._leases, list(worker.inbox)) == ({}, {}, [])
        assert_engine_is_empty(worker.engine)
