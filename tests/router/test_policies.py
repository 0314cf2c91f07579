from __future__ import annotations

import pytest
from cost_model.models import MODEL
from router.views import question, views, writes

from nanopd.config import SLO, ConfigError
from nanopd.cost_model.analytical import StepWork
from nanopd.cost_model.seed import SeedModel, seed_preset
from nanopd.router.cost_router import CostRouter
from nanopd.router.planner import WorkerSize
from nanopd.router.planning_router import PlanningRouter
from nanopd.router.policies import (
    ROUTERS,
    AlwaysCollocated,
    AlwaysDisaggregated,
    RoundRobin,
    SeedPolicy,
    Threshold,
    make_router,
)

EIGHT = "C0 C1 P0 P1 P2 D0 D1 D2"
SHUT = dict(is_open=False)


def route(router, workers, **asked):
    decision = router.choose(question(**asked), workers)
    return decision and str(decision.route)


def test_the_least_loaded_of_each_role_are_taken():
    busy = views(EIGHT, C0=writes(3), C1=writes(2), P0=dict(queued=StepWork.chunk(50)), D0=writes(4), D1=SHUT)
    assert route(AlwaysCollocated(), busy) == "C1"
    assert route(AlwaysDisaggregated(), busy) == "P1 -> D2"


@pytest.mark.parametrize("router, workers, expected", [
    (AlwaysCollocated(), views("C0 P0 D0", C0=SHUT), None), (AlwaysCollocated(), views("P0 D0"), "P0 -> D0"),
    (AlwaysDisaggregated(), views("C0 P0 D0", D0=SHUT), None), (AlwaysDisaggregated(), views("C0 D0"), "C0"),
    (RoundRobin(), views("C0 P0 D0", C0=SHUT), "P0 -> D0"), (RoundRobin(), views("C0 P0 D0", C0=SHUT, D0=SHUT), None),
    (Threshold(500), views("C0 P0 D0", P0=SHUT), "C0"),
])
def test_the_other_pipeline_stands_in_where_one_is_not_there(router, workers, expected):
    assert route(router, workers) == expected


def test_threshold_goes_by_the_prompt_alone():
    router = Threshold(500)
    assert [route(router, views(EIGHT), prompt_len=length) for length in (499, 500)] == ["C0", "P0 -> D0"]
    with pytest.raises(ConfigError, match="whole number of at least 0, got -1"):
        Threshold(-1)


def test_round_robin_takes_turns_and_loses_none_to_waiting():
    router = RoundRobin()
    shut = views("C0 P0 D0", C0=SHUT, P0=SHUT)
    assert [route(router, workers) for workers in (views(EIGHT), shut, views(EIGHT), views(EIGHT))] == ["C0", None, "P0 -> D0", "C0"]


@pytest.mark.parametrize("name, load, expected", [("rtx-4090", 2, "C1"), ("rtx-4090", 3, "P0 -> D1"), ("h20", 1, "P0 -> D1")])
def test_the_seed_s_rule_and_its_published_crossovers(name, load, expected):
    """3 sequences on one, any at all on the other."""
    assert route(SeedPolicy(seed_preset(name)), views(EIGHT, C0=writes(load - 1), D0=writes(1))) == expected


def test_routers_by_name():
    for name in ROUTERS:
        assert route(make_router(name, MODEL), views(EIGHT)) is not None
    made = make_router("cost", MODEL, slo=SLO(1.0, 0.1), size=WorkerSize(64, 512, 100_000))
    assert isinstance(made, PlanningRouter) and made.slo == SLO(1.0, 0.1) and made.chunk_tokens == 512
    assert type(make_router("cost", MODEL, size=WorkerSize(64, 512, 100_000))) is CostRouter  # promises are what is planned for
    assert isinstance(make_router("seed").model, SeedModel)
    with pytest.raises(ConfigError, match="unknown router 'best'; there are cost, collocated.*method choose"):
        make_router("best")
    with pytest.raises(ConfigError, match="'cost' needs a cost model: give a profile"):
        make_router("cost")
