"""Chapter 08's checks tell right from wrong, races end whatever a router does, and the model solution earns full marks."""

from __future__ import annotations

import re
import threading
from functools import cache

import pytest

import nanopd.workbook.checks.ch08 as checks
from nanopd.config import ConfigError
from nanopd.router.policies import AlwaysCollocated, RoundRobin
from nanopd.router.routing import Decision, Route
from nanopd.widgets.strings import set_language
from nanopd.workbook import arena, builder, capstone, routing
from nanopd.workbook.arena import Load, within
from nanopd.workbook.check import check
from nanopd.workbook.source import read_chapter

SMALL = Load("turn", arena.turn(1).arrivals[:6])


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.delenv("NANOPD_STRICT_CHECKS", raising=False)
    set_language("en")
    yield
    set_language(None)


@cache
def solution() -> dict[str, object]:
    """What the chapter's solution cells define."""
    (source,) = builder.sources(builder.NOTEBOOKS, ["08"])
    cells = {cell.nbgrader.get("grade_id"): cell.source for cell in read_chapter(source)}
    imports = next(text for text in (cell.source for cell in read_chapter(source)) if text.startswith("import math"))
    code = [imports.replace("from IPython.display import display\n", "")]
    code += [re.sub(r"(?m)^capstone\.race.*$", "", cells[name]) for name in ("ex-8-3", "ex-8-5", "ex-8-6")]
    namespace: dict[str, object] = {}
    exec("\n".join(code), namespace)
    return namespace


# ------------------------------------------------------------------------------------------- full marks


@pytest.mark.parametrize(("exercise", "name"), [("08.3", "FirstRouter"), ("08.5", "chance_late"), ("08.6", "MyRouter"),
                                                ("08.6b", "MyRouter"), ("08.7", "MyRouter")])
def test_the_model_solution_passes(exercise, name):
    assert check(exercise, solution()[name])


@pytest.mark.nightly  # every test of the notebook draws a seed of its own
@pytest.mark.parametrize("seed", range(1, 11))
def test_the_model_solution_passes_whatever_seed_is_drawn(seed, monkeypatch):
    monkeypatch.setattr(arena, "_drawn", lambda: seed)
    assert check("08.8", solution()["MyRouter"])
    assert check("08.8b", solution()["MyRouter"])


# --------------------------------------------------------------------------------- and what earns none


def shut_ones_too(question, workers):
    return Decision(Route.collocated(next(worker.worker_id for worker in workers if worker.role == "C")))


class FirstOpen:
    def choose(self, question, workers):
        reader, writer = (next((w.worker_id for w in workers if w.role in roles and w.is_open), None) for roles in ("PC", "DC"))
        first = next((w.worker_id for w in workers if w.role == "C" and w.is_open), None)
        if first:
            return Decision(Route.collocated(first))
        return Decision(Route(reader, writer)) if reader and writer else None


class OnlySimulated(RoundRobin):
    """Knows the workers of the simulation only."""

    def choose(self, question, workers):
        return super().choose(question, workers) if len(workers) == 6 else None


@pytest.mark.parametrize(("exercise", "theirs", "failed"), [
    ("08.3", type("Shut", (), {"choose": lambda self, *asked: shut_ones_too(*asked)}), "check_it_goes_where_it_may"),
    ("08.3", AlwaysCollocated, "check_it_gets_through_the_practice_trace"),
    ("08.3", FirstOpen, "check_it_avoids_a_long_queue"),
    ("08.6", AlwaysCollocated, "check_it_is_not_under_a_fixed_policy"),
    ("08.6b", RoundRobin, "check_it_comes_near_the_reference"),
    ("08.7", OnlySimulated, "check_the_engine_runs_with_it"),
], ids=["shut ones too", "one way only", "the first", "always collocated", "taking turns", "fails in the engine"])
def test_another_router_is_told_what_is_wrong(exercise, theirs, failed, monkeypatch):
    monkeypatch.setattr(checks.ch06, "PATIENCE", 0.5)
    result = check(exercise, theirs)
    assert failed in [failure.check for failure in result.failures] and result.hint


@pytest.mark.parametrize("fault", [lambda e, b, s: float(e > b), lambda e, b, s: 1 - solution()["chance_late"](e, b, s),
                                   lambda e, b, s: solution()["chance_late"](e, b, 0.3)], ids=["certain", "in time", "one spread"])
def test_another_chance_is_told_what_is_wrong(fault):
    assert not check("08.5", fault)


def test_a_router_that_is_not_written_yet():
    class Stub:
        def choose(self, question, workers):
            raise NotImplementedError()

    assert check("08.6", Stub).unfinished and check("08.7", Stub).unfinished
    assert "NotImplementedError" in repr(capstone.race(Stub, [SMALL]))


# ------------------------------------------------------------------------------------ whatever a router does


class Raises:
    def choose(self, question, workers):
        return 1 / 0


class Answers:
    def choose(self, question, workers):
        return "C0"


class Elsewhere:
    def choose(self, question, workers):
        return Decision(Route.collocated("C9"))


class Never:
    def choose(self, question, workers):
        return None


class Leaves:
    def choose(self, question, workers):
        raise SystemExit(3)


class BadEar(RoundRobin):
    def ended(self, answer):
        return answer.lenght


class Forever:
    def choose(self, question, workers):
        while True:
            pass


@pytest.mark.parametrize(("theirs", "says"), [
    (Raises, "ZeroDivisionError: division by zero (choose, line"), (Raises(), "ZeroDivisionError"), (Answers, "it must be Decision"),
    (Elsewhere, "there is no worker 'C9'"), (Never, "stands still"), (Leaves, "SystemExit"), (BadEar, "lenght"),
    (lambda: 3, "'int' object has no attribute 'choose'"), (lambda: 1 / 0, "ZeroDivisionError")])
def test_a_card_says_what_went_wrong(theirs, says):
    card = capstone.race(theirs, [SMALL])
    assert says in repr(card).splitlines()[-1]
    assert card.rank == len(card.ranking) and card.of_reference == 0 and card.regret == 1


def test_a_router_that_takes_for_ever_is_left_behind():
    before = threading.active_count()
    card = capstone.race(Forever, [SMALL], patience=0.5)
    assert "not done after 0.5 s" in repr(card)
    assert threading.active_count() == before, "and stopped"


def test_within_gives_and_raises_what_the_work_does():
    assert within(10, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(10, lambda: {}["x"])


# ------------------------------------------------------------------------------------------------ the card


def test_a_card_ranks_and_no_regret_is_below_0():
    card = capstone.race(capstone.reference, [SMALL])
    heat = card.heats[0]
    assert card.of_reference == pytest.approx(1)
    assert card.regret >= 0 and heat.hindsight == max(run.attainment for run in heat.runs.values())
    assert sorted(card.ranking) == sorted([*capstone.FIXED, capstone.REFERENCE, capstone.YOURS])
    assert heat.runs["yours"].goodput == pytest.approx(heat.runs["yours"].attainment * 6 / SMALL.seconds)
    assert heat.runs["yours"].microseconds > 0


def test_a_card_speaks_both_languages(capsys):
    card = capstone.race(RoundRobin, [SMALL])
    card.show()
    set_language("zh")
    card.show()
    shown = capsys.readouterr().out
    assert "taking turns" in shown and "两条路轮流" in shown and "按时" in shown
    assert len(card.figure().data) == len(capstone.COLOURS) + 1


def test_an_object_goes_on_learning_and_a_class_begins_anew():
    learned = capstone.reference()
    capstone.race(learned, [SMALL, SMALL])
    assert learned._num_ended == 12
    made = []

    def make():
        made.append(RoundRobin())
        return made[-1]

    capstone.race(make, [SMALL, SMALL])
    assert len(made) == 2


# ------------------------------------------------------------------------------------------------- traces


def test_hidden_traces_come_of_their_seed():
    assert capstone.hidden(3) == capstone.hidden(3) != capstone.hidden(4)
    assert capstone.hidden() == capstone.hidden(), "drawn once in a session"
    for load in (*capstone.hidden(3), capstone.practice()):
        times = [one.time for one in load.arrivals]
        assert times == sorted(times) and len(times) == arena.REQUESTS


def test_a_recorded_trace_can_be_raced(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0,300,20\n2023-11-16 18:17:05.0,90000,30\n")
    load = capstone.from_file(path, speed_up=2)
    assert (load.name, load.seconds, load.arrivals[1].prompt_len) == ("some.csv", 1.0, 16_384 - 30)
    assert "some.csv" in repr(capstone.race(RoundRobin, [load]))
    with pytest.raises(ConfigError):
        capstone.from_file(tmp_path / "none.csv")


def test_who_counts_no_others_breaks_more_promises():
    """The chapter's lab."""
    late = {}
    for others in (1.0, 0.0):
        _, result = capstone.simulate(routing.reference(slo=capstone.PROMISE, others=others), capstone.practice())
        late[others] = sum((one.tpot or 0) > capstone.PROMISE.tpot for one in result.requests)
    assert late[0.0] > 2 * late[1.0]
