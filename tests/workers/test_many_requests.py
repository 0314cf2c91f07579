"""Many requests through fake workers, with random cancels and losses: all are accounted for."""

from __future__ import annotations

import random

import pytest
from scheduler.fakes import assert_plans_were_sound
from workers.fake_cluster import FakeCluster

from nanopd.core import BeamSearchParams, FinishReason, Overloaded, Request, SamplingParams

MAX_OPEN = 200


def serve_many(number, seed=1):
    """`number` requests, a twentieth of which are cancelled somewhere on their way; P0 and D0 die on the way, too."""
    luck = random.Random(seed)
    cluster = FakeCluster("P:cpu P:cpu D:cpu D:cpu", is_late=lambda: luck.random() < 0.1, max_queued=MAX_OPEN,
                          luck=lambda: "late" if luck.random() < 0.1 else None,
                          num_blocks=96, max_num_seqs=24, budget=128, max_model_len=32)
    num_submitted, losses, cancelled = 0, {number // 3: "P0", 2 * number // 3: "D0"}, set()
    while num_submitted < number:
        try:
            cluster.submit(Request(str(num_submitted), [luck.randrange(12) for _ in range(luck.randint(1, 6))],
                                   SamplingParams(max_tokens=luck.randint(1, 4))))
            num_submitted += 1
        except Overloaded:
            cluster.step(check=False)
        if num_submitted in losses:
            cluster.lose(losses.pop(num_submitted), num_said=luck.randint(0, 2))
        if luck.random() < 0.05:
            request_id = str(luck.randrange(max(0, num_submitted - MAX_OPEN), num_submitted))
            cancelled |= {event.request_id for event in cluster.cancel(request_id) if event.finish_reason}
    cluster.settle(max_steps=100 * MAX_OPEN, check=False)
    return cluster, cancelled


def test_ten_thousand_requests_with_cancels_and_two_losses():
    cluster, cancelled = serve_many(10_000)
    cluster.assert_empty()
    for worker in cluster.living.values():
        assert_plans_were_sound(worker.engine.runner)
    assert list(cluster.living) == ["P1", "D1"] and len(cluster.ledger.requests) == 10_000
    ends = cluster.ledger.ends
    assert {request_id for (request_id, _), reason in ends.items() if reason is FinishReason.ABORT} == cancelled
    assert len(cancelled) > 100 and not cluster.ledger.errors
    assert any(len(timeline.jobs) > 1 for timeline in cluster.central.timelines.values())


def lose_one_of_each_role(seed):
    """Forty requests through both pipelines; in no step is a loss likelier than in another."""
    luck = random.Random(seed)
    late = luck.choice([0, 0.3, 0.6])
    cluster = FakeCluster("C:cpu C:cpu P:cpu P:cpu D:cpu D:cpu", is_late=lambda: luck.random() < late,
                          luck=lambda: luck.choices(["late", "broken", "corrupted", None], [0.3, 0.02, 0.02, 0.66])[0],
                          num_blocks=40, block_size=3, max_num_seqs=6, budget=12, chunk=luck.choice([None, 3]), max_model_len=24)
    victims = {luck.randrange(40): f"{role}{luck.randrange(2)}" for role in "CPD"}
    for number in range(40):
        beam = BeamSearchParams(2, luck.randint(1, 6)) if luck.random() < 0.1 else None
        cluster.submit(Request(str(number), [luck.randrange(3) for _ in range(luck.randint(1, 9))],
                               SamplingParams(n=luck.choice([1, 1, 2, 3]), max_tokens=luck.randint(1, 12)), beam=beam),
                       luck.choice(["collocated", "disaggregated"]))
        cluster.step(luck.randint(0, 2))
        if number in victims:
            cluster.lose(victims[number], num_said=luck.randint(0, 3))
        if cluster.ledger.open and luck.random() < 0.1:
            cluster.cancel(luck.choice(cluster.ledger.open), luck.choice([None, 0, 1]))
    cluster.settle()
    return cluster


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_one_worker_of_each_role_is_lost_at_any_time(first):
    """With the other one left all go on, unless they are unlucky four times."""
    retried = 0
    for seed in range(first, first + 10):
        cluster = lose_one_of_each_role(seed)
        cluster.assert_empty()
        assert all(error.startswith("gave up after 4 attempts") for error in cluster.ledger.errors.values())
        retried += sum(len(timeline.jobs) > 1 for timeline in cluster.central.timelines.values())
    assert retried > 10
