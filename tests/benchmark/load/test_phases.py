"""Where a request's time went."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanopd.benchmark.load.phases import note_phases
from nanopd.benchmark.load.record import PHASES, ClientRecord
from nanopd.benchmark.load.run import _columns
from nanopd.messages import History
from nanopd.router.timeline import Timeline

START = 100.0


def completed(tokens, **others):
    return ClientRecord(1.0, 8, len(tokens), sent=1.0, status="completed", tokens=tokens, **others)


def history(*steps):
    """Of (start, request, ...)."""
    return History([SimpleNamespace(start=start, rows=[SimpleNamespace(request_id=name) for name in names]) for start, *names in steps], [])


def noted(record, histories, job="0", marks=()):
    note_phases([(record, Timeline(["P0", "D0"], [job], list(marks)))], histories, START)
    return record.phases


def test_a_transfer_counts_from_the_first_token_on():
    record = completed([3.0, 4.0, 5.0])
    phases = noted(record, {"P0": history((101.5, "1"), (102.5, "0")), "D0": history((103.6, "0"))}, marks=[("KV transferred", 103.25)])
    assert phases == pytest.approx({"queue": 1.5, "prefill": 0.5, "transfer": 0.25, "decode": 1.75})
    assert sum(phases.values()) == pytest.approx(record.e2e)


@pytest.mark.parametrize("marks", [(), [("KV transferred", 102.9)]])
def test_no_transfer_and_one_that_was_hidden_take_no_time(marks):
    phases = noted(completed([3.0, 4.0]), {"C0": history((102.5, "0"))}, marks=marks)
    assert phases["transfer"] == 0 and phases["decode"] == 1


def test_of_the_last_attempt():
    assert noted(completed([3.0, 4.0]), {"C0": history((101.2, "0"), (102.0, "0/1"))}, job="0/1")["queue"] == pytest.approx(1.0)


def test_nothing_is_said_of_what_workers_forgot_or_what_failed():
    assert noted(completed([3.0]), {"C0": history((102.0, "7"))}) is None
    failed = ClientRecord(1.0, 8, 3, sent=1.0, status="failed")
    assert noted(failed, {"C0": history((102.0, "0"))}) is None


def test_columns_of_a_record_hold_them():
    known, unknown = completed([3.0, 4.0], phases=dict(zip(PHASES, (1.5, 0.5, 0.25, 0.75)))), completed([3.0, 4.0])
    assert _columns([known, unknown])["transfer"] == [0.25, None]
    assert not set(PHASES) & set(_columns([unknown]))
