"""The workers' parts in what they and the central scheduler say to each other, for a test to speak."""

from __future__ import annotations

from workers.fake_cluster import REASON, FakeClock, assert_nothing_in_hand

from nanopd.core import FinishReason, Request, SamplingParams, TokenEvent
from nanopd.engine.limits import Limits
from nanopd.messages import (
    Destination,
    Granted,
    Lost,
    Prefill,
    Prefilled,
    Refused,
    ReleaseLease,
    Reserve,
    Serve,
    SetRole,
    Tokens,
    Written,
)
from nanopd.router.central_scheduler import CentralScheduler

STOP = FinishReason.STOP


class Script:
    """An executor whose workers say what the test lets them say. `sent` is what they were told since last asked."""

    def __init__(self, roles, mode="disaggregated", **options):
        self.roles = {worker_id: worker_id[0] for worker_id in roles.split()}
        self.sent = []
        self.says = []
        self.waited = None  # the timeout of the last poll
        self.clock = FakeClock()
        self.central = CentralScheduler(self, mode, Limits(100, 64, 64, 4, 8), clock=self.clock, **options)
        self._leases = iter(range(100))

    def send(self, worker_id, message):
        self.sent.append((worker_id, message))

    def poll(self, timeout=0.0):
        self.waited = timeout
        says, self.says = self.says, []
        for worker_id, message in says:
            if isinstance(message, Lost):
                del self.roles[worker_id]
        return says

    idle = True

    def submit(self, *names, mode=None, timeout=None, beam=None, **params):
        now = self.clock()
        for name in names:
            self.central.submit(Request(name, [1, 2, 3], SamplingParams(**params), arrival_time=now, beam=beam,
                                        deadline=timeout and now + timeout), mode)

    def step(self, *says, timeout=0.0):
        """One step in which the workers say `says`, (worker id, message) each. Returns the events."""
        self.says = list(says)
        return self.central.step(timeout)

    def told(self):
        """(worker id, message type, request id or lease id) of what was sent since the last call."""
        sent, self.sent = self.sent, []
        return [(worker_id, type(message).__name__, name_of(message)) for worker_id, message in sent]

    def grant(self, worker_id, name):
        return worker_id, Granted(name, Destination(worker_id, next(self._leases), [7], 0))

    def refuse(self, worker_id, name):
        return worker_id, Refused(name)

    def stage(self, name):
        return self.central._entries[name].stage

    def assert_empty(self):
        assert_nothing_in_hand(self.central)


def name_of(message):
    if isinstance(message, (Serve, Reserve, Prefill)):
        return message.request.request_id
    if isinstance(message, SetRole):
        return message.role
    return message.lease_id if isinstance(message, ReleaseLease) else message.request_id


def destination(script, name):
    return script.central._entries[name].destination


def tokens(name, token=5, end=None, index=0):
    return Tokens([TokenEvent(name, index, token, finish_reason=end)])


def prefilled(where, name, *firsts):
    return Prefilled(name, where, [Written(index, [5], [-1.0], end) for index, end in firsts or ((0, None),)])


def lost(worker_id):
    return worker_id, Lost(REASON)


def in_prefill(script, **params):
    """Request "a" is computed by P0, its blocks are on D0. Returns where."""
    script.submit("a", **params)
    script.step(script.grant("D0", "a"))
    script.told()
    return destination(script, "a")


def in_decode(script, **params):
    """Request "a" writes on D0, with its first token, 5."""
    where = in_prefill(script, **params)
    script.step(("P0", tokens("a")), ("P0", prefilled(where, "a")))
    script.told()
