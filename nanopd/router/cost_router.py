"""The reference router: what would each route cost this request, and those that are there already?

Every collocated worker and every pair of a prefill and a decode worker is scored, see `Score`. Without an SLO, what counts is
the request's own time and, as much, what it takes from others. With one it is how many requests are expected to miss it: this
one, by its chance, and those beside it, by how much theirs grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from heapq import nsmallest
from typing import NamedTuple

from nanopd.config import SLO, ConfigError
from nanopd.cost_model.analytical import CostModel, TransferCost, attended_pairs
from nanopd.router.length_predictor import LengthPredictor
from nanopd.router.routing import Decision, Ended, Question, Route, Score, WorkerView

SHORTLIST = 4  # workers of a role that are scored, where there are more
BUSIEST = 0.9  # share of its time that a worker can give to prompts while it decodes
FEW = 64  # a forecast of length is good until 1/64 more answers have ended
TIE_BREAK = 0.01  # missed SLOs that a second's worth of each bound counts as


class Length(NamedTuple):
    """Forecast of an answer's length in tokens, and a low, middle and high third of it."""

    mean: float
    thirds: tuple[float, float, float]


class Prompt(NamedTuple):
    """What computing the prompt on one worker means. Seconds."""

    worker: WorkerView
    queue: float
    prefill: float
    delay: float  # for each answer that is being written there
    sending: int  # tokens whose KV has yet to leave


class Writing(NamedTuple):
    """What decoding on one worker means. Seconds."""

    worker: WorkerView
    wait: float  # for room
    step: float  # of those that are there
    decode: float  # all of this answer's steps
    delay: float  # for each answer there
    batch: int  # answers there
    sent: int  # tokens of the prompt that are not there


class Spread:
    """By which factor times miss their forecast: the deviation of its logarithm, learned from a first guess on."""

    FIRST_GUESS_COUNTS = 8.0  # observations
    MEMORY = 256.0

    def __init__(self, guess: float) -> None:
        self._weight, self._squares = self.FIRST_GUESS_COUNTS, self.FIRST_GUESS_COUNTS * guess * guess
        self.deviation = guess

    def learn(self, measured: float, expected: float) -> None:
        if measured > 0 and expected > 0:
            keep = 1 - 1 / self.MEMORY
            self._weight = self._weight * keep + 1
            self._squares = self._squares * keep + min(abs(math.log(measured / expected)), 1.5) ** 2
            self.deviation = max(math.sqrt(self._squares / self._weight), 0.02)

    def chance_above(self, bound: float, expected: float) -> float:
        """Probability that the time is longer than `bound`."""
        if bound <= 0 or expected <= 0:
            return float(expected > bound)
        return math.erfc(math.log(bound / expected) / (self.deviation * math.sqrt(2))) / 2


class CostRouter:
    """See the module.

    Args:
        cost: what steps and transfers take.
        predictor: of answers' lengths; learns from every answer that ends.
        slo: what was promised.
        chunk_tokens: of prompts that a step computes at most; None: all.
        message_seconds: from worker to worker by way of the central scheduler.
        spread: how far off forecasts are at first, as a deviation of log time.
        others: how much the others' time counts beside the request's own.
        reads_prefixes: whether what workers have computed before is made use of.
    """

    def __init__(self, cost: CostModel, predictor: LengthPredictor, slo: SLO | None = None, *, chunk_tokens: int | None = None,
                 message_seconds: float = 0.0, spread: float = 0.2, others: float = 1.0, reads_prefixes: bool = True) -> None:
        for name, value, least in (("message_seconds", message_seconds, 0.0), ("spread", spread, 1e-3), ("others", others, 0.0)):
            if not (value >= least and math.isfinite(value)):
                raise ConfigError(f"{name} must be a number of at least {least:g}, got {value!r}")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, or None, got {chunk_tokens!r}")
        self.cost = cost
        self.predictor = predictor
        self.slo = slo
        self.chunk_tokens = chunk_tokens or 2**31
        self.message_seconds = message_seconds
        self.others = others
        self.reads_prefixes = reads_prefixes
        self.ttft_spread, self.tpot_spread = Spread(spread), Spread(spread)
        self._num_ended = 0
        self._lengths: dict[tuple[int, int], tuple[int, Length]] = {}  # and how many answers it was made from
        self._links: dict[tuple[str | None, str | None], TransferCost] = {}

    # ------------------------------------------------------------------------------------------- the choice

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        length = self._length(question)
        places: dict[str, list[WorkerView]] = {"C": [], "P": [], "D": []}
        for worker in workers:
            if worker.is_open:
                places[worker.role].append(worker)
        token = self.cost.prefill.token_seconds
        there = [self._both(question, worker, length) for worker in _shortlist(places["C"], lambda worker: (
            (worker.queued.prompt_tokens - worker.cached_tokens) * token
            + worker.seats * length.mean * self.cost.decode.sequence_seconds))]
        prompts = [self._prompt(question, worker, length) for worker in _shortlist(
            places["P"], lambda worker: worker.queued.prompt_tokens - worker.cached_tokens)] if places["D"] else []
        writings = [self._writing(question, worker, length) for worker in _shortlist(
            places["D"], lambda worker: worker.seats)] if prompts else []
        scores = [self._collocated(question, length, prompt, writing) for prompt, writing in there]
        scores += [self._disaggregated(question, length, prompt, writing) for prompt in prompts for writing in writings]
        if not scores:
            return None
        scores.sort(key=_objective)
        return Decision(scores[0].route, tuple(scores))

    def ended(self, answer: Ended) -> None:
        """Learn from an answer how long answers are, and from its times how good forecasts are."""
        self.predictor.update(answer.prompt_len, answer.output_len, answer.cut)
        self._num_ended += 1
        score = answer.decision and next((each for each in answer.decision.scores if each.route == answer.decision.route), None)
        if score is not None:
            self.ttft_spread.learn(answer.ttft, score.ttft)
            if answer.tpot is not None:
                self.tpot_spread.learn(answer.tpot, score.tpot)

    # ---------------------------------------------------------------------------------------- the two halves

    def _prompt(self, question: Question, worker: WorkerView, length: Length, num_written: int = 0) -> Prompt:
        queued, running, cost = worker.queued, worker.running, self.cost
        decodes, contexts = running.decodes, running.context_tokens
        step = cost.decode.seconds(decodes, contexts) if decodes else 0.0
        room = max(self.chunk_tokens - decodes, 1)
        queue = step / 2  # the one that runs
        if queued.prompt_tokens:
            steps = -(-queued.prompt_tokens // room)
            whole = steps * cost.seconds(queued.prompt_tokens / steps, queued.pairs / steps, decodes, contexts)
            queue = max(0.0, whole - (question.now - worker.queued_since))
        tokens = question.prompt_len + num_written
        cached = min(worker.cached_tokens, tokens - 1) if self.reads_prefixes else 0
        new = tokens - cached
        steps = -(-new // room)
        prefill = steps * cost.seconds(new / steps, attended_pairs(new, cached) / steps, decodes, contexts)
        return Prompt(worker, queue + self._wait_for_room(question, worker, length, new), prefill,
                      prefill - steps * step, worker.sending_tokens)

    def _writing(self, question: Question, worker: WorkerView, length: Length) -> Writing:
        running, num_answers = worker.running, question.num_answers
        batch = max(worker.seats, running.decodes)
        # Those that have yet to begin have prompts like this one, as far as one can say.
        contexts = running.context_tokens + (batch - running.decodes) * question.prompt_len
        more = num_answers * (question.prompt_len + (question.written + length.mean) / 2)
        before = self.cost.decode.seconds(batch, contexts) if batch else 0.0
        after = self.cost.decode.seconds(batch + num_answers, contexts + more)
        steps = max(0.0, length.mean - question.written - 1)
        sent = question.prompt_len - (min(worker.cached_tokens, question.prompt_len) if self.reads_prefixes else 0)
        return Writing(worker, self._wait_for_room(question, worker, length, sent), before, steps * after,
                       steps * (after - before), batch, sent)

    def _both(self, question: Question, worker: WorkerView, length: Length) -> tuple[Prompt, Writing]:
        return self._prompt(question, worker, length, question.written), self._writing(question, worker, length)

    def _wait_for_room(self, question: Question, worker: WorkerView, length: Length, tokens: int) -> float:
        """Until enough answers have ended: each stays for its length, and leaves its seat and its context."""
        decodes = worker.running.decodes
        if not decodes:
            return 0.0
        contexts = worker.running.context_tokens
        share = max((tokens - worker.free_tokens) / contexts, (question.num_answers - worker.free_seats) / decodes)
        return min(share, 1.0) * length.mean * self.cost.decode.seconds(decodes, contexts) if share > 0 else 0.0

    # ------------------------------------------------------------------------------------------- the scores

    def _collocated(self, question: Question, length: Length, prompt: Prompt, writing: Writing) -> Score:
        interference = self._interference(prompt.worker, writing)
        terms = {"waited": question.now - question.arrival, "queue": prompt.queue, "prefill": prompt.prefill,
                 "decode": writing.decode, "interference": interference,
                 "others": prompt.worker.running.decodes * prompt.delay + writing.batch * writing.delay}
        after_first = writing.decode + interference
        slower = interference / writing.decode if writing.decode else 0.0
        return self._score(question, length, Route.collocated(prompt.worker.worker_id), terms, after_first, 0.0, writing,
                           prompt.delay, slower)

    def _disaggregated(self, question: Question, length: Length, prompt: Prompt, writing: Writing) -> Score:
        asking = writing.step / 2  # a worker reads its mail between two steps
        queue = max(prompt.queue, writing.wait + asking)
        transfer = self._transfer(prompt, writing, queue)
        handover = asking + self.message_seconds
        terms = {"waited": question.now - question.arrival, "queue": queue, "prefill": prompt.prefill, "transfer": transfer,
                 "handover": handover, "decode": writing.decode, "others": writing.batch * writing.delay}
        once = transfer + handover
        return self._score(question, length, Route(prompt.worker.worker_id, writing.worker.worker_id), terms,
                           writing.decode, once, writing, 0.0, 0.0)

    def _score(self, question: Question, length: Length, route: Route, terms: dict[str, float], each: float, once: float,
               writing: Writing, delay: float, slower: float) -> Score:
        """`each`: seconds after the first token that grow with the answer; `once`: those that do not. `delay` and `slower`: of
        those that write there, once by this prompt and, as a share, by other prompts."""
        ttft = terms["waited"] + terms["queue"] + terms["prefill"]
        steps = max(1.0, length.mean - question.written - 1)
        tpot = (each + once) / steps
        e2e = ttft + each + once
        objective = e2e + self.others * terms["others"]
        if self.slo is not None:
            objective = (self._chance_to_miss(length, question, ttft, each / steps, once)
                         + self.others * self._misses_of_others(length, writing, delay, slower)
                         + TIE_BREAK * objective / (self.slo.ttft + length.mean * self.slo.tpot))
        return Score(route, terms, ttft, tpot, e2e, objective)

    def _interference(self, worker: WorkerView, writing: Writing) -> float:
        """What prompts that are still to come will add to the decode steps: the share of the time that they have taken lately."""
        prompts, tokens = worker.prompts_per_second
        if prompts * writing.decode < 1e-9:
            return 0.0
        running = worker.running
        new = tokens / prompts
        steps = max(1.0, new / self.chunk_tokens)
        batch = max(running.decodes, 1)
        longer = steps * (self.cost.seconds(new / steps, attended_pairs(new) / steps, batch, running.context_tokens)
                          - self.cost.decode.seconds(batch, running.context_tokens))
        share = min(max(prompts * longer, 0.0), BUSIEST)
        return writing.decode * share / (1 - share)

    def _transfer(self, prompt: Prompt, writing: Writing, queue: float) -> float:
        ends = prompt.worker.device, writing.worker.device
        link = self._links.get(ends)
        if link is None:
            link = self._links[ends] = self.cost.transfer(ends[0] or "", ends[1] or "")
        bytes_per_token, layers = self.cost.shape.kv_bytes_per_token, self.cost.shape.num_layers
        before = prompt.sending * bytes_per_token / link.bytes_per_second - queue - prompt.prefill
        return link.exposed_seconds(writing.sent * bytes_per_token, prompt.prefill, layers) + max(0.0, before)

    # ---------------------------------------------------------------------------------------------- the SLO

    def _chance_to_miss(self, length: Length, question: Question, ttft: float, per_token: float, once: float) -> float:
        """Over how long the answer may be: what is paid once weighs more on a short one."""
        in_time = 1 - self.ttft_spread.chance_above(self.slo.ttft, ttft)
        if in_time < 1e-6:
            return 1.0
        if per_token + once <= 0:
            return 1 - in_time
        chances = [self.tpot_spread.chance_above(self.slo.tpot, per_token + once / max(1.0, tokens - question.written - 1))
                   for tokens in (length.thirds if once > 0 else (length.mean,))]
        return 1 - in_time * (1 - sum(chances) / len(chances))

    def _misses_of_others(self, length: Length, writing: Writing, delay: float, slower: float) -> float:
        """By how many more of those that write there will miss the TPOT."""
        if not writing.batch:
            return 0.0
        steps = max(1.0, length.mean - 1)
        before = writing.step * (1 + slower)
        after = before + (writing.delay / steps) * (1 + slower) + delay / steps
        spread, bound = self.tpot_spread, self.slo.tpot
        return writing.batch * (spread.chance_above(bound, after) - spread.chance_above(bound, before))

    # -------------------------------------------------------------------------------------------- the length

    def _length(self, question: Question) -> Length:
        if question.min_tokens >= question.max_tokens:
            tokens = float(question.max_tokens)
            return Length(tokens, (tokens, tokens, tokens))
        if question.written:
            return self._forecast(question)
        key = question.prompt_len.bit_length(), question.max_tokens
        made_from, length = self._lengths.get(key, (-1, None))
        if length is None or made_from + made_from // FEW < self._num_ended:
            length = self._forecast(question)
            self._lengths[key] = self._num_ended, length
        return length

    def _forecast(self, question: Question) -> Length:
        if question.written >= question.max_tokens:
            return Length(float(question.max_tokens), (float(question.max_tokens),) * 3)
        forecast = self.predictor.predict(question.prompt_len, question.max_tokens, question.written)
        least = question.min_tokens
        return Length(max(forecast.mean(), least), tuple(max(forecast.quantile(p), least) for p in (1 / 6, 1 / 2, 5 / 6)))


def _shortlist(workers: list[WorkerView], key: Callable[[WorkerView], float]) -> Iterable[WorkerView]:
    return workers if len(workers) <= SHORTLIST else nsmallest(SHORTLIST, workers, key=key)


def _objective(score: Score) -> float:
    return score.objective
