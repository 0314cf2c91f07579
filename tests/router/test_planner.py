"""Which split suits which load: facts that must come out, whatever the constants are."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router.views import views, writes

from nanopd.config import ConfigError
from nanopd.cost_model.analytical import CostModel, DecodeCost, MixedCost, PrefillCost, Shape, StepWork
from nanopd.router.planner import Mix, Planner, Queue, Split, WorkerSize
from nanopd.router.role_keeper import ENOUGH, EVERY, RoleKeeper

# A device that computes 20,000 tokens of prompts a second, reads its weights in 5 ms, and its cache at 50 million tokens a second.
PREFILL, DECODE = PrefillCost(0.01, 5e-5, 1e-9, 4.0), DecodeCost(0.005, 2e-5, 2e-8, 4.0)
COST = CostModel(PREFILL, DECODE, MixedCost.assumed(PREFILL, DECODE), (), Shape(32, 131072))
SIZE = WorkerSize(max_num_seqs=256, max_num_batched_tokens=2048, cache_tokens=600_000)
RAG = Mix(tuple((prompt, 100) for prompt in range(3000, 7000, 100)))
CHAT = Mix(tuple((prompt, 400) for prompt in range(50, 450, 10)))


def slo(ttft: float | None, tpot: float | None) -> SimpleNamespace:
    return SimpleNamespace(ttft=ttft, tpot=tpot)


def test_every_split_keeps_every_worker_busy():
    splits = Split.all_of(4)
    assert len(splits) == len(set(splits)) == 7
    assert all(split.num_workers == 4 and bool(split.P) == bool(split.D) for split in splits)
    assert [str(split) for split in Split.all_of(1)] == ["C=1"]


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("busy", [0.3, 0.6, 0.85])
def test_a_queue_is_near_one_that_is_played_through(servers, busy):
    rng = random.Random(1)
    services = [rng.uniform(0.01, 0.2) for _ in range(50)]
    rate, limit = busy * servers / (sum(services) / 50), 0.3
    now, free, in_time, arrivals = 0.0, [0.0] * servers, 0, 100_000
    for _ in range(arrivals):
        now += rng.expovariate(rate)
        first = min(range(servers), key=free.__getitem__)
        free[first] = max(now, free[first]) + rng.choice(services)
        in_time += free[first] - now <= limit
    assert Queue(services, servers).attainment(rate, limit) == pytest.approx(in_time / arrivals, abs=0.03)


def test_an_overloaded_queue_serves_nobody_in_time():
    assert Queue([0.1], 2).attainment(20.1, 100.0) == 0.0


@given(st.sampled_from([RAG, CHAT]), st.sampled_from(Split.all_of(4)), st.sampled_from("CPD"),
       st.floats(0.05, 5.0), st.floats(0.006, 0.1))
@settings(max_examples=60, deadline=None)
def test_more_workers_or_more_patience_never_serve_fewer(mix, split, role, ttft, tpot):
    def capacity(split: Split, ttft: float | None, tpot: float | None) -> float:
        return Planner(COST, SIZE, slo(ttft, tpot)).capacity(split, mix)

    capacity_now = capacity(split, ttft, tpot)
    more = Split(**{each: getattr(split, each) + (each == role) for each in "CPD"})
    assert capacity(more, ttft, tpot) >= 0.98 * capacity_now
    assert capacity(split, 2 * ttft, tpot) >= 0.98 * capacity_now
    assert capacity(split, ttft, None) >= 0.98 * capacity_now


def test_throughput_alone_asks_for_collocation_and_a_tight_tpot_for_disaggregation():
    assert Planner(COST, SIZE).rank(4, RAG)[0][0] == Split(C=4)
    best, _ = Planner(COST, SIZE, slo(2.0, 0.012)).rank(4, RAG)[0]
    assert best.P > 0 and best.D > 0


def test_what_no_worker_can_do_in_time_has_no_capacity():
    assert Planner(COST, SIZE, slo(None, 0.001)).capacity(Split(C=2, P=1, D=1), CHAT) == 0.0


def test_errors_are_said():
    with pytest.raises(ConfigError, match="empty"):
        Mix(())
    with pytest.raises(ConfigError, match="at least 1 worker"):
        Planner(COST, SIZE).rank(0, CHAT)


class TestRoleKeeper:
    def keeper(self) -> RoleKeeper:
        return RoleKeeper(Planner(COST, SIZE, slo(2.0, 0.012)))

    @staticmethod
    def load(keeper: RoleKeeper, mix: Mix, share: float, split: Split, start: float) -> float:
        """Arrivals at this share of a split's capacity. Returns the time after them."""
        rate = share * Planner(COST, SIZE, slo(2.0, 0.012)).capacity(split, mix)
        for number in range(64):
            prompt, answer = mix.lengths[number % len(mix.lengths)]
            keeper.arrived(start + number / rate, prompt, answer)
        return max(start + 64 / rate, start + EVERY)

    def test_leads_to_the_best_split_and_stays_there(self):
        keeper, workers, now = self.keeper(), views("C0 C1 C2 C3", C1=writes(9)), 10.0
        best, _ = Planner(COST, SIZE, slo(2.0, 0.012)).rank(4, RAG)[0]
        for _ in range(4):
            now = self.load(keeper, RAG, 1.5, Split(C=4), now)
            parts = keeper.parts(now, workers)
            assert Split(**Counter(parts.get(worker.worker_id, "C") for worker in workers)) == best
        assert parts["C1"] == "D"  # it goes on with what it does

    def test_leaves_workers_alone_that_have_little_to_do(self):
        keeper = self.keeper()
        now = self.load(keeper, RAG, 0.2, Split(C=4), 10.0)
        assert keeper.parts(now, views("C0 C1 C2 C3")) == {}

    def test_judges_neither_by_few_nor_all_the_time(self):
        keeper, workers = self.keeper(), views("C0 C1 C2 C3")
        for number in range(ENOUGH - 1):
            keeper.arrived(100 + number * 1e-3, 5000, 100)
        assert keeper.parts(110.0, workers) == {}
        now = self.load(keeper, RAG, 1.5, Split(C=4), 100.1)
        parts = keeper.parts(now, workers)
        assert parts
        for worker in workers:
            worker.running = StepWork(0, 0.0, 40 * (parts.get(worker.worker_id) == "P"), 0)
        assert keeper.parts(now + EVERY / 2, workers) == parts
