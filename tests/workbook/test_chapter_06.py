"""Chapter 06's checks tell right from wrong, and its lab breaks what it says it breaks."""

from __future__ import annotations

import math
from statistics import fmean

import pytest

from nanopd.router.length_predictor import Belief
from nanopd.router.policies import RoundRobin, Threshold
from nanopd.router.routing import Decision, Route
from nanopd.widgets.strings import set_language
from nanopd.workbook import routing
from nanopd.workbook.check import check
from nanopd.workbook.checks import ch06


@pytest.fixture(autouse=True, params=["en", pytest.param("zh", marks=pytest.mark.nightly)])
def language(request, monkeypatch):
    monkeypatch.delenv("NANOPD_STRICT_CHECKS", raising=False)
    set_language(request.param)
    yield request.param
    set_language(None)


# ----------------------------------------------------------------------------------------- 06.1, the posterior


def posterior(prior, lengths, apart=True, logarithm=math.log, grows=True):
    logs = [logarithm(length) for length in lengths]
    n, mean = len(logs), fmean(logs)
    kappa, dof = prior.kappa + n, prior.dof + n * grows
    squares = prior.dof * prior.variance + sum((x - mean) ** 2 for x in logs)
    squares += apart * prior.kappa * n / kappa * (mean - prior.mean) ** 2
    return Belief((prior.kappa * prior.mean + n * mean) / kappa, squares / dof, kappa, dof)


def test_the_posterior():
    assert check("06.1", posterior)


@pytest.mark.parametrize("fault", [dict(apart=False), dict(logarithm=math.log2), dict(grows=False)],
                         ids=["means apart forgotten", "another logarithm", "dof forgotten"])
def test_another_posterior_is_told_what_is_wrong(fault):
    result = check("06.1", lambda prior, lengths: posterior(prior, lengths, **fault))
    assert not result and result.hint


# ----------------------------------------------------------------------------------------- 06.5, a router


def choose(question, workers, seat=100):
    open_ones = [worker for worker in workers if worker.is_open]
    options = [(w.queued.prompt_tokens + seat * w.seats, Route.collocated(w.worker_id)) for w in open_ones if w.role == "C"]
    options += [(p.queued.prompt_tokens + seat * d.seats, Route(p.worker_id, d.worker_id))
                for p in open_ones if p.role == "P" for d in open_ones if d.role == "D"]
    return Decision(min(options, key=lambda option: option[0])[1]) if options else None


def test_a_router_that_looks_at_queues():
    assert check("06.5", choose)


def shut_ones_too(question, workers):
    return Decision(Route.collocated(next(worker.worker_id for worker in workers if worker.role == "C")))


@pytest.mark.parametrize(("theirs", "failed"), [
    (RoundRobin().choose, "check_its_regret_on_the_trace"),
    (Threshold(512).choose, "check_its_regret_on_the_trace"),
    (shut_ones_too, "check_it_goes_where_it_may"),
    (lambda question, workers: None, "check_it_goes_where_it_may"),
], ids=["taking turns", "threshold", "shut ones too", "never"])
def test_another_router_is_told_what_is_wrong(theirs, failed, monkeypatch):
    monkeypatch.setattr(routing, "trace", lambda: LOAD)
    monkeypatch.setattr(ch06, "PATIENCE", 2.0)  # with the one that never chooses
    result = check("06.5", theirs)
    assert failed in [failure.check for failure in result.failures]


# ----------------------------------------------------------------------------------------- the simulated cluster

LOAD = routing.trace()


def test_a_detour_changes_the_way_of_one_request():
    load = LOAD[:60]
    _, best = routing.simulate(routing.reference(), load)
    _, other = routing.simulate(routing.Detour(routing.reference(), "20"), load)
    assert best.requests[20].mode != other.requests[20].mode
    assert [one.path for one in best.requests[:20]] == [one.path for one in other.requests[:20]]


def test_old_news_make_a_herd():
    _, best = routing.simulate(routing.reference(), LOAD)
    _, fresh = routing.simulate(routing.OldNews(routing.reference(), 0.0), LOAD)
    _, stale = routing.simulate(routing.OldNews(routing.reference(), 0.5), LOAD)
    assert routing.regret(fresh, best) == pytest.approx(0), "seen at once, they change nothing"
    assert routing.regret(stale, best) > 0.3
