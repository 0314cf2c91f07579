"""What is reckoned from turns that were measured, with turns that are made up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from cost_model.models import MODEL

from nanopd.benchmark.load import ClientRecord
from nanopd.benchmark.routing import (
    CASES,
    LEAST,
    MODES,
    WARM_UP,
    Turn,
    _errors,
    _over_best_fixed,
    _row,
    _simulate,
    _turns,
)
from nanopd.config import SLO
from nanopd.core import RowRecord, StepRecord
from nanopd.cost_model.analytical import StepWork
from nanopd.cost_model.measurements import TransferRow
from nanopd.metrics import summarize
from nanopd.simulator import Arrival

PROMISED = SLO(0.5, 0.1)
CASE = replace(CASES["cpu"], slo=PROMISED)
TURN = Turn("short", "0.6", 12.0, "adaptive", [Arrival(0.5 * number, 20, 3) for number in range(10)])


def served(ttfts, tpot=0.05, mode="collocated"):
    """One request every half second, of three tokens each."""
    return [ClientRecord(0.5 * number, 16, 3, sent=0.5 * number, mode=mode,
                         tokens=[0.5 * number + ttft + tpot * token for token in range(3)]) for number, ttft in enumerate(ttfts)]


def test_what_comes_while_the_workers_are_warming_up_is_not_counted():
    late, in_time = [9.0] * round(10 * WARM_UP), [0.1] * round(10 * (1 - WARM_UP))
    assert TURN.counted(served(late + in_time), PROMISED).attainment == 1.0
    summary = TURN.counted(served(in_time + late), PROMISED)
    assert summary.num_requests == 8 and summary.attainment == pytest.approx(6 / 8)


def test_a_row_holds_what_was_measured_beside_what_was_simulated():
    measured = summarize([*served([0.1] * 3), *served([0.2], mode="disaggregated")], PROMISED)
    simulated = summarize(served([0.3] * 4, tpot=0.2), PROMISED)
    row = _row(TURN, measured, simulated)
    assert (row["prompts"], row["load"], row["rate"], row["mode"], row["requests"]) == ("short", "0.6", 12.0, "adaptive", 4)
    assert (row["attainment"], row["attainment_simulated"], row["disaggregated"]) == (1.0, 0.0, 0.25)
    assert (row["goodput"], row["goodput_simulated"]) == (measured.goodput, 0.0)
    assert (row["ttft_p50_ms"], row["ttft_p99_ms"]) == (pytest.approx(100), pytest.approx(200))
    assert (row["ttft_p50_simulated"], row["tpot_p99_simulated"]) == (pytest.approx(300), pytest.approx(200))
    assert row["e2e_p50_simulated"] == pytest.approx(700)


def test_adaptive_mode_is_compared_with_the_better_fixed_mode_of_each_load():
    def rows(load, *goodputs):
        return [{"prompts": "short", "load": load, "mode": mode, "goodput": each} for mode, each in zip(MODES, goodputs)]

    assert _over_best_fixed([*rows("0.3", 5.0, 4.0, 5.5), *rows("full", 6.0, 10.0, 9.0)]) == pytest.approx(0.9)
    assert _over_best_fixed([*rows("0.3", 5.0, 4.0, 5.5), *rows("full", 0.0, 0.0, 1.0)]) == pytest.approx(1.1)
    assert _over_best_fixed(rows("full", 0.0, 0.0, 1.0)) is None


def test_errors_are_of_the_prediction_whatever_its_sign():
    """Decode steps that took as long as predicted, prompts twice as long, and a send half as long. Of two steps there is no
    median to speak of."""
    def steps(name, kind, new, cached, work, times, number=LEAST):
        return [StepRecord(0, 10.0 * each, (RowRecord(f"{name}{each}", 0, kind, new, cached),), (), 0, 0, 0,
                           times * MODEL.step_seconds(work)) for each in range(number)]

    turn = [*steps("a", "decode", 1, 100, StepWork(decodes=1, context_tokens=101), 1),
            *steps("b", "prefill", 256, 0, StepWork.chunk(256), 2), *steps("c", "prefill", 2000, 0, StepWork.chunk(2000), 9, LEAST - 1)]
    link = MODEL.transfers[0]
    send = TransferRow(link.seconds(1e8) / 2, link.source, link.destination, link.transport, 10**8)
    errors = _errors(MODEL, [turn], (send,))
    assert errors == {"decode": (pytest.approx(0),), "prefill": (pytest.approx(-0.5),), "mixed": (), "transfer": (pytest.approx(1),)}


def test_turns_are_all_modes_under_the_same_requests_at_rising_loads():
    turns = list(_turns(replace(CASE, loads=("0.2", "0.5")), SimpleNamespace(cost=MODEL)))
    assert [(turn.load, turn.mode) for turn in turns] == [(load, mode) for load in ("0.2", "0.5", "full") for mode in MODES]
    for first in range(0, 9, 3):
        assert turns[first].arrivals is turns[first + 1].arrivals is turns[first + 2].arrivals
    low, high, full = (turn.rate for turn in turns[::3])
    assert high / low == pytest.approx(2.5) and full >= high / 0.5


@pytest.mark.parametrize("mode", MODES)
def test_a_turn_is_simulated_in_the_mode_it_was_measured_in(mode):
    summary = _simulate(CASE, MODEL, replace(TURN, mode=mode))
    assert summary.num_requests == 8
    if mode != "adaptive":
        assert summary.shares == {mode: 1.0}
