"""Whether a load's figures would be the same if it had lasted longer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nanopd.benchmark.load.record import Load

SPANS = 10  # in which the window is cut
FEWEST = 20  # requests that a window must have to say anything
TREND = 0.6  # Kendall's tau; of ten spans without a trend 1 in 100 has it
PILED_UP = 0.05  # share of the requests that came which a server may be left with without having too much to do


def steadiness(load: Load) -> dict[str, Any]:
    """{"is_steady": bool, "why": None, or in words why not}.

    A server that can't keep up has ever more requests open, as long as the load lasts. So the window is cut into spans, and
    how many are open in each on average must not rise from span to span. By Little's law waiting times rise with it.
    """
    if len(load.counted) < FEWEST:
        return _not(f"{len(load.counted)} requests count: too few to say whether the load was steady, take at least {FEWEST}")
    opened = open_requests(load)
    growth = SPANS * np.polyfit(np.arange(SPANS), opened, 1)[0]
    if _kendall_tau(opened) >= TREND and growth > PILED_UP * len(load.counted):
        return _not(f"requests pile up: {opened[0]:.0f} were open as the window began and {opened[-1]:.0f} at its end. The server "
                    "can't keep up, or the warming up was too short")
    return {"is_steady": True, "why": None}


def open_requests(load: Load, spans: int = SPANS) -> np.ndarray:
    """How many were open on average in each of so many equal spans of the window, [spans]."""
    were_sent = [record for record in load.records if record.sent is not None]
    sent = np.array([record.sent for record in were_sent])
    ended = np.array([math.inf if record.ended is None else record.ended for record in were_sent])
    edges = np.linspace(load.begin, load.until, spans + 1)
    overlap = np.minimum(ended, edges[1:, None]) - np.maximum(sent, edges[:-1, None])  # [spans, requests]
    return overlap.clip(min=0).sum(axis=1) / np.diff(edges)


def _kendall_tau(values: np.ndarray) -> float:
    """The share of pairs of which the later is greater, less the share of which it is less."""
    earlier, later = np.triu_indices(len(values), 1)
    return float(np.sign(values[later] - values[earlier]).mean())


def _not(why: str) -> dict[str, Any]:
    return {"is_steady": False, "why": why}
