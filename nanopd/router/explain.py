"""Why a request went where it did: what the router expected of each route, and what came of the one it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nanopd.core import InvalidRequest
from nanopd.messages import History
from nanopd.router.routing import Decision, Question, Score
from nanopd.router.timeline import Timeline

TERMS = ("waited", "queue", "prefill", "transfer", "handover", "decode", "interference")
TOTALS = ("ttft", "tpot", "e2e", "others", "objective")


@dataclass(frozen=True)
class Measured:
    """What a request took, in seconds. Of terms those that can be told apart: "queue" and "prefill" are told together, as
    "prefill", unless it is known when its first step began; "decode" holds the handover and the interference."""

    path: str
    terms: dict[str, float]
    ttft: float | None
    tpot: float | None
    e2e: float | None


@dataclass(frozen=True)
class Explanation:
    """Of one request. `measured` grows while it is under way; what is not over yet is not in it."""

    question: Question
    decision: Decision
    measured: Measured

    def best(self, mode: str) -> Score | None:
        """Of the routes of one pipeline; None where none was open, or the router does not score."""
        return min((score for score in self.decision.scores if score.route.mode == mode), default=None,
                   key=lambda score: score.objective)

    @property
    def chosen(self) -> Score | None:
        return next((score for score in self.decision.scores if score.route == self.decision.route), None)

    def __str__(self) -> str:
        question = self.question
        lines = [f"request {question.request_id}: prompt of {question.prompt_len} tokens, answer of up to "
                 f"{question.max_tokens}, went {self.measured.path or '(on its way)'}"]
        scores = [score for score in map(self.best, ("collocated", "disaggregated")) if score]
        rows = [["", *(_title(score, self.decision) for score in scores), "measured"]]
        for name in TERMS:
            values = [score.terms.get(name) for score in scores]
            rows.append([name, *map(_ms, values), _ms(self.measured.terms.get(name))])
        for name in TOTALS:
            values = [score.terms.get(name, getattr(score, name, None)) for score in scores]
            rows.append([name, *map(_number if name == "objective" else _ms, values), _ms(getattr(self.measured, name, None))])
        lines += _table(row for row in rows if any(row[1:]))
        if not scores:
            lines.append("The router gave no scores.")
        return "\n".join(lines)


def explain(timeline: Timeline, prefill_began: float | None = None) -> Explanation:
    """From a request's timeline. `prefill_began`: when the first step with its prompt did, if that is known.

    Raises InvalidRequest where no router was asked.
    """
    if timeline.question is None or timeline.decision is None:
        raise InvalidRequest("no router was asked about this request: either it was sent through a pipeline that it named "
                             "itself, or it is still in line")
    return Explanation(timeline.question, timeline.decision, _measured(timeline, timeline.question, prefill_began))


def began(timeline: Timeline, histories: Mapping[str, History]) -> float | None:
    """When the first step of a request's last attempt did, from what its workers remember."""
    return min((record.start for worker_id in timeline.path if worker_id in histories for record in histories[worker_id].steps
                if any(row.request_id == timeline.jobs[-1] for row in record.rows)), default=None)


def _measured(timeline: Timeline, question: Question, prefill_began: float | None) -> Measured:
    """The last attempt's marks count."""
    marks = dict(timeline.marks)
    first = timeline.first_token
    ended = max((when for _, when in timeline.ends), default=None) if "finished" in marks else None
    arrived = marks.get("KV transferred")
    terms = {"waited": question.now - question.arrival}
    if first is not None and first >= question.now:  # else an earlier attempt drew it
        if prefill_began is not None and prefill_began <= first:
            terms["queue"], terms["prefill"] = max(0.0, prefill_began - question.now), first - prefill_began
        else:
            terms["prefill"] = first - question.now
        if arrived is not None:
            terms["transfer"] = max(0.0, arrived - first)
    if ended is not None and first is not None:
        terms["decode"] = ended - max(first, arrived or first)
    lengths = [(tokens, when) for tokens, when in timeline.ends if tokens > 1]
    tpot = sum((when - first) / (tokens - 1) for tokens, when in lengths) / len(lengths) if lengths and ended else None
    return Measured(str(timeline), terms, first and first - question.arrival, tpot, ended and ended - question.arrival)


def _title(score: Score, decision: Decision) -> str:
    return f"{score.route}{' *' if score.route == decision.route else ''}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(rows: Iterable[list[str]]) -> list[str]:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
            for row in table]
