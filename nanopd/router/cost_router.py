"""The reference router: what would each route cost this request, and those that are there already?

Every collocated worker is scored, and every pair of one that computes the prompt and another that writes the answer: prefill
and decode workers, and collocated ones, which can do either part. See `Score`. Without an SLO, what counts is the request's own
time and, as much, what it takes from others. With one it is how many requests are expected to miss it: this
one, by its chance, and those beside it, by how much theirs grows.
"""

from __future__ import annotations

import math
import sys
from bisect import insort
from collections.abc import Mapping, Sequence
from math import erfc, log
from operator import attrgetter, itemgetter
from typing import NamedTuple

from nanopd.config import SLO, ConfigError
from nanopd.cost_model.analytical import CostModel, TransferCost, attended_pairs
from nanopd.router.length_predictor import LengthPredictor
from nanopd.router.routing import Decision, Ended, Question, Route, Score, WorkerView

SHORTLIST = 5  # workers that are looked at for a part of a request, where there are more
TOLD = 3  # pairs of which a decision tells, the best ones
ALIKE = 1e-6  # seconds, or missed SLOs: routes that differ by less are as good as each other
SMALL = 0.02  # share of the time for an answer's tokens, below which its length does not matter for what comes on top
LEAST_RATE = 1e-3  # prompts a second, below which there are none
BUSIEST = 0.9  # share of its time that a worker can give to prompts while it decodes
ROOT_2 = math.sqrt(2)
FEW = 64  # a forecast of length is good until 1/64 more answers have ended
TIE_BREAK = 0.01  # missed SLOs that a second's worth of each bound counts as


class Length(NamedTuple):
    """Forecast of an answer's length in tokens, how many steps are left for it after the prompt's last one (taken to be at least
    1), and a low, middle and high third of its lengths. `tie_break`: what a second of it counts beside missed SLOs."""

    mean: float
    steps: float
    thirds: tuple[float, float, float]
    tie_break: float


class Running(NamedTuple):
    """A worker as the request finds it, and what it decodes."""

    does_all: bool  # it may compute prompts and write answers, of whichever requests
    decodes: int
    contexts: int
    step: float  # seconds of all of it; 0 where there is nothing
    slower: float  # by which share prompts to come lengthen its steps


class Prompt(NamedTuple):
    """What computing the prompt on one worker means. Seconds."""

    worker_id: str
    device: str | None
    does_all: bool
    queue: float
    prefill: float
    delay: float  # of each answer that is written there
    sending: int  # tokens of other prompts whose KV has yet to leave
    others: float  # what those that write there have to wait for it
    misses: float  # how many more of those will miss the SLO
    in_time: float  # chance of a first token within the SLO, if nothing else delays it


class Writing(NamedTuple):
    """What decoding on one worker means. Seconds."""

    worker_id: str
    device: str | None
    does_all: bool
    num_bytes: int  # of the prompt's KV that are not there
    wait: float  # for room
    asking: float  # until it reads its mail, between two steps
    decode: float  # all of this answer's steps
    slower: float  # by which share prompts to come lengthen them
    batch: int  # answers that are there
    then: float  # seconds for each of their tokens, with this one beside them
    late: float  # how many of them miss the SLO without it
    others: float  # what they have to wait for it
    misses: float  # how many more of them will miss the SLO
    in_time: float  # chance of tokens within the SLO, if nothing comes between the first and the second


class Spread:
    """By which factor times miss their forecast: the deviation of its logarithm, learned from a first guess on.

    It is there to tell whether a promise is kept, so it is learned from times for which that was open. While a load grows, what
    is far below the bound is as far below its forecast, and stays below the bound.
    """

    FIRST_GUESS_COUNTS = 8.0  # observations
    MEMORY = 256.0
    NEAR = 0.5  # to a bound, as a logarithm
    LEAST = 0.05

    def __init__(self, guess: float) -> None:
        self._weight, self._squares = self.FIRST_GUESS_COUNTS, self.FIRST_GUESS_COUNTS * guess * guess
        self._set(guess)

    def learn(self, measured: float, expected: float, bound: float) -> None:
        """No effect where both are far above the bound, or far below."""
        if measured > 0 and expected > 0:
            miss = self._from(bound, measured) - self._from(bound, expected)
            if miss:
                keep = 1 - 1 / self.MEMORY
                self._weight = self._weight * keep + 1
                self._squares = self._squares * keep + miss * miss
                self._set(max(math.sqrt(self._squares / self._weight), self.LEAST))

    def _set(self, deviation: float) -> None:
        self.deviation, self.width = deviation, deviation * ROOT_2

    def _from(self, bound: float, time: float) -> float:
        return min(max(log(time / bound), -self.NEAR), self.NEAR)

    def chance_above(self, bound: float, expected: float) -> float:
        """Probability that the time is longer than `bound`. Both above 0."""
        return erfc(log(bound / expected) / self.width) / 2


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
        self.parts: Mapping[str, str] = {}  # "P" or "D", by id: of collocated workers that are to do no other
        self._num_ended = 0
        self._lengths: dict[tuple[int, int], tuple[int, Length]] = {}  # and how many answers it was made from
        self._routes: dict[tuple[str, str], Route] = {}
        self._links: dict[tuple[str | None, str | None], TransferCost] = {}
        self._quickest = TransferCost("any", "any", "any", min((link.latency_seconds for link in cost.transfers), default=0.0),
                                      max((link.bytes_per_second for link in cost.transfers), default=sys.float_info.max))
        self._batches: dict[int, float] = {}  # seconds of a step of so many decodes, without their contexts
        self._context_seconds = cost.decode.context_token_seconds

    # ------------------------------------------------------------------------------------------- the choice

    def choose(self, question: Question, workers: Sequence[WorkerView]) -> Decision | None:
        length = self._length(question)
        both, first, second = self._shortlists(length, workers)
        prompts: dict[str, Prompt] = {}
        writings: dict[str, Writing] = {}
        for worker_id, worker in {**first, **second, **both}.items():
            running = self._running(worker)
            if worker_id in first or worker_id in both:
                prompts[worker_id] = self._prompt(question, length, worker, running)
            if worker_id in second or worker_id in both:
                writings[worker_id] = self._writing(question, length, worker, running)
        scores = []
        for worker_id, worker in both.items():
            prompt = prompts[worker_id]
            if question.written:  # one that does all computes that too
                prompt = self._prompt(question, length, worker, self._running(worker), question.written)
            scores.append(self._collocated(question, length, prompt, writings[worker_id]))
        scores += self._best_pairs(question, length, [prompts[each] for each in first], [writings[each] for each in second])
        if not scores:
            return None
        scores.sort(key=OBJECTIVE)
        return Decision(scores[0].route, tuple(scores))

    def _shortlists(self, length: Length, workers: Sequence[WorkerView]) -> tuple[dict[str, WorkerView], ...]:
        """By id, the open workers that promise most: for all of the request, for its prompt, and for its answer."""
        able: dict[str, list[WorkerView]] = {"C": [], "P": [], "D": []}
        parts = self.parts
        for worker in workers:
            if worker.is_open:
                role = worker.role
                able[parts.get(worker.worker_id, role) if parts and role == "C" else role].append(worker)
        both, first, second = able["C"], able["P"], able["D"]
        if self.cost.transfers:  # else only those who are to send and receive do so
            first, second = first + both, second + both
        if max(len(both), len(first), len(second)) > SHORTLIST:
            looks = {role: self._looks(length, those) for role, those in able.items()}
            soft = looks["C"] if self.cost.transfers else []
            both, first, second = _least(looks["C"], 0), _least(looks["P"] + soft, 0), _least(looks["D"] + soft, 1)
        return _by_id(both), _by_id(first), _by_id(second)

    def _looks(self, length: Length, workers: Sequence[WorkerView]) -> list[tuple[float, float, WorkerView]]:
        """What is in the way there, roughly, in seconds: of all that is to be done, and of the answer alone."""
        token, sequence = self.cost.prefill.token_seconds, length.mean * self.cost.decode.sequence_seconds
        looks = []
        for worker in workers:  # of which there may be a thousand
            busy = worker.queued[0] * token + worker.seats * sequence
            looks.append((busy - worker.cached_tokens * token, busy, worker))
        return looks

    def _best_pairs(self, question: Question, length: Length, prompts: Sequence[Prompt], writings: Sequence[Writing]) -> list[Score]:
        """Scores of the best. All pairs are compared by what they cost at least: with the quickest link, and with nothing that
        makes this request late but what either worker does by itself. Scores, which tell all, are made of the best by that,
        until no other can be among the best.
        """
        best: list[Score] = []
        for least, prompt, writing in sorted(self._pairs(question, length, prompts, writings), key=LEAST):
            if len(best) == TOLD and best[-1].objective <= least + ALIKE:
                break
            insort(best, self._pair(question, length, prompt, writing), key=OBJECTIVE)
            del best[TOLD:]
        return best

    def _pairs(self, question: Question, length: Length, prompts: Sequence[Prompt],
               writings: Sequence[Writing]) -> list[tuple[float, Prompt, Writing]]:
        """Of two workers each, and their least objective. Where TPOTs are promised, one of the two keeps to its part: who writes
        where any prompt may come is not safe."""
        if not (prompts and writings):
            return []
        waited, others, has_slo, tie_break = question.now - question.arrival, self.others, self.slo is not None, length.tie_break
        fewest_bytes = min([writing.num_bytes for writing in writings])
        quickest, layers = self._quickest.exposed_seconds, self.cost.shape.num_layers
        halves = []
        for writing in writings:
            worker_id, _, does_all, _, wait, asking, decode, slower, _, _, _, held_up, misses, keeps_up = writing
            halves.append((writing, worker_id, has_slo and does_all, wait + asking, others * misses, keeps_up,
                           asking + decode * (1 + slower) + others * held_up))
        found = []
        for prompt in prompts:
            prompt_id, _, does_all, queue, prefill, _, _, delayed, misses, in_time = prompt
            misses *= others
            first = waited + prefill + self.message_seconds + others * delayed + quickest(fewest_bytes, prefill, layers)
            for writing, worker_id, is_soft, room, more_misses, keeps_up, second in halves:
                if worker_id != prompt_id and not (does_all and is_soft):
                    least = first + second + (queue if queue > room else room)
                    if has_slo:
                        least = 1 - in_time * keeps_up + misses + more_misses + tie_break * least
                    found.append((least, prompt, writing))
        return found

    def ended(self, answer: Ended) -> None:
        """Learn from an answer how long answers are, and from its times how good forecasts are."""
        self.predictor.update(answer.prompt_len, answer.output_len, answer.cut)
        self._num_ended += 1
        score = answer.decision and next((each for each in answer.decision.scores if each.route == answer.decision.route), None)
        if score is not None and self.slo is not None:
            self.ttft_spread.learn(answer.ttft, score.ttft, self.slo.ttft)
            if answer.tpot is not None:
                self.tpot_spread.learn(answer.tpot, score.tpot, self.slo.tpot)

    # ------------------------------------------------------------------------------------------- the scores

    def _collocated(self, question: Question, length: Length, prompt: Prompt, writing: Writing) -> Score:
        """Of one worker. Prompts that come later hold the answer up as they have held up others lately, and its own prompt
        holds up those."""
        worker_id, _, _, queue, prefill, delay, _, delayed, _, in_time = prompt
        _, _, _, _, wait, _, decode, slower, batch, then, late, others, _, _ = writing
        misses = 0.0
        if batch and self.slo is not None:
            misses = batch * self.tpot_spread.chance_above(self.slo.tpot, then + delay / length.steps) - late
        interference = decode * slower
        terms = {"waited": question.now - question.arrival, "queue": queue + wait, "prefill": prefill, "decode": decode,
                 "interference": interference, "others": delayed + others}
        return self._score(question, length, self._route(worker_id, worker_id), terms, decode * (1 + slower), 0.0, misses,
                           None if wait else in_time)

    def _pair(self, question: Question, length: Length, prompt: Prompt, writing: Writing) -> Score:
        prefill_id, source, _, prompt_queue, prefill, _, sending, delayed, misses, in_time = prompt
        decode_id, destination, _, num_bytes, wait, asking, decode, slower, _, _, _, others, more_misses, _ = writing
        room = wait + asking
        queue = prompt_queue if prompt_queue > room else room
        link = self._links.get((source, destination)) or self._link(source, destination)
        transfer = link.exposed_seconds(num_bytes, prefill, self.cost.shape.num_layers)
        if sending:  # what is on its way before this prompt's
            before = sending * self.cost.shape.kv_bytes_per_token / link.bytes_per_second
            transfer += max(0.0, before - queue - prefill)
        handover = asking + self.message_seconds
        terms = {"waited": question.now - question.arrival, "queue": queue, "prefill": prefill, "transfer": transfer,
                 "handover": handover, "decode": decode, "interference": decode * slower, "others": delayed + others}
        return self._score(question, length, self._route(prefill_id, decode_id), terms, decode * (1 + slower), transfer + handover,
                           misses + more_misses, in_time if queue == prompt_queue else None)

    def _score(self, question: Question, length: Length, route: Route, terms: dict[str, float], each: float, once: float,
               misses: float, in_time: float | None) -> Score:
        """`each`: seconds after the first token that grow with the answer; `once`: those that do not. `in_time`: the chance of a
        first token within the SLO, where it is known."""
        ttft = terms["waited"] + terms["queue"] + terms["prefill"]
        e2e = ttft + each + once
        steps = length.steps
        objective = e2e + self.others * terms["others"]
        if self.slo is not None:
            in_time = 1 - self.ttft_spread.chance_above(self.slo.ttft, ttft) if in_time is None else in_time
            objective = (1 - in_time * self._chance_to_keep_up(question, length, each / steps, once) + self.others * misses
                         + length.tie_break * objective)
        return Score(route, terms, ttft, (each + once) / steps, e2e, objective)

    def _route(self, prefill: str, decode: str) -> Route:
        route = self._routes.get((prefill, decode))
        if route is None:
            route = self._routes[prefill, decode] = Route(prefill, decode)
        return route

    # -------------------------------------------------------------------------------- what the scores are made of

    def _running(self, worker: WorkerView) -> Running:
        role, (_, _, decodes, contexts) = worker.role, worker.running
        if role == "P" and not decodes:
            return WRITES_NOTHING
        step = self._step(decodes, contexts) if decodes else 0.0
        return Running(role == "C" and worker.worker_id not in self.parts, decodes, contexts, step,
                       self._slower(worker, decodes, contexts, step))

    def _prompt(self, question: Question, length: Length, worker: WorkerView, running: Running, written: int = 0) -> Prompt:
        """On a worker, whoever writes the answer. It holds up those that are written there. `written`: tokens that are computed
        with it."""
        does_all, decodes, contexts, step, slower = running
        room = self.chunk_tokens - decodes  # for prompts, in a step
        room = room if room > 1 else 1
        cached = worker.cached_tokens if self.reads_prefixes else 0
        new = question.prompt_len + written - cached
        steps = -(-new // room)
        prefill = self._prefill_seconds(new, new * (cached + (new + 1) / 2), steps, decodes, contexts, step)
        queue, delay, delayed, misses = 0.0, 0.0, 0.0, 0.0
        tokens, pairs, _, _ = worker.queued
        if tokens:  # prompts before this one
            busy = self._prefill_seconds(tokens, pairs, -(-tokens // room), decodes, contexts, step)
            queue = max(0.0, busy - (question.now - worker.queued_since))
        slo, in_time = self.slo, 1.0
        if decodes:
            queue = queue if queue > step / 2 else step / 2
            delay = prefill - steps * step
            delayed = decodes * delay
            if slo is not None:
                now, bound, width = step * (1 + slower), slo.tpot, self.tpot_spread.width
                misses = decodes * (erfc(log(bound / (now + delay / length.steps)) / width) / 2 - erfc(log(bound / now) / width) / 2)
        if slo is not None:
            in_time = 1 - erfc(log(slo.ttft / (question.now - question.arrival + queue + prefill)) / self.ttft_spread.width) / 2
        return Prompt(worker.worker_id, worker.device, does_all, queue, prefill, delay, worker.sending_tokens, delayed, misses,
                      in_time)

    def _prefill_seconds(self, tokens: int, pairs: float, steps: int, decodes: int, contexts: int, alone: float) -> float:
        """In so many steps, with what is decoded there, which takes `alone` seconds by itself."""
        if not decodes:
            return steps * self.cost.prefill.seconds(tokens / steps, pairs / steps)
        return steps * self.cost.beside_seconds(tokens / steps, pairs / steps, decodes, contexts, alone)

    def _writing(self, question: Question, length: Length, worker: WorkerView, running: Running) -> Writing:
        does_all, decodes, contexts, step, slower = running
        _, prompt_len, _, _, num_answers, written, _, _ = question
        mean, steps, _, _ = length
        batch = worker.seats
        if batch != decodes:  # those that have yet to begin have prompts like this one, for all one knows
            contexts += (batch - decodes) * prompt_len
            step = self._step(batch, contexts)
        after = self._step(batch + num_answers, contexts + num_answers * (prompt_len + (written + mean) / 2))
        sent = prompt_len - (worker.cached_tokens if self.reads_prefixes else 0)
        lacking, waiting = sent - worker.free_tokens, num_answers - worker.free_seats
        wait = late = misses = 0.0
        if batch and (lacking > 0 or waiting > 0):  # each that is there stays for its length, and leaves its seat and its context
            wait = min(max(lacking / max(contexts, 1), waiting / batch), 1.0) * mean * step
        then, in_time = after * (1 + slower), 1.0
        if self.slo is not None:
            bound, width = self.slo.tpot, self.tpot_spread.width
            too_slow = erfc(log(bound / then) / width) / 2
            in_time = 1 - too_slow
            if batch:
                late = batch * (erfc(log(bound / (step * (1 + slower))) / width) / 2)
                misses = batch * too_slow - late
        return Writing(worker.worker_id, worker.device, does_all, sent * self.cost.shape.kv_bytes_per_token, wait,
                       step / 2, steps * after, slower, batch, then, late, batch * steps * (after - step), misses, in_time)

    def _step(self, decodes: int, contexts: float) -> float:
        """As the cost model says, sooner: the same few batches are asked for all the time."""
        seconds = self._batches.get(decodes)
        if seconds is None:
            seconds = self._batches[decodes] = self.cost.decode.seconds(decodes, 0)
        return seconds + contexts * self._context_seconds

    def _slower(self, worker: WorkerView, decodes: int, contexts: int, alone: float) -> float:
        """By which share decode steps, which take `alone` seconds, take longer because of prompts to come, if those come as they
        came lately."""
        prompts, tokens = worker.prompts_per_second
        if prompts < LEAST_RATE:
            return 0.0
        if not decodes:
            decodes, alone = 1, self._step(1, contexts)
        new, room = tokens / prompts, self.chunk_tokens - decodes
        steps = new / room if new > room > 1 else new if room <= 1 < new else 1.0
        longer = steps * (self.cost.beside_seconds(new / steps, attended_pairs(new) / steps, decodes, contexts, alone) - alone)
        share = min(max(prompts * longer, 0.0), BUSIEST)  # of the time
        return share / (1 - share)

    def _link(self, source: str | None, destination: str | None) -> TransferCost:
        link = self._links[source, destination] = self.cost.transfer(source or "", destination or "")
        return link

    def _chance_to_keep_up(self, question: Question, length: Length, per_token: float, once: float) -> float:
        """Of tokens after the first within the SLO. What is paid once weighs more on a short answer."""
        if per_token <= 0:
            return 1.0
        width, bound = self.tpot_spread.width, self.slo.tpot
        done, (low, middle, high) = question.written + 1, length.thirds
        low = low - done if low - done > 1.0 else 1.0
        if once < SMALL * per_token * low:
            return 1 - erfc(log(bound / (per_token + once / max(1.0, length.mean - done))) / width) / 2
        middle = middle - done if middle - done > 1.0 else 1.0
        high = high - done if high - done > 1.0 else 1.0
        return 1 - (erfc(log(bound / (per_token + once / low)) / width) / 2 + erfc(log(bound / (per_token + once / middle)) / width) / 2
                    + erfc(log(bound / (per_token + once / high)) / width) / 2) / 3

    # -------------------------------------------------------------------------------------------- the length

    def _length(self, question: Question) -> Length:
        if question.min_tokens >= question.max_tokens:
            tokens = float(question.max_tokens)
            return self._of_length(question, tokens, (tokens, tokens, tokens))
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
            return self._of_length(question, question.max_tokens, (question.max_tokens,) * 3)
        forecast = self.predictor.predict(question.prompt_len, question.max_tokens, question.written)
        least = question.min_tokens
        return self._of_length(question, max(forecast.mean(), least),
                               tuple(max(forecast.quantile(p), least) for p in (1 / 6, 1 / 2, 5 / 6)))

    def _of_length(self, question: Question, mean: float, thirds: tuple[float, float, float]) -> Length:
        tie_break = TIE_BREAK / (self.slo.ttft + mean * self.slo.tpot) if self.slo is not None else 0.0
        return Length(mean, max(1.0, mean - question.written - 1), thirds, tie_break)


def _by_id(workers: Sequence[WorkerView]) -> dict[str, WorkerView]:
    return {worker.worker_id: worker for worker in workers}


def _least(looks: list[tuple[float, float, WorkerView]], by: int) -> list[WorkerView]:
    return [worker for _, _, worker in sorted(looks, key=itemgetter(by))[:SHORTLIST]]


OBJECTIVE = attrgetter("objective")
LEAST = itemgetter(0)
WRITES_NOTHING = Running(False, 0, 0, 0.0, 0.0)
