"""A model without a model, and the books that a client would keep. Torch-free, for engines and whole clusters.

The fake's cache is a dict: (block, offset) -> what a key would hold, a number made of the token and of what stands
before it, as read through the block table. So a wrong block, a dropped copy or a block given away too early
changes every number after it, and the next token with them. Rows are checked against the true numbers as they run.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial

from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.config import CacheConfig, SchedulerConfig
from nanopd.core import FinishReason, Phase, Request, RowResult, StepResult
from nanopd.engine.engine import Engine
from nanopd.engine.limits import Limits
from nanopd.engine.scheduler import Scheduler

VOCAB = 12
EOS = 0

# ------------------------------------------------------------------------------- the fake, as a pure function


def key_after(before, token, layer):
    """What the cache holds for `token` where `before` is what it holds for the token in front (None: nothing)."""
    return hash((layer, -1 if before is None else before, token))


def key_of(token_ids, layer):
    key = None
    for token in token_ids:
        key = key_after(key, token, layer)
    return key


def draw(key, answer):
    return hash((key, answer, 1)) % VOCAB


def logprobs_after(key):
    """(token, logprob) of the whole vocabulary, likeliest first."""
    scores = [hash((key, token, 2)) % 10007 / 2500 for token in range(VOCAB)]
    total = math.log(sum(math.exp(score) for score in scores))
    return sorted(((token, score - total) for token, score in enumerate(scores)), key=lambda pair: -pair[1])


def expected_answer(request, index, max_len, num_layers=1):
    """The tokens an undisturbed answer has, and why it ends."""
    sampling, tokens = request.sampling, []
    while True:
        token = draw(key_of([*request.prompt_token_ids, *tokens], num_layers - 1), index)
        tokens.append(token)
        stops = (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids
        if stops and len(tokens) > sampling.min_tokens:
            return tokens, FinishReason.STOP
        if len(tokens) == sampling.max_tokens or len(request.prompt_token_ids) + len(tokens) >= max_len:
            return tokens, FinishReason.LENGTH


def expected_beams(request, max_len, num_layers=1):
    """The answers of a beam search, best first: (tokens, reason). With every continuation in view at every turn."""
    params, prompt = request.beam, request.prompt_token_ids
    beams, found = [(0.0, [])], []
    while True:
        ranked = sorted(((total + logprob, [*tokens, token]) for total, tokens in beams
                         for token, logprob in logprobs_after(key_of([*prompt, *tokens], num_layers - 1))),
                        key=lambda beam: -beam[0])
        going_on = []
        for rank, (total, tokens) in enumerate(ranked):
            stops = tokens[-1] == EOS and not params.ignore_eos
            if not stops and len(tokens) < params.max_tokens and len(prompt) + len(tokens) < max_len:
                going_on.append((total, tokens))
            elif rank < params.beam_width:
                reason = FinishReason.STOP if stops else FinishReason.LENGTH
                found.append((total / len(tokens) ** params.length_penalty, tokens, reason))
        found = sorted(found, key=lambda answer: -answer[0])[: params.beam_width]
        full = len(found) == params.beam_width
        if not going_on or (full and going_on[0][0] / len(going_on[0][1]) ** params.length_penalty <= found[-1][0]):
            return [(tokens, reason) for _, tokens, reason in found]
        beams = going_on[: params.beam_width]


# ------------------------------------------------------------------------------------------ engine and runner


class FakeCache:
    """One dict per layer."""

    bytes_per_block = 1

    def __init__(self, num_layers=1):
        self.num_layers = num_layers
        self.layers = [{} for _ in range(num_layers)]

    def copy_blocks(self, pairs, block_size):
        for layer in self.layers:
            read = [(destination, offset, layer.get((source, offset)))
                    for source, destination in pairs for offset in range(block_size)]
            for destination, offset, key in read:
                layer[destination, offset] = key


class Breakdown(RuntimeError):
    """What a broken runner raises."""


class NotedRow:
    """A row as it was when its step was handed over: the sequence goes on while the step runs."""

    def __init__(self, row):
        self.row = row
        self.sequence = row.sequence
        self.token_ids = row.sequence.token_ids[: row.num_cached + row.num_new]
        self.num_cached = row.num_cached
        self.num_logits = row.num_logits
        self.block_table = list(row.block_table)
        self.checked = True  # whether what it reads must be right


@dataclass
class Job:
    """A step that a runner has been given."""

    copies: list
    rows: list[NotedRow]
    before: Job | None = None  # the step launched before it, whose draws its placeholders stand for
    result: StepResult | None = None
    draws: list[int] = field(default_factory=list)


class FakeRunner:
    """Carries plans out in a FakeCache. `faults` lists what was wrong with them: an engine would swallow a raise.

    `break_at` makes the next step raise `break_with`: "start", "middle" (copies done, one layer written) or "end". A row
    of a request in `spoiled` comes back with an error.
    """

    def __init__(self, scheduler, num_layers=1):
        self.scheduler = scheduler
        self.cache = FakeCache(num_layers)
        self.faults = []
        self.plans = []
        self.break_at = None
        self.break_with = Breakdown
        self.spoiled = set()
        self.counts = Counter()

    def execute(self, plan, on_layer=None):
        return self._run(self._note(plan), on_layer)

    def _note(self, plan):
        """All that the step needs to know, as it is now."""
        self.plans.append(plan)
        self._check_plan(plan)
        return Job(list(plan.copies), [NotedRow(row) for row in plan.rows])

    def _run(self, job, on_layer=None):
        self._maybe_break("start")
        self.cache.copy_blocks(job.copies, self.scheduler.manager.block_size)
        for layer in range(len(self.cache.layers)):
            keys = [self._run_row(row, layer) for row in job.rows]
            if on_layer is not None:
                on_layer(layer)
            self._maybe_break("middle")
        self._maybe_break("end")
        return StepResult([self._draw(noted.row, of_row) for noted, of_row in zip(job.rows, keys, strict=True)])

    def _maybe_break(self, moment):
        if self.break_at == moment:
            self.break_at = None
            self.counts["raises"] += 1
            raise self.break_with(f"the runner broke at the {moment}")

    def _run_row(self, row, layer):
        """The keys of the tokens after which the row draws."""
        cache, size = self.cache.layers[layer], self.scheduler.manager.block_size
        key, truth, keys = None, None, []
        for position, token in enumerate(row.token_ids):
            slot = row.block_table[position // size], position % size
            truth = key_after(truth, token, layer)
            if position >= row.num_cached:
                cache[slot] = key_after(key, token, layer)
            key = cache.get(slot)
            self._require(key == truth or not row.checked,
                          f"{row.sequence} reads position {position} wrong in block {slot[0]}")
            keys.append(key)
        return keys[len(keys) - row.num_logits :]

    def _draw(self, row, keys):
        if row.request.request_id in self.spoiled:
            self.spoiled.discard(row.request.request_id)
            self.counts["row errors"] += 1
            return RowResult(error="spoiled")
        answers = range(row.sequence.index, row.sequence.index + row.num_samples)
        top = logprobs_after(keys[-1])[: row.num_top] if row.num_top else []
        return RowResult([draw(key, answer) for key in keys for answer in answers], [-1.0] * row.num_draws, top)

    def _check_plan(self, plan):
        """What every plan promises."""
        scheduler, manager = self.scheduler, self.scheduler.manager
        config = scheduler.config
        self.counts["copies"] += len(plan.copies)
        self.counts["preemptions"] += len(plan.preempted)
        self.counts["drafts"] += sum(row.num_drafts for row in plan.rows)
        self.counts["shared steps"] += len({row.kind for row in plan.rows}) == 2
        self._require(plan.num_tokens <= config.max_num_batched_tokens, f"{plan.num_tokens} tokens in a step")
        self._require(len(plan.rows) <= config.max_num_seqs, f"{len(plan.rows)} rows in a step")
        self._require(scheduler.num_seats_taken <= config.max_num_seqs, f"{scheduler.num_seats_taken} seats taken")
        destinations = [destination for _, destination in plan.copies]
        self._require(len(set(destinations)) == len(destinations), "a block is the destination of two copies")
        written = Counter()
        for row in plan.rows:
            self._check_row(row, config)
            size = manager.block_size
            blocks = row.block_table[row.num_cached // size : -(-(row.num_cached + row.num_new) // size)]
            written.update(blocks)
            for block in blocks:
                self._require(manager.ref_count(block) == 1, f"{row.sequence} writes to shared block {block}")
                self._require(not manager.pool.is_cached(block), f"{row.sequence} writes to cached block {block}")
        self._require(not written or max(written.values()) == 1, "two rows write to one block")
        self._check_order(plan)

    def _check_row(self, row, config):
        sequence = row.sequence
        self._require(row.num_new >= 1 and row.num_cached == sequence.num_computed, f"{sequence} is planned from elsewhere")
        self._require(row.num_new - row.num_drafts <= (config.prefill_chunk_size or row.num_new), f"a chunk of {row.num_new} tokens")
        self._require(sequence.phase in (Phase.PREFILL, Phase.DECODE), f"{sequence} runs")
        self._require(row.block_table == self.scheduler.manager.block_table(sequence), f"{sequence} has another table")
        draws = row.num_cached + row.num_new == len(sequence)
        self._require(draws == (row.num_samples > 0), f"{sequence} draws {row.num_samples}")

    def _check_order(self, plan):
        """Whoever is preempted is younger than all that run."""
        tickets = {entry.group.request_id: entry.ticket for entry in (*self.scheduler.waiting, *self.scheduler.running)}
        running = [entry.ticket for entry in self.scheduler.running]
        for request_id in plan.preempted:
            self._require(not running or tickets[request_id] > max(running),
                          f"request {request_id} was preempted while a younger one runs")

    def _require(self, condition, fault):
        if not condition:
            self.faults.append(fault)


class Oracle:
    """Proposes the very tokens that will be drawn, but for every `wrong`-th."""

    def __init__(self, ledger, num_tokens=4, wrong=5):
        self.ledger = ledger
        self.num_tokens = num_tokens
        self.wrong = wrong
        self.known = set()  # sequences that have not been forgotten

    def propose(self, sequence, limit):
        self.known.add(sequence.seq_id)
        request = self.ledger.requests[sequence.request_id]
        tokens = list(sequence.token_ids)
        while len(tokens) < len(sequence) + min(self.num_tokens, limit):
            token = draw(key_of(tokens, self.ledger.num_layers - 1), sequence.index)
            tokens.append((token + (len(tokens) % self.wrong == 0)) % VOCAB)
        assert tokens[: len(request.prompt_token_ids)] == request.prompt_token_ids
        return tokens[len(sequence) :]

    def forget(self, sequence):
        self.known.discard(sequence.seq_id)


class LaunchingRunner(FakeRunner):
    """A device that works on its own, as late as it can: a step runs when its result is asked for, after all those launched
    before it. It knows what it was given at the launch, and for a placeholder what the step launched before has drawn.

    `break_at` may be "launch" too.
    """

    def __init__(self, scheduler, num_layers=1):
        super().__init__(scheduler, num_layers)
        self._queue = deque()
        self._last = None

    def launch(self, plan, on_layer=None):
        job = self._note(plan)
        job.before, self._last = self._last, None
        self._check_placeholders(job)
        self._maybe_break("launch")
        self._queue.append(job)
        self._last = job
        return partial(self._wait, job, on_layer)

    def _check_placeholders(self, job):
        before = job.before
        num_draws = sum(noted.row.num_draws for noted in before.rows) if before else 0
        for noted in job.rows:
            row = noted.row
            unknown = [token for token in noted.token_ids if token < 0]
            self.counts["ahead"] += len(unknown)
            self._require(all(-1 - token < num_draws for token in unknown), f"{row.sequence} waits for a draw that nobody makes")
            self._require(all(token >= 0 for token in noted.token_ids[:-1]), f"{row.sequence} waits for more than one token")
            self._require(row.num_drafts == 0 or not unknown, f"{row.sequence} drafts on top of a token that is not known")
            plain = row.request.beam is None and row.request.sampling.repetition_penalty == 1
            self._require(plain or not unknown, f"{row.sequence} draws by what it has written, and does not know it")

    def _wait(self, job, on_layer):
        self._maybe_break("start")  # the device will carry it out all the same
        while job.result is None:
            self._run_next(self._queue.popleft(), on_layer, awaited=job)
        return job.result

    def _run_next(self, job, on_layer, awaited):
        """A step that nobody waits for any more was taken back: it may read what is no longer there."""
        for row in job.rows:
            row.token_ids = [token if token >= 0 else job.before.draws[-1 - token] for token in row.token_ids]
            row.checked = job is awaited and not row.sequence.finished
        job.before = None
        # What a device leaves where its draws should be, if the step breaks:
        job.draws = [VOCAB] * sum(noted.row.num_draws for noted in job.rows)
        job.result = self._run(job, on_layer)
        job.draws = [token for noted, drawn in zip(job.rows, job.result.rows, strict=True)
                     for token in drawn.token_ids or [VOCAB] * noted.row.num_draws]


def make_engine(num_blocks=32, block_size=4, *, caching=True, watermark=0.0, max_num_seqs=8, budget=32, chunk=None,
                max_model_len=64, num_layers=1, eos=(EOS,), ahead=False, proposer=None):
    """An engine around a FakeRunner; `ahead`: around one that launches."""
    manager = BlockSpaceManager.from_config(CacheConfig(num_blocks, block_size, caching, watermark))
    scheduler = Scheduler(SchedulerConfig(max_num_seqs, budget, chunk, max_model_len), manager, eos, proposer)
    limits = Limits(VOCAB, max_model_len, num_blocks, block_size, max_num_seqs)
    runner = LaunchingRunner if ahead else FakeRunner
    return Engine(runner(scheduler, num_layers), scheduler, limits)


# ------------------------------------------------------------------------------------------------- the checks


class Ledger:
    """What a client sees: every answer's tokens, and its one end."""

    def __init__(self, max_len, num_layers=1):
        self.max_len = max_len
        self.num_layers = num_layers
        self.requests: dict[str, Request] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], FinishReason] = {}
        self.errors: dict[str, str] = {}

    def add(self, request):
        self.requests[request.request_id] = request
        self.tokens.update({(request.request_id, index): [] for index in range(request.num_answers)})

    def take(self, events):
        for event in events:
            answer = event.request_id, event.index
            assert answer in self.tokens, f"an event for {answer}, which nobody asked for"
            assert answer not in self.ends, f"an event after the end of {answer}"
            if event.token_id is not None:
                self.tokens[answer].append(event.token_id)
            if event.finish_reason is not None:
                self.ends[answer] = event.finish_reason
            if event.error is not None:
                self.errors[event.request_id] = event.error
        return events

    @property
    def open(self):
        """Ids of the requests with answers that have not ended."""
        return list(dict.fromkeys(request_id for request_id, index in self.tokens if (request_id, index) not in self.ends))

    def assert_every_answer_ended_once(self):
        """Once at most is what `take` holds."""
        assert set(self.ends) == set(self.tokens), f"never ended: {sorted(set(self.tokens) - set(self.ends))}"

    def assert_tokens_are_right(self):
        """An answer that ran to its end has exactly the model's tokens, a broken off one the first of them."""
        for request_id, request in self.requests.items():
            truth = ([expected_answer(request, index, self.max_len, self.num_layers) for index in range(request.num_answers)]
                     if request.beam is None else expected_beams(request, self.max_len, self.num_layers))
            for index, (tokens, reason) in enumerate(truth):
                self._assert_answer(request, (request_id, index), tokens, reason)

    def _assert_answer(self, request, answer, tokens, reason):
        got, end = self.tokens[answer], self.ends.get(answer)
        if end in (FinishReason.STOP, FinishReason.LENGTH):
            assert (got, end) == (tokens, reason), f"answer {answer} of {request}"
        else:
            assert got == tokens[: len(got)], f"answer {answer} of {request}, ended by {end}"


def assert_nothing_left(manager):
    """Everybody has gone: the books balance, and no block or lease is held."""
    manager.check()
    assert manager.num_used_blocks == 0 and manager.leases == [], manager.snapshot()


def assert_engine_is_empty(engine):
    scheduler = engine.scheduler
    assert not engine.has_work
    assert (scheduler.waiting, scheduler.running, scheduler.handed_off, scheduler.beams) == ([], [], {}, {})
    assert scheduler.num_seats_taken == 0
    assert_nothing_left(scheduler.manager)


def assert_plans_were_sound(runner):
    """The fake runner found nothing wrong with the plans, nor with what it read from the cache."""
    assert not runner.faults, runner.faults


def drain(engine, ledger, max_steps):
    """Run until nothing is left. Returns how many steps that took, `max_steps` at most."""
    for steps in range(max_steps + 1):
        if not engine.has_work:
            return steps
        ledger.take(engine.step())
        assert_plans_were_sound(engine.runner)
    raise AssertionError(f"not done after {max_steps} steps: {engine.scheduler.waiting} {engine.scheduler.running}")
