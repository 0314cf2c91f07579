"""Whether a load's figures would be the same if it had lasted longer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from nanopd.benchmark.load.record import Load

SPANS = 10  # in which the window is cut
FEWEST = 20  # requests that a window must have to say anything
SURE = 0.01  # how seldom spans without a trend may look like this
GROWTH = 1.25  # by which factor the last spans must exceed the first ones


def steadiness(load: Load) -> dict[str, Any]:
    """{"is_steady": bool, "why": None, or in words why not}.

    A server that can't keep up has ever more requests open, as long as the load lasts. So the window is cut into spans, and
    how many are open in each on average must not rise from span to span. By Little's law waiting times rise with it.
    """
    if len(load.counted) < FEWEST:
        return _not(f"{len(load.counted)} requests count: too few to say whether the load was steady, take at least {FEWEST}")
    opened = open_requests(load)
    trend = kendalltau(np.arange(SPANS), opened, alternative="greater")
    first, last = opened[: SPANS // 3].mean(), opened[-(SPANS // 3):].mean()
    if trend.pvalue < SURE and last > GROWTH * first + 1:
        return _not(f"the requests that are open grew from {first:.1f} to {last:.1f} within the window: the server can't keep up, "
                    "or the warming up was too short")
    return {"is_steady": True, "why": None}


def open_requests(load: Load, spans: int = SPANS) -> np.ndarray:
    """How many were open on average in each of so many equal spans of the window, [spans]."""
    were_sent = [record for record in load.records if record.sent is not None]
    sent = np.array([record.sent for record in were_sent])
    ended = np.array([math.inf if record.ended is None else record.ended for record in were_sent])
    edges = np.linspace(load.begin, load.until, spans + 1)
    overlap = np.minimum(ended, edges[1:, None]) - np.maximum(sent, edges[:-1, None])  # [spans, requests]
    return overlap.clip(min=0).sum(axis=1) / np.diff(edges)


def _not(why: str) -> dict[str, Any]:
    return {"is_steady": False, "why": why}
