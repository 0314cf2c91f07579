"""The reference router: what would each route cost this request, and those that are there already?

Every collocated worker is scored, and every pair of one that computes the prompt and another that writes the answer: prefill
and decode workers, and collocated ones, which can do either part. See `Score`. Without an SLO, what counts is the request's own
time and, as much, what it takes from others. With one it is how many requests are expected to miss it: this
one, by its chance, and those beside it, by how much theirs grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from heapq import nsmallest
from typing import NamedTuple

from nanopd.config import SLO, ConfigError
from nanopd.cost_model.analytical import CostModel, StepWork, TransferCost, attended_pairs
from nanopd.router.length_predictor import LengthPredictor
from nanopd.router.routing import Decision, Ended, Question, Route, Score, WorkerView

SHORTLIST = 5  # workers that are scored for a part of a request, where there are more
SMALL = 0.02  # share of the time for an answer's tokens, below which its length does not matter for what comes on top
LEAST_RATE = 1e-3  # prompts a second, below which there are none
BUSIEST = 0.9  # share of its time that a worker can give to prompts while it decodes
ROOT_2 = math.sqrt(2)
FEW = 64  # a forecast of length is good until 1/64 more answers have ended
TIE_BREAK = 0.01  # missed SLOs that a second's worth of each bound counts as


class Length(NamedTuple):
    """Forecast of an answer's length in tokens, how many steps are left for it after the prompt's last one (taken to be at least
    1), and a low, middle and high third of its lengths."""

    mean: float
    steps: float
    thirds: tuple[float, float, float]


class Prompt(NamedTuple):
    """What computing the prompt on one worker means. Seconds."""

    worker_id: str
    device: str | None
    queue: float
    prefill: float
    sending: int  # tokens of other prompts whose KV has yet to leave
    others: float  # what those that write there have to wait for it
    misses: float  # how many more of those will miss the SLO


class Writing(NamedTuple):
    """What decoding on one worker means. Seconds."""

    worker_id: str
    device: str | None
    wait: float  # for room
    step: float  # of those that are there
    decode: float  # all of this answer's steps
    slower: float  # by which share prompts to come lengthen them
    others: float  # what those that are there have to wait for them
    misses: float  # how many more of those will miss the SLO
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
        """Probability that the time is longer than `bound`. Both above 0."""
        return math.erfc(math.log(bound / expected) / (self.deviation * ROOT_2)) / 2


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
        self._routes: dict[tuple[str, str], Route] = {}
        self._links: dict[tuple[str | None, str | None], TransferCost] = {}

    # ------------------------------------------------------------------------------------------- the choice

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        length = self._length(question)
        able: dict[str, list[WorkerView]] = {"C": [], "P": [], "D": []}  # by part; C: both
        for worker in workers:
            if worker.is_open:
                for part in "CPD" if worker.role == "C" else worker.role:
                    able[part].append(worker)
        token, sequence = self.cost.prefill.token_seconds, length.mean * self.cost.decode.sequence_seconds
        scores = [self._collocated(question, length, worker) for worker in _shortlist(able["C"], lambda worker: (
            (worker.queued.prompt_tokens - worker.cached_tokens) * token + worker.seats * sequence))]
        if len(able["P"]) + len(able["D"]) > 2 * len(able["C"]) or len(able["C"]) > 1:  # else there is no pair
            prompts = [self._prompt(question, length, worker) for worker in _shortlist(able["P"], lambda worker: (
                (worker.queued.prompt_tokens - worker.cached_tokens) * token + worker.running.decodes * sequence))]
            writings = [self._writing(question, length, worker, worker.running, slower=self._slower(worker))
                        for worker in _shortlist(able["D"], lambda worker: (
                            worker.seats * sequence + worker.queued.prompt_tokens * token))]
            # Where TPOTs are promised, one of the two keeps to its part: who writes where any prompt may come is not safe.
            both = {worker.worker_id for worker in able["C"]}
            scores += [self._disaggregated(question, length, prompt, writing) for prompt in prompts for writing in writings
                       if prompt.worker_id != writing.worker_id and (self.slo is None or not {
                           prompt.worker_id, writing.worker_id} <= both)]
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

    # ------------------------------------------------------------------------------------------- the scores

    def _collocated(self, question: Question, length: Length, worker: WorkerView) -> Score:
        """Prompts that come later hold the answer up as they have held up others lately, and its own prompt holds up those."""
        running = worker.running
        _, _, decodes, contexts = running
        step = self.cost.decode.seconds(decodes, contexts) if decodes else 0.0
        room = max(self.chunk_tokens - decodes, 1)
        queue, prefill, steps = self._computing(question, worker, question.written, decodes, contexts, room)
        slower = self._slower(worker)
        delay = prefill - steps * step
        writing = self._writing(question, length, worker, running, delay, slower)
        terms = {"waited": question.now - question.arrival, "queue": max(queue, step / 2) + writing.wait, "prefill": prefill,
                 "decode": writing.decode, "interference": writing.decode * slower, "others": decodes * delay + writing.others}
        return self._score(question, length, self._route(worker.worker_id, worker.worker_id), terms,
                           writing.decode * (1 + slower), 0.0, writing.misses)

    def _disaggregated(self, question: Question, length: Length, prompt: Prompt, writing: Writing) -> Score:
        asking = writing.step / 2  # a worker reads its mail between two steps
        room = writing.wait + asking
        queue = prompt.queue if prompt.queue > room else room
        link = self._links.get((prompt.device, writing.device)) or self._link(prompt.device, writing.device)
        bytes_per_token = self.cost.shape.kv_bytes_per_token
        transfer = link.exposed_seconds(writing.sent * bytes_per_token, prompt.prefill, self.cost.shape.num_layers)
        if prompt.sending:  # what is on its way before this prompt's
            transfer += max(0.0, prompt.sending * bytes_per_token / link.bytes_per_second - queue - prompt.prefill)
        handover = asking + self.message_seconds
        terms = {"waited": question.now - question.arrival, "queue": queue, "prefill": prompt.prefill, "transfer": transfer,
                 "handover": handover, "decode": writing.decode, "interference": writing.decode * writing.slower,
                 "others": prompt.others + writing.others}
        return self._score(question, length, self._route(prompt.worker_id, writing.worker_id), terms,
                           writing.decode * (1 + writing.slower), transfer + handover, prompt.misses + writing.misses)

    def _score(self, question: Question, length: Length, route: Route, terms: dict[str, float], each: float, once: float,
               misses: float) -> Score:
        """`each`: seconds after the first token that grow with the answer; `once`: those that do not."""
        ttft = terms["waited"] + terms["queue"] + terms["prefill"]
        e2e = ttft + each + once
        steps = length.steps
        objective = e2e + self.others * terms["others"]
        if self.slo is not None:
            objective = (self._chance_to_miss(question, length, ttft, each / steps, once) + self.others * misses
                         + TIE_BREAK * objective / (self.slo.ttft + length.mean * self.slo.tpot))
        return Score(route, terms, ttft, (each + once) / steps, e2e, objective)

    def _route(self, prefill: str, decode: str) -> Route:
        route = self._routes.get((prefill, decode))
        if route is None:
            route = self._routes[prefill, decode] = Route(prefill, decode)
        return route

    # -------------------------------------------------------------------------------- what the scores are made of

    def _prompt(self, question: Question, length: Length, worker: WorkerView) -> Prompt:
        """Of a request whose answer is written elsewhere. It holds up those that are written here."""
        _, _, decodes, contexts = worker.running
        if not decodes:
            queue, prefill, _ = self._computing(question, worker, 0, 0, 0, self.chunk_tokens)
            return Prompt(worker.worker_id, worker.device, queue, prefill, worker.sending_tokens, 0.0, 0.0)
        step = self.cost.decode.seconds(decodes, contexts)
        queue, prefill, steps = self._computing(question, worker, 0, decodes, contexts, max(self.chunk_tokens - decodes, 1))
        delay = prefill - steps * step
        now = step * (1 + self._slower(worker))
        return Prompt(worker.worker_id, worker.device, max(queue, step / 2), prefill, worker.sending_tokens, decodes * delay,
                      self._more_misses(decodes, now, now + delay / length.steps))

    def _computing(self, question: Question, worker: WorkerView, written: int, decodes: int, contexts: int,
                   room: int) -> tuple[float, float, int]:
        """Seconds until the prompts before this one are computed, seconds that it takes itself, and in how many steps. `room`: for
        prompts, in a step."""
        queued_tokens, queued_pairs, _, _ = worker.queued
        seconds = self.cost.seconds if decodes else self._prefill_seconds
        queue = 0.0
        if queued_tokens:
            steps = -(-queued_tokens // room)
            queue = steps * seconds(queued_tokens / steps, queued_pairs / steps, decodes, contexts)
            queue = max(0.0, queue - (question.now - worker.queued_since))
        tokens = question.prompt_len + written
        cached = worker.cached_tokens if self.reads_prefixes else 0
        new = tokens - cached
        steps = -(-new // room)
        return queue, steps * seconds(new / steps, attended_pairs(new, cached) / steps, decodes, contexts), steps

    def _prefill_seconds(self, prompt_tokens: float, pairs: float, decodes: int, contexts: int) -> float:
        """A step of prompts alone: the same, sooner known."""
        return self.cost.prefill.seconds(prompt_tokens, pairs)

    def _writing(self, question: Question, length: Length, worker: WorkerView, running: StepWork, delay: float = 0.0,
                 slower: float = 0.0) -> Writing:
        """`delay`: of all that write there, by the prompt; `slower`: by prompts to come, as a share."""
        _, _, decodes, contexts = running
        num_answers, prompt_len, batch = question.num_answers, question.prompt_len, worker.seats
        sent = prompt_len - (worker.cached_tokens if self.reads_prefixes else 0)
        contexts += (batch - decodes) * prompt_len  # those that have yet to begin have prompts like this one, for all one knows
        before = self.cost.decode.seconds(batch, contexts) if batch else 0.0
        after = self.cost.decode.seconds(batch + num_answers,
                                         contexts + num_answers * (prompt_len + (question.written + length.mean) / 2))
        steps = length.steps
        lacking, waiting = sent - worker.free_tokens, num_answers - worker.free_seats
        wait = 0.0
        if batch and (lacking > 0 or waiting > 0):  # each that is there stays for its length, and leaves its seat and its context
            wait = min(max(lacking / max(contexts, 1), waiting / batch), 1.0) * length.mean * before
        misses = self._more_misses(batch, before * (1 + slower), after * (1 + slower) + delay / steps)
        return Writing(worker.worker_id, worker.device, wait, before, steps * after, slower, batch * steps * (after - before),
                       misses, sent)

    def _more_misses(self, answers: int, now: float, then: float) -> float:
        """How many more of these answers are expected to miss the TPOT when their tokens take longer."""
        if self.slo is None or not answers:
            return 0.0
        chance_above, bound = self.tpot_spread.chance_above, self.slo.tpot
        return answers * (chance_above(bound, then) - chance_above(bound, now))

    def _slower(self, worker: WorkerView) -> float:
        """By which share decode steps take longer because of prompts to come, if those come as they came lately."""
        prompts, tokens = worker.prompts_per_second
        if prompts < LEAST_RATE:
            return 0.0
        _, _, decodes, contexts = worker.running
        decodes = max(decodes, 1)
        new = tokens / prompts
        steps = max(1.0, new / max(self.chunk_tokens - decodes, 1))
        longer = steps * (self.cost.seconds(new / steps, attended_pairs(new) / steps, decodes, contexts)
                          - self.cost.decode.seconds(decodes, contexts))
        share = min(max(prompts * longer, 0.0), BUSIEST)  # of the time
        return share / (1 - share)

    def _link(self, source: str | None, destination: str | None) -> TransferCost:
        link = self._links[source, destination] = self.cost.transfer(source or "", destination or "")
        return link

    def _chance_to_miss(self, question: Question, length: Length, ttft: float, per_token: float, once: float) -> float:
        """What is paid once weighs more on a short answer."""
        in_time = 1 - self.ttft_spread.chance_above(self.slo.ttft, ttft)
        if per_token <= 0 or in_time < 1e-6:
            return 1 - in_time
        chance_above, bound = self.tpot_spread.chance_above, self.slo.tpot
        done = question.written + 1
        if once < SMALL * per_token * max(1.0, length.thirds[0] - done):
            return 1 - in_time * (1 - chance_above(bound, per_token + once / max(1.0, length.mean - done)))
        chance = sum(chance_above(bound, per_token + once / max(1.0, tokens - done)) for tokens in length.thirds) / 3
        return 1 - in_time * (1 - chance)

    # -------------------------------------------------------------------------------------------- the length

    def _length(self, question: Question) -> Length:
        if question.min_tokens >= question.max_tokens:
            tokens = float(question.max_tokens)
            return _length(question, tokens, (tokens, tokens, tokens))
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
            return _length(question, question.max_tokens, (question.max_tokens,) * 3)
        forecast = self.predictor.predict(question.prompt_len, question.max_tokens, question.written)
        least = question.min_tokens
        return _length(question, max(forecast.mean(), least),
                       tuple(max(forecast.quantile(p), least) for p in (1 / 6, 1 / 2, 5 / 6)))


def _length(question: Question, mean: float, thirds: tuple[float, float, float]) -> Length:
    return Length(mean, max(1.0, mean - question.written - 1), thirds)


def _shortlist(workers: list[WorkerView], key: Callable[[WorkerView], float]) -> Iterable[WorkerView]:
    return workers if len(workers) <= SHORTLIST else nsmallest(SHORTLIST, workers, key=key)


def _objective(score: Score) -> float:
    return score.objective
