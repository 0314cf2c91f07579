"""Collocated workers as either end of a pair: room is kept for what comes from elsewhere, and nobody waits in a circle."""

from __future__ import annotations

import pytest
from workers.fake_cluster import FakeCluster

from nanopd.core import Request, SamplingParams
from nanopd.messages import Granted, Refused, ReleaseLease, Reserve, Serve
from nanopd.router.routing import Decision, Route


def request(name, length=8, n=1, max_tokens=4):
    sampling = SamplingParams(n=n, temperature=1 if n > 1 else 0, max_tokens=max_tokens, ignore_eos=True)
    return Request(name, [i * i % 11 + 1 for i in range(length)], sampling)


class Crosswise:
    """From each of two workers to the other: requests with an even number this way, the others that way."""

    def choose(self, question, workers):
        if not all(worker.is_open for worker in workers):
            return None
        return Decision(Route("C1", "C0") if int(question.request_id) % 2 else Route("C0", "C1"))


@pytest.mark.parametrize("scarce", [dict(max_num_seqs=2), dict(num_blocks=8)], ids=["seats", "blocks"])
def test_two_that_compute_for_each_other_never_wait_for_each_other(scarce):
    cluster = FakeCluster("C:cpu C:cpu", "adaptive", router=Crosswise(), **scarce)
    for number in range(16):
        cluster.submit(request(str(number)))
    cluster.settle()
    cluster.assert_empty()
    paths = {str(timeline) for timeline in cluster.central.timelines.values()}
    assert paths == {"C0 -> C1", "C1 -> C0"}


def one(**options):
    return FakeCluster("C:cpu", "collocated", **options).workers["C0"]


def told(worker, *messages):
    """What it says to these and a step."""
    worker.inbox.extend(messages)
    worker.step()
    said = [message for message in worker.outbox if isinstance(message, Granted | Refused)]
    worker.outbox.clear()
    return said


def test_a_worker_with_prompts_in_line_grants_blocks_where_it_has_room():
    worker = one(max_num_seqs=4, num_blocks=64, budget=8)
    said, = told(worker, Serve(request("a", 30), []), Serve(request("b", 30), []), Reserve(request("x")))
    assert worker.engine.scheduler.waiting and isinstance(said, Granted)


def test_seats_of_those_in_line_are_not_granted_away():
    worker = one(max_num_seqs=4, num_blocks=64, budget=8)
    said = told(worker, Serve(request("a", 30), []), Serve(request("b", 30, n=2), []), Reserve(request("x")), Reserve(request("y")))
    assert [type(each) for each in said] == [Granted, Refused]


def test_blocks_that_the_first_in_line_waits_for_are_not_granted_away():
    worker = one(max_num_seqs=8, num_blocks=10, budget=64, caching=False)
    told(worker, Serve(request("a", 24), []))
    said, = told(worker, Serve(request("b", 20), []), Reserve(request("x", 4)))
    assert isinstance(said, Refused)


def test_a_promised_seat_is_kept_until_the_lease_is_let_go():
    worker = one(max_num_seqs=2, num_blocks=64)
    granted, = told(worker, Reserve(request("x", n=2)))
    told(worker, Serve(request("a"), []))
    scheduler = worker.engine.scheduler
    assert scheduler.num_seats_promised == 2 and len(scheduler.waiting) == 1 and not scheduler.running
    lease_id = granted.destination.lease_id
    told(worker, ReleaseLease(lease_id, "request"))
    assert scheduler.num_seats_promised == 0 and scheduler.num_seats_taken == 1
    told(worker, ReleaseLease(lease_id, "writer"))
    assert worker.manager.leases == []
