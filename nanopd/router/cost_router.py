"""The reference router: what would each route cost this request, and those that are there already?

Every collocated worker is scored, and every pair of one that computes the prompt and another that writes the answer: prefill
and decode workers, and collocated ones, which can do either part. See `Score`. Without an SLO, what counts is the request's own
time and, as much, what it takes from others. With one it is how many requests are expected to miss it: this one, by its
chance, and those beside it, by how much theirs grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from heapq import nsmallest
from operator import itemgetter
from typing import NamedTuple

from nanopd.config import SLO, ConfigError
from nanopd.cost_model.analytical import CostModel, StepWork, TransferCost, attended_pairs
from nanopd.router.length_predictor import LengthPredictor
from nanopd.router.routing import Decision, Ended, Question, Route, Score, WorkerView

SHORTLIST = 4  # workers of a role that are scored, where there are more
SMALL = 0.02  # share of the time for an answer's tokens, below which its length does not matter for what comes on top
LEAST_RATE = 1e-3  # prompts a second, below which there are none
BUSIEST = 0.9  # share of its time that a worker can give to prompts while it decodes
FEW = 64  # a forecast of length is good until 1/64 more answers have ended
TIE_BREAK = 0.01  # missed SLOs that a second's worth of each bound counts as


class Length(NamedTuple):
    """Forecast of an answer's length in tokens, how many steps are left for it after the prompt's last one (taken to be at least
    1), and a low, middle and high third of its lengths."""

    mean: float
    steps: float
    thirds: tuple[float, float, float]


class Beside(NamedTuple):
    """What decodes mean for the prompts that share their steps."""

    decodes: int
    step: float  # seconds, without a prompt
    extra: float  # seconds that they add to a step with one, besides being tokens of it
    room: int  # for tokens of prompts


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


class Option(NamedTuple):
    """A route with what makes up its score: quicker to make, and most scores are never looked at. Seconds."""

    objective: float
    prefilling: str  # worker ids
    decoding: str
    waited: float
    queue: float
    prefill: float
    transfer: float
    handover: float
    decode: float
    interference: float
    others: float
    steps: float

    @property
    def route(self) -> Route:
        return Route(self.prefilling, self.decoding)

    def score(self) -> Score:
        terms = {"waited": self.waited, "queue": self.queue, "prefill": self.prefill}
        if self.prefilling != self.decoding:
            terms |= {"transfer": self.transfer, "handover": self.handover}
        terms |= {"decode": self.decode, "interference": self.interference}
        ttft = self.waited + self.queue + self.prefill
        after = self.transfer + self.handover + self.decode + self.interference
        return Score(self.route, terms | {"others": self.others}, ttft, after / self.steps, ttft + after, self.objective)


class Scores(Sequence[Score]):
    """The scores of options, made as they are asked for."""

    __slots__ = ("_options",)

    def __init__(self, options: list[Option]) -> None:
        self._options = options

    def __len__(self) -> int:
        return len(self._options)

    def __getitem__(self, index: int) -> Score:
        return self._options[index].score()


class Spread:
    """By which factor times miss their forecast: the deviation of its logarithm, learned from a first guess on."""

    FIRST_GUESS_COUNTS = 8.0  # observations
    MEMORY = 256.0

    def __init__(self, guess: float) -> None:
        self._weight, self._squares = self.FIRST_GUESS_COUNTS, self.FIRST_GUESS_COUNTS * guess * guess
        self._settle()

    def _settle(self) -> None:
        self.deviation = max(math.sqrt(self._squares / self._weight), 0.02)
        self._scale = 1 / (self.deviation * math.sqrt(2))
        self._most = math.exp(5 * self.deviation)  # beyond five deviations a chance is as good as 0 or 1

    def learn(self, measured: float, expected: float) -> None:
        if measured > 0 and expected > 0:
            keep = 1 - 1 / self.MEMORY
            self._weight = self._weight * keep + 1
            self._squares = self._squares * keep + min(abs(math.log(measured / expected)), 1.5) ** 2
            self._settle()

    def chance_above(self, bound: float, expected: float) -> float:
        """Probability that the time is longer than `bound`. Both above 0."""
        room = bound / expected
        if room > self._most:
            return 0.0
        return math.erfc(math.log(room) * self._scale) / 2 if room * self._most > 1 else 1.0


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
        self._bytes_per_token, self._num_layers = cost.shape.kv_bytes_per_token, cost.shape.num_layers
        self._alone = Beside(0, 0.0, 0.0, self.chunk_tokens)
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
        options = [self._collocated(question, length, worker) for worker in _shortlist(able["C"], lambda worker: (
            (worker.queued.prompt_tokens - worker.cached_tokens) * token + worker.seats * sequence))]
        both = {worker.worker_id for worker in able["C"]}
        if (len(able["P"]) > len(both) or len(able["D"]) > len(both)) or (len(both) > 1 and self.slo is None):
            prompts = [self._prompt(question, length, worker) for worker in _shortlist(able["P"], lambda worker: (
                (worker.queued.prompt_tokens - worker.cached_tokens) * token + worker.running.decodes * sequence))]
            writings = [self._written_elsewhere(question, length, worker) for worker in _shortlist(able["D"], lambda worker: (
                worker.seats * sequence + worker.queued.prompt_tokens * token))]
            # Where TPOTs are promised, one of the two keeps to its part: who writes where any prompt may come is not safe.
            options += [self._disaggregated(question, length, prompt, writing) for prompt in prompts for writing in writings
                        if prompt.worker_id != writing.worker_id and (
                            self.slo is None or prompt.worker_id not in both or writing.worker_id not in both)]
        if not options:
            return None
        options.sort(key=_objective)
        return Decision(options[0].route, Scores(options))

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

    def _collocated(self, question: Question, length: Length, worker: WorkerView) -> Option:
        """Prompts that come later hold the answer up as they have held up others lately, and its own prompt holds up those."""
        running = worker.running
        beside = self._beside(running.decodes, running.context_tokens)
        queue, prefill, num_steps, cached = self._computing(question, worker, question.written, beside)
        slower = self._slower(worker, beside)
        delay = prefill - num_steps * beside.step
        writing = self._writing(question, length, worker, running, cached, delay, slower)
        queue = max(queue, beside.step / 2) + writing.wait
        waited, interference = question.now - question.arrival, writing.decode * slower
        others = beside.decodes * delay + writing.others
        objective = waited + queue + prefill + writing.decode + interference + self.others * others
        if self.slo is not None:
            per_token = (writing.decode + interference) / length.steps
            objective = self._misses(question, length, waited + queue + prefill, per_token, 0.0, writing.misses, objective)
        return Option(objective, worker.worker_id, worker.worker_id, waited, queue, prefill, 0.0, 0.0, writing.decode,
                      interference, others, length.steps)

    def _disaggregated(self, question: Question, length: Length, prompt: Prompt, writing: Writing) -> Option:
        source, device, queue, prefill, sending, beside, misses_beside = prompt
        destination, to_device, wait, step, decode, slower, others, misses, sent = writing
        asking = step / 2  # a worker reads its mail between two steps
        if queue < wait + asking:
            queue = wait + asking
        link = self._links.get((device, to_device)) or self._link(device, to_device)
        transfer = link.exposed_seconds(sent * self._bytes_per_token, prefill, self._num_layers)
        if sending:  # what is on its way before this prompt's
            transfer += max(0.0, sending * self._bytes_per_token / link.bytes_per_second - queue - prefill)
        handover = asking + self.message_seconds
        waited, interference, others = question.now - question.arrival, decode * slower, others + beside
        objective = waited + queue + prefill + transfer + handover + decode + interference + self.others * others
        if self.slo is not None:
            objective = self._misses(question, length, waited + queue + prefill, (decode + interference) / length.steps,
                                     transfer + handover, misses + misses_beside, objective)
        return Option(objective, source, destination, waited, queue, prefill, transfer, handover, decode, interference, others,
                      length.steps)

    # -------------------------------------------------------------------------------- what the scores are made of

    def _prompt(self, question: Question, length: Length, worker: WorkerView) -> Prompt:
        """Of a request whose answer is written elsewhere. It holds up those that are written here."""
        _, _, decodes, contexts = worker.running
        beside = self._beside(decodes, contexts)
        queue, prefill, steps, _ = self._computing(question, worker, 0, beside)
        if not decodes:
            return Prompt(worker.worker_id, worker.device, queue, prefill, worker.sending_tokens, 0.0, 0.0)
        delay = prefill - steps * beside.step
        now = beside.step * (1 + self._slower(worker, beside))
        return Prompt(worker.worker_id, worker.device, max(queue, beside.step / 2), prefill, worker.sending_tokens,
                      decodes * delay, self._more_misses(decodes, now, now + delay / length.steps))

    def _written_elsewhere(self, question: Question, length: Length, worker: WorkerView) -> Writing:
        """An answer whose prompt another worker computes."""
        running, cached = worker.running, worker.cached_tokens if self.reads_prefixes else 0
        slower = self._slower(worker, self._beside(running.decodes, running.context_tokens)) if worker.role == "C" else 0.0
        return self._writing(question, length, worker, running, cached, slower=slower)

    def _beside(self, decodes: int, contexts: int) -> Beside:
        if not decodes:
            return self._alone
        return Beside(decodes, self.cost.decode.seconds(decodes, contexts), self.cost.mixed.seconds(decodes, contexts),
                      max(self.chunk_tokens - decodes, 1))

    def _computing(self, question: Question, worker: WorkerView, written: int, beside: Beside) -> tuple[float, float, int, int]:
        """Seconds until the prompts before this one are computed, seconds that it takes itself, in how many steps, and how many of
        its tokens are cached."""
        queued_tokens, queued_pairs, _, _ = worker.queued
        queue = 0.0
        if queued_tokens:
            steps = -(-queued_tokens // beside.room)
            queue = steps * self._chunk(queued_tokens / steps, queued_pairs / steps, beside) - question.now + worker.queued_since
        cached = worker.cached_tokens if self.reads_prefixes else 0
        new = question.prompt_len + written - cached
        steps = -(-new // beside.room)
        prefill = steps * self._chunk(new / steps, attended_pairs(new, cached) / steps, beside)
        return (queue if queue > 0 else 0.0), prefill, steps, cached

    def _chunk(self, tokens: float, pairs: float, beside: Beside) -> float:
        """A step with so much of prompts, as `CostModel.step_seconds` has it."""
        seconds = self.cost.prefill.seconds(tokens + beside.decodes, pairs) + beside.extra
        return seconds if seconds > beside.step else beside.step

    def _writing(self, question: Question, length: Length, worker: WorkerView, running: StepWork, cached: int,
                 delay: float = 0.0, slower: float = 0.0) -> Writing:
        """`delay`: of all that write there, by the prompt; `slower`: by prompts to come, as a share."""
        _, _, decodes, contexts = running
        num_answers, prompt_len, batch = question.num_answers, question.prompt_len, worker.seats
        sent = prompt_len - cached
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

    def _slower(self, worker: WorkerView, beside: Beside) -> float:
        """By which share prompts lengthen decoding, if they come as they have come lately."""
        prompts, tokens = worker.prompts_per_second
        if prompts < LEAST_RATE:
            return 0.0
        if not beside.decodes:  # there will be this answer at least
            beside = self._beside(1, 0)
        new = tokens / prompts
        steps = max(1.0, new / beside.room)
        longer = steps * (self._chunk(new / steps, attended_pairs(new) / steps, beside) - beside.step)
        share = min(prompts * longer, BUSIEST)
        return share / (1 - share)

    def _link(self, source: str | None, destination: str | None) -> TransferCost:
        link = self._links[source, destination] = self.cost.transfer(source or "", destination or "")
        return link

    def _misses(self, question: Question, length: Length, ttft: float, per_token: float, once: float, misses: float,
                seconds: float) -> float:
        """How many requests are expected to miss the SLO on account of this one, `misses` of them others; among equals, those that take less time first.
        `once`: what comes on top of the time for the tokens."""
        return (self._chance_to_miss(question, length, ttft, per_token, once) + self.others * misses
                + TIE_BREAK * seconds / (self.slo.ttft + length.mean * self.slo.tpot))

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


_objective = itemgetter(0)
