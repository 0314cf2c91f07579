"""Which split suits which load: facts that must come out, whatever the constants are."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router.views import question, views, writes

from nanopd.config import SLO, ConfigError
from nanopd.cost_model.analytical import CostModel, DecodeCost, MixedCost, PrefillCost, Shape
from nanopd.router.planner import Mix, Planner, Queue, Split, WorkerSize
from nanopd.router.role_keeper import BUSY, ENOUGH, EVERY, RoleKeeper
from nanopd.router.routing import Question

# A device that computes 20,000 tokens of prompts a second, reads its weights in 5 ms, and its cache at 50 million tokens a second.
PREFILL, DECODE = PrefillCost(0.01, 5e-5, 1e-9, 4.0), DecodeCost(0.005, 2e-5, 2e-8, 4.0)
COST = CostModel(PREFILL, DECODE, MixedCost.assumed(PREFILL, DECODE), (), Shape(32, 131072))
SIZE = WorkerSize(max_num_seqs=256, max_num_batched_tokens=2048, cache_tokens=600_000)
RAG = Mix(tuple((prompt, 100) for prompt in range(3000, 7000, 100)))
CHAT = Mix(tuple((prompt, 400) for prompt in range(50, 450, 10)))
TIGHT = SLO(2.0, 0.012)


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
    def capacity(split: Split, slo: SLO) -> float:
        return Planner(COST, SIZE, slo).capacity(split, mix)

    capacity_now = capacity(split, SLO(ttft, tpot))
    more = Split(**{each: getattr(split, each) + (each == role) for each in "CPD"})
    assert capacity(more, SLO(ttft, tpot)) >= 0.98 * capacity_now
    assert capacity(split, SLO(2 * ttft, tpot)) >= 0.98 * capacity_now
    assert capacity(split, SLO(ttft, 2 * tpot)) >= 0.98 * capacity_now


def test_throughput_alone_asks_for_collocation_and_a_tight_tpot_for_disaggregation():
    assert Planner(COST, SIZE).rank(4, RAG)[0][0] == Split(C=4)
    best, _ = Planner(COST, SIZE, TIGHT).rank(4, RAG)[0]
    assert best.P > 0 and best.D > 0


def test_what_no_worker_can_do_in_time_has_no_capacity():
    assert Planner(COST, SIZE, SLO(60.0, 0.001)).capacity(Split(C=2, P=1, D=1), CHAT) == 0.0


def test_errors_are_said():
    with pytest.raises(ConfigError, match="empty"):
        Mix(())
    with pytest.raises(ConfigError, match="at least 1 worker"):
        Planner(COST, SIZE).rank(0, CHAT)


def test_of_many_workers_few_splits_are_looked_at_and_the_best_is_among_them():
    planner = Planner(COST, SIZE, TIGHT)
    for mix in (RAG, CHAT):
        ranked = planner.rank(8, mix)
        assert len(ranked) < len(Split.all_of(8)) / 2
        assert ranked[0][1] >= 0.98 * max(planner.capacity(split, mix) for split in Split.all_of(8))
    assert len(planner.rank(1000, RAG)) < 20


@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4), st.sampled_from([RAG, CHAT]))
@settings(max_examples=40, deadline=None)
def test_workers_that_keep_to_their_part_are_in_every_split(prefill, decode, soft, mix):
    number = prefill + decode + soft
    ranked = Planner(COST, SIZE, TIGHT).rank(number, mix, Split(P=prefill, D=decode))
    assert ranked
    assert all(split.P >= prefill and split.D >= decode and split.num_workers == number for split, _ in ranked)


def request(when: float, prompt_len: int, answer_len: int) -> Question:
    return question(prompt_len, max_tokens=answer_len, arrival=when, now=when)


class TestRoleKeeper:
    FOUR = "C0 C1 C2 C3"

    @staticmethod
    def load(keeper: RoleKeeper, mix: Mix, share: float, begin: float = 10.0, requests: int = 256) -> float:
        """Arrivals at this share of what four collocated workers can serve in time. Returns the time after them."""
        rate = share * Planner(COST, SIZE, TIGHT).capacity(Split(C=4), mix)
        draw, now = random.Random(0), begin
        for _ in range(requests):
            now += draw.expovariate(rate)
            keeper.arrived(request(now, *draw.choice(mix.lengths)))
        return max(now, begin + EVERY)

    @pytest.fixture
    def keeper(self) -> RoleKeeper:
        return RoleKeeper(Planner(COST, SIZE, TIGHT), lambda question: question.max_tokens)

    def test_long_prompts_under_load_lead_to_the_best_split(self, keeper):
        now = self.load(keeper, RAG, 1.2)
        best = Planner(COST, SIZE, TIGHT).rank(4, RAG)[0][0]
        assert Counter(keeper.parts(now, views(self.FOUR)).values()) == {"P": best.P, "D": best.D}

    def test_those_that_write_most_go_on_with_that(self, keeper):
        now = self.load(keeper, RAG, 1.2)
        parts = keeper.parts(now, views(self.FOUR, C0=writes(3), C1=writes(9), C2=writes(1)))
        assert parts == {"C0": "P", "C1": "D", "C2": "P", "C3": "P"}

    def test_another_load_leads_to_another_plan(self, keeper):
        now = self.load(keeper, RAG, 1.2)
        before = dict(keeper.parts(now, views(self.FOUR)))
        now = self.load(keeper, CHAT, 1.0, now)
        after = keeper.parts(now, views(self.FOUR))
        assert Counter(before.values())["D"] < Counter(after.values())["D"]  # prompts are short, and answers long

    def test_what_is_expected_of_answers_counts_as_it_is_now(self):
        """Not as it was when the requests came."""
        expected = 10.0
        keeper = RoleKeeper(Planner(COST, SIZE, TIGHT), lambda question: expected)
        now = self.load(keeper, RAG, 1.0)
        few = keeper.parts(now, views(self.FOUR))
        expected = 800.0
        assert Counter(keeper.parts(now + EVERY, views(self.FOUR)).values())["D"] > Counter(few.values())["D"]

    def test_parts_are_for_all_or_for_none(self, keeper):
        for mix in (RAG, CHAT):
            for share in (0.7, 1.0, 1.5):
                now = self.load(keeper, mix, share, keeper._judged)
                assert len(keeper.parts(now, views(self.FOUR))) in (0, 4)

    @pytest.mark.parametrize("share", [BUSY / 4, BUSY * 0.8])
    def test_who_has_little_to_do_is_left_alone(self, keeper, share):
        assert keeper.parts(self.load(keeper, RAG, share), views(self.FOUR)) == {}

    def test_a_plan_that_bears_the_load_is_kept(self, keeper):
        now = self.load(keeper, RAG, 1.2)
        plan = dict(keeper.parts(now, views(self.FOUR)))
        now = self.load(keeper, CHAT, 0.15, now)
        assert keeper.parts(now, views(self.FOUR)) == plan

    def test_judges_neither_by_few_nor_all_the_time(self, keeper):
        workers = views(self.FOUR)
        now = self.load(keeper, RAG, 1.5, requests=ENOUGH - 1)
        assert keeper.parts(now, workers) == {}
        keeper.arrived(request(now, 5000, 100))
        plan = keeper.parts(now, workers)
        assert plan
        self.load(keeper, CHAT, 1.0, now)
        assert keeper.parts(now + EVERY / 2, workers) == plan
        assert keeper.parts(now + EVERY, workers) != plan

    @pytest.mark.parametrize("names", ["C0 C1 C2 P0 D0", "C0 C1 C2 C3 C4 P0 P1 D0 D1", "C0 P0 P1 D0", "P0 P1 D0"])
    def test_prefill_and_decode_workers_keep_to_their_roles(self, keeper, names):
        now = self.load(keeper, RAG, 5.0)
        parts = keeper.parts(now, views(names))
        assert parts.keys() <= {name for name in names.split() if name.startswith("C")}
        assert bool(parts) == ("C" in names)

    def test_the_part_of_a_worker_that_is_lost_goes_to_another_at_once(self, keeper):
        now = self.load(keeper, RAG, 1.2)
        writer, = (name for name, part in keeper.parts(now, views(self.FOUR)).items() if part == "D")
        left = views(" ".join(name for name in self.FOUR.split() if name != writer))
        parts = keeper.parts(now + EVERY / 10, left)
        assert writer not in parts and Counter(parts.values()) == {"P": 2, "D": 1}

    def test_a_worker_that_takes_another_role_loses_its_part(self, keeper):
        now = self.load(keeper, RAG, 1.2)
        assert "C0" in keeper.parts(now, views(self.FOUR))
        workers = views(self.FOUR)
        workers[0].role = "D"
        assert "C0" not in keeper.parts(now + EVERY, workers)
