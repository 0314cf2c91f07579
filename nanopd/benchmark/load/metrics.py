"""What the clients of a load saw, in the figures and under the names of `vllm bench serve`.

Where `nanopd.metrics` has the same figure it is the same number: a quantile is a value that was measured, and rates are over
the time from the first request that counts to the last token of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from nanopd.benchmark.load.record import ClientRecord, Load
from nanopd.benchmark.load.steady import steadiness
from nanopd.config import SLO
from nanopd.metrics import Summary, meets, quantile, rank, summarize

SHARES = {"median": 0.5, "p90": 0.9, "p99": 0.99}
CONFIDENCE = (0.025, 0.975)  # the ends of an interval that holds 95%
AT_ONCE = 1_000_000  # values that a bootstrap has in memory at a time


def load_metrics(load: Load, slo: SLO | None = None, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The figures of the requests that count. Times of requests, tokens and rates are of those that were completed.

    A figure that nothing was measured for is None. `attainment` is the share that met the SLO of all that count, also those
    that failed or were dropped. `window_output_throughput` has the tokens that came within the window, whoever's they were,
    a second: what the server wrote while the load was on. `merged_tokens` came in a piece with another one, so that ITL knows
    no gap before them. `ci` has the ends of 95% intervals.
    """
    counted = [record for record in load.counted if record.sent is not None]
    completed = [record for record in counted if record.status == "completed"]
    summary = summarize(completed, slo) if completed else None
    seconds = summary.seconds if summary else load.until - load.begin
    met = sum(meets(record, slo) for record in completed) if slo else None
    times = _times(completed)
    return {
        "duration": seconds,
        **{status: sum(record.status == status for record in counted) for status in ("completed", "failed", "dropped")},
        **_throughput(completed, seconds),
        "window_output_throughput": _within(load),
        "request_goodput": None if met is None else _rate(met, seconds),
        "attainment": met / len(counted) if slo and counted else None,
        **{f"{name}_ms": value for name, value in _of_times(times).items()},
        **_lateness(counted),
        "shares": _shares(summary),
        "merged_tokens": sum(record.num_tokens - len(record.tokens) for record in completed),
        "steady": steadiness(load),
        "ci": _intervals(times, met, len(counted), seconds, bootstrap, np.random.default_rng(seed)),
    }


def _throughput(completed: Sequence[ClientRecord], seconds: float) -> dict[str, float]:
    inputs, outputs = sum(record.prompt_len for record in completed), sum(record.num_tokens for record in completed)
    return {"total_input_tokens": inputs, "total_output_tokens": outputs,
            "request_throughput": _rate(len(completed), seconds), "output_throughput": _rate(outputs, seconds),
            "total_token_throughput": _rate(inputs + outputs, seconds)}


def _rate(number: float, seconds: float) -> float:
    return number / seconds if seconds > 0 else 0.0


def _within(load: Load) -> float:
    """Tokens a second that came in the window."""
    came = np.fromiter((time for record in load.records for time in record.tokens), float)
    return _rate(float(np.count_nonzero((came >= load.begin) & (came < load.until))), load.until - load.begin)


def _shares(summary: Summary | None) -> dict[str, float]:
    return {mode: share for mode, share in summary.shares.items() if mode} if summary else {}


def _lateness(counted: Sequence[ClientRecord]) -> dict[str, float | None]:
    late = [1e3 * record.lateness for record in counted]
    return {"mean_lateness_ms": fmean(late) if late else None, "p99_lateness_ms": quantile(late, 0.99) if late else None}


# ---------------------------------------------------------------------------------------------------- times


def _times(completed: Sequence[ClientRecord]) -> dict[str, list[float]]:
    """Milliseconds. TPOT is one for each request, ITL one for each gap between two tokens."""
    seconds = {"ttft": [record.ttft for record in completed],
               "tpot": [record.tpot for record in completed if record.tpot is not None],
               "itl": [gap for record in completed for gap in record.itl],
               "e2el": [record.e2e for record in completed]}
    return {name: [1e3 * value for value in values] for name, values in seconds.items()}


def _of_times(times: dict[str, list[float]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, values in times.items():
        found[f"mean_{name}"] = fmean(values) if values else None
        found |= {f"{share_name}_{name}": quantile(values, share) if values else None for share_name, share in SHARES.items()}
    return found


# ------------------------------------------------------------------------------------------------ confidence


def _intervals(times: dict[str, list[float]], met: int | None, num_counted: int, seconds: float, bootstrap: int,
               random: np.random.Generator) -> dict[str, list[float]]:
    """Of times by bootstrap; not of ITL, for the gaps of one answer are not independent of each other. Of the share that met the
    SLO by Wilson's formula: resampled, thirty of thirty would seem to be sure to go on for ever."""
    found: dict[str, list[float]] = {}
    for name in ("ttft", "tpot", "e2el"):
        if bootstrap and times[name]:
            found |= {f"{which}_{name}_ms": _ends(values) for which, values in _resampled(times[name], bootstrap, random).items()}
    if bootstrap and met is not None and num_counted:
        ends = _wilson(met, num_counted)
        found |= {"attainment": ends, "request_goodput": [_rate(end * num_counted, seconds) for end in ends]}
    return found


def _wilson(met: int, number: int) -> list[float]:
    """Ends of the 95% interval of a share."""
    share, z = met / number, NormalDist().inv_cdf(CONFIDENCE[1])
    middle, half = share + z * z / (2 * number), z * math.sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2)
    return [max(0.0, (middle - half) / (1 + z * z / number)), min(1.0, (middle + half) / (1 + z * z / number))]


def _resampled(values: Sequence[float], bootstrap: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Mean and quantiles of each of `bootstrap` draws of as many values as there are, with replacement."""
    measured, ranks = np.asarray(values), {name: rank(share, len(values)) for name, share in SHARES.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("mean", *ranks)}
    at_once = max(1, AT_ONCE // len(values))
    for begin in range(0, bootstrap, at_once):
        draws = measured[random.integers(len(values), size=(min(at_once, bootstrap - begin), len(values)))]
        draws.partition(sorted(set(ranks.values())), axis=1)
        found["mean"].append(draws.mean(axis=1))
        for name, place in ranks.items():
            found[name].append(draws[:, place])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _ends(values: np.ndarray) -> list[float]:
    return [float(end) for end in np.quantile(values, CONFIDENCE)]
