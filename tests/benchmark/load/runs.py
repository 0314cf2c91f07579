"""Runs that nobody served, for tests of what is made of them."""

from __future__ import annotations

from dataclasses import asdict

from nanopd.benchmark.load.metrics import load_metrics
from nanopd.benchmark.load.record import PHASES, Load
from nanopd.benchmark.load.run import RunRecord, RunSettings, _columns

DEVICE = {"kind": "cuda", "name": "Made-up GPU", "cpu": "made up"}


def load_of(settings: RunSettings, ttft: float = 0.1, tpot: float = 0.01, mode: str = "", failed: int = 0, dropped: int = 0) -> Load:
    """As the schedule says, each answered alike but for the last ones, which fail or are dropped. Answers of prompts of more than
    1000 tokens begin later by a half."""
    schedule = settings.schedule(10**6)
    records = schedule.records()
    for record in records:
        record.sent = record.arrival
        first = record.arrival + ttft * (1.5 if record.prompt_len > 1000 else 1.0)
        record.tokens = [first + tpot * number for number in range(record.output_len)]
        record.mode = mode or ("disaggregated" if settings.mode == "disaggregated" else "collocated")
        record.end(record.tokens[-1], "completed")
        record.phases = dict(zip(PHASES, (0.4 * ttft, 0.6 * ttft, 0.0, record.tokens[-1] - first)))
    for record in records[len(records) - failed - dropped:]:
        record.tokens, record.phases = [], None
    for record in records[len(records) - failed - dropped: len(records) - dropped]:
        record.end(record.arrival, "failed", "lost")
    for record in records[len(records) - dropped:]:
        record.mode = ""
        record.end(record.arrival, "dropped", "too many")
    return Load(records, schedule.begin, schedule.end)


def record_of(settings: RunSettings, **how) -> RunRecord:
    load = load_of(settings, **how)
    return RunRecord(asdict(settings), load_metrics(load, settings.slo, bootstrap=50), _columns(load.counted), DEVICE, {}, "abc1234def",
                     False, "2026-01-02T03:04:05+00:00", "nanopd bench sweep")
