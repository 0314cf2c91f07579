"""The reference router with parts that are planned: in views, and end to end in a small simulation."""

from __future__ import annotations

import pytest
from router.views import question, views, writes

from nanopd.config import SLO, CacheConfig, SchedulerConfig
from nanopd.cost_model.analytical import CostModel, DecodeCost, MixedCost, PrefillCost, Shape, TransferCost
from nanopd.metrics import summarize
from nanopd.router.length_predictor import BayesianLengthPredictor
from nanopd.router.planner import WorkerSize
from nanopd.router.planning_router import PlanningRouter
from nanopd.router.policies import make_router
from nanopd.router.role_keeper import ENOUGH, EVERY
from nanopd.simulator import Arrival, ModelCosts, Simulation, lengths, poisson

PREFILL, DECODE = PrefillCost(0.01, 5e-5, 1e-9, 4.0), DecodeCost(0.005, 2e-5, 2e-8, 4.0)
LINK = TransferCost("cuda:0", "cuda:1", "peer", 2e-5, 4e11)
COST = CostModel(PREFILL, DECODE, MixedCost.assumed(PREFILL, DECODE), (LINK,), Shape(32, 131072))
CACHE = CacheConfig(num_blocks=16_384, enable_prefix_caching=False)
SCHEDULER = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=2048, max_model_len=16_384)
SIZE = WorkerSize.of(SCHEDULER, CACHE.num_blocks, CACHE.block_size)
TIGHT = SLO(2.0, 0.012)
FOUR = "C0 C1 C2 C3"


def router() -> PlanningRouter:
    return PlanningRouter(COST, BayesianLengthPredictor(), TIGHT, SIZE)


def ask(router, workers, number, now, prompt_len=5000):
    """A question about request `number`, which comes now. The answer's length is known: what is planned hangs on it."""
    asked = question(prompt_len, max_tokens=100, min_tokens=100, arrival=now, now=now)._replace(request_id=str(number))
    return router.choose(asked, workers)


def planned(workers) -> PlanningRouter:
    """A router that has seen so many long prompts that it has shared out parts."""
    made = router()
    for number in range(4 * ENOUGH):
        ask(made, workers, number, 10 + number * 0.05)
    assert {*made.parts.values()} == {"P", "D"}
    return made


def test_no_route_contradicts_the_parts_as_planned():
    workers = views(FOUR, C1=writes(2))
    made = planned(workers)
    for number in range(50):
        decision = ask(made, workers, f"then {number}", 14 + number * 0.05, prompt_len=50 + 150 * number)
        assert decision.route.mode == "disaggregated"
        assert {(made.parts[score.route.prefill], made.parts[score.route.decode]) for score in decision.scores} == {("P", "D")}


def test_who_is_shut_is_not_asked_to_do_another_s_part():
    workers = views(FOUR)
    made = planned(workers)
    for worker in workers:
        worker.is_open = made.parts[worker.worker_id] == "P"
    assert ask(made, workers, "last", 13.3) is None


def test_a_role_that_was_given_since_counts_more_than_a_part():
    workers = views(FOUR)
    made = planned(workers)
    writer, reader = (next(name for name, part in made.parts.items() if part == which) for which in "DP")
    for worker in workers:
        worker.role = {writer: "P", reader: "D"}.get(worker.worker_id, "C")
    assert {score.route.decode for score in ask(made, workers, "last", 13.2).scores} == {reader}


@pytest.mark.parametrize("asked_about", [["a"] * 100, ["a", "b"] * 100])
def test_a_request_that_waits_or_was_refused_is_counted_once(asked_about):
    made, workers = router(), views(FOUR)
    for number in range(ENOUGH - 2):
        ask(made, workers, number, 10 + number * 0.01)
    for turn, name in enumerate(asked_about):
        ask(made, workers, name, 10.2 + turn * EVERY)
    judged_by = ENOUGH - 2 + len(set(asked_about))
    assert bool(made.parts) == (judged_by >= ENOUGH)


def shifting(seconds: float = 4.0) -> list[Arrival]:
    """Documents, then conversations, then documents, each at what four workers can about bear."""
    found: list[Arrival] = []
    for turn, kind in enumerate((("3000-7000", "100"), ("50-450", "60-140"), ("3000-7000", "100"))):
        draw = lengths(*kind)
        rate = (9.0, 60.0, 9.0)[turn]
        found += [Arrival(turn * seconds + one.time, one.prompt_len, one.output_len)
                  for one in poisson(rate, round(rate * seconds), draw, seed=turn) if one.time < seconds]
    return found


class Noted(PlanningRouter):
    """Notes the plans that there were."""

    def __init__(self) -> None:
        super().__init__(COST, BayesianLengthPredictor(), TIGHT, SIZE)
        self.plans: list[dict[str, str]] = []

    def choose(self, question, workers):
        decision = super().choose(question, workers)
        if self.parts not in self.plans[-1:]:
            self.plans.append(dict(self.parts))
        return decision


def served(router, mode="adaptive", workers=None):
    arrivals = shifting()
    simulation = Simulation(workers or {"C": 4}, mode, COST.shape, ModelCosts(COST), CACHE, SCHEDULER, router=router)
    result = simulation.run(arrivals)
    assert [one.num_tokens for one in result.requests] == [one.output_len for one in arrivals]
    return summarize(result.requests, TIGHT)


def test_under_a_mix_that_shifts_parts_change_and_every_request_is_served():
    noted = Noted()
    summary = served(noted)
    assert len(noted.plans) > 2 and noted.plans[0] == {}
    assert summary.attainment > served(None, "collocated").attainment


@pytest.mark.parametrize("workers", [{"C": 3, "P": 1}, {"C": 2, "P": 1, "D": 1}, {"C": 1}])
def test_beside_workers_of_other_roles_every_request_is_served(workers):
    served(make_router("cost", COST, slo=TIGHT, size=SIZE), workers=workers)
