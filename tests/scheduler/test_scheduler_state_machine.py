"""Any order of requests, steps, cancels and faults, on an engine whose model is a dict.

Half the runs have a runner that launches, so that the engine plans a step before the one before it has ended.

After every move: the block manager's books balance, every row has read exactly its own context from the cache, no
budget was passed, and nobody was preempted while a younger request ran. At the end: every answer has ended exactly
once, with the very tokens that an undisturbed model draws, and every block is free.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduler.fakes import (
    VOCAB,
    Breakdown,
    Ledger,
    Oracle,
    assert_engine_is_empty,
    assert_nothing_left,
    assert_plans_were_sound,
    expected_answer,
    make_engine,
)

from nanopd.core import BeamSearchParams, FinishReason, InvalidRequest, Phase, Request, SamplingParams

moves = Counter()  # how often each thing happened: the tests below ask that enough of it did
picks = st.integers(0, 10**6)


@st.composite
def prompts(draw):
    """Prompts that often begin alike."""
    shared = [1, 2, 1, 1, 2, 2, 1, 2, 1, 1, 1, 2][: draw(st.integers(0, 12))]
    return shared + draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6))


@st.composite
def asked(draw):
    """SamplingParams or BeamSearchParams."""
    max_tokens = draw(st.sampled_from([1, 3, 8, 12, 12]))
    if draw(st.integers(0, 4)) == 0:
        return BeamSearchParams(draw(st.integers(2, 3)), max_tokens, draw(st.sampled_from([0.5, 1.0, 2.0])), draw(st.booleans()))
    n = draw(st.sampled_from([1, 1, 2, 3]))
    stops = draw(st.sampled_from([(), (), (3,), (3, 4)]))
    return SamplingParams(n=n, temperature=0 if n == 1 else 1, max_tokens=max_tokens, stop_token_ids=stops,
                          ignore_eos=draw(st.sampled_from([True, True, False])), min_tokens=draw(st.integers(0, min(3, max_tokens))),
                          repetition_penalty=draw(st.sampled_from([1, 1, 1, 1.5])))


def work_of(request, max_len):
    """Tokens that a request needs run if nobody disturbs it, its answers one after the other."""
    return len(request.prompt_token_ids) + request.num_answers * min(request.max_tokens, max_len)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_tokens=st.integers(12, 30),  # that the pool holds
        block_size=st.integers(1, 4),
        caching=st.booleans(),
        watermark=st.sampled_from([0.0, 0.0, 0.2]),
        max_num_seqs=st.integers(2, 6),
        spare_budget=st.sampled_from([0, 2, 30]),
        chunk=st.sampled_from([None, None, 1, 3]),
        max_model_len=st.sampled_from([12, 40]),
        ahead=st.booleans(),
        drafts=st.sampled_from([0, 0, 2, 5]),
    )
    def set_up(self, num_tokens, block_size, caching, watermark, max_num_seqs, spare_budget, chunk, max_model_len, ahead, drafts):
        self.engine = make_engine(-(-num_tokens // block_size), block_size, caching=caching, watermark=watermark, max_num_seqs=max_num_seqs,
                                  budget=max_num_seqs + spare_budget, chunk=chunk, max_model_len=max_model_len, ahead=ahead)
        self.scheduler, self.runner = self.engine.scheduler, self.engine.runner
        self.ledger = Ledger(self.scheduler.max_len)
        self.oracle = self.scheduler.proposer = Oracle(self.ledger, drafts) if drafts else None
        self.seen = []  # every sequence that a plan has named

    @rule(prompt=prompts(), params=asked(), handoff=st.sampled_from([False, False, False, True]))
    def add(self, prompt, params, handoff):
        self.add_request(prompt, params, handoff)

    @rule(prompt=prompts(), params=asked(), times=st.integers(2, 4))
    def add_several(self, prompt, params, times):
        for _ in range(times):
            self.add_request(prompt, params)

    def add_request(self, prompt, params, handoff=False):
        is_beam = isinstance(params, BeamSearchParams)
        request = Request(str(len(self.ledger.requests)), prompt, SamplingParams() if is_beam else params,
                          beam=params if is_beam else None)
        try:
            self.engine.add(request, handoff=handoff)
        except InvalidRequest:
            moves["refused for ever"] += 1
            return
        moves["beams" if is_beam else f"n={params.n}"] += 1
        self.ledger.add(request)

    @rule(times=st.sampled_from([1, 1, 2, 5]))
    def step(self, times):
        for _ in range(times):
            moves["step"] += 1
            num_plans = len(self.runner.plans)
            self.ledger.take(self.engine.step())
            self.seen += [row.sequence for plan in self.runner.plans[num_plans:] for row in plan.rows]
            assert_plans_were_sound(self.runner)

    def a_request(self, index):
        return self.ledger.open[index % len(self.ledger.open)]

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks)
    def cancel(self, index):
        request_id = self.a_request(index)
        moves["cancel"] += 1
        events = self.ledger.take(self.engine.cancel(request_id))
        assert events and request_id not in self.ledger.open
        assert self.engine.cancel(request_id) == []

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks, answer=st.integers(0, 2))
    def cancel_one_answer(self, index, answer):
        request_id = self.a_request(index)
        events = self.ledger.take(self.engine.cancel(request_id, answer))
        moves["cancel one"] += len(events)
        assert [event.index for event in events] in ([], [answer])

    @precondition(lambda self: self.ledger.open)
    @rule(moment=st.sampled_from(["launch", "start", "middle", "end"]))
    def break_a_step(self, moment):
        self.runner.break_at = moment
        before = self.runner.counts["raises"]
        self.step(1)
        self.runner.break_at = None
        moves["raise"] += self.runner.counts["raises"] - before

    @precondition(lambda self: self.engine.has_work)
    @rule(moment=st.sampled_from(["launch", "start", "middle", "end"]))
    def interrupt_a_step(self, moment):
        """Ctrl-C: nobody ends, and everybody still gets the right tokens."""
        self.runner.break_at, self.runner.break_with = moment, KeyboardInterrupt
        before = self.ledger.open
        try:
            self.step(1)
        except KeyboardInterrupt:
            moves["interrupt"] += 1
            assert self.ledger.open == before
        self.runner.break_at, self.runner.break_with = None, Breakdown

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks)
    def spoil_a_row(self, index):
        self.runner.spoiled = {self.a_request(index)}
        before = self.runner.counts["row errors"]
        self.step(1)
        self.runner.spoiled = set()
        moves["row error"] += self.runner.counts["row errors"] - before

    @precondition(lambda self: self.scheduler.handed_off)
    @rule()
    def kv_has_travelled(self):
        """Those that were handed on leave: what comes after their first token is another worker's affair."""
        for request_id, group in list(self.scheduler.handed_off.items()):
            request = self.ledger.requests[request_id]
            for sequence in self.scheduler.first_tokens(request_id) if request.beam is None else ():
                first = expected_answer(request, sequence.index, self.scheduler.max_len)[0][:1]
                assert sequence.output_token_ids == first
            self.ledger.ends.update({(request_id, index): FinishReason.ABORT for index in group.open_answers})
            self.scheduler.release_handed_off(request_id)
            moves["handed on"] += 1

    @precondition(lambda self: len(self.ledger.open) > 3)
    @rule()
    def let_all_end(self):
        self.drain()

    def drain(self):
        """The eldest that runs gets on in every step, and starts over only when an elder one comes in."""
        work = [work_of(self.ledger.requests[request_id], self.scheduler.max_len) for request_id in self.ledger.open]
        self.kv_has_travelled()
        steps = 0
        while self.engine.has_work:
            assert steps <= 2 * sum(work), f"not done after {steps} steps: {self.scheduler.waiting} {self.scheduler.running}"
            self.step(1)
            self.kv_has_travelled()
            steps += 1
        moves["drained"] += 1
        moves["drained steps"] += steps
        moves["worst drain, percent of the work"] = max(
            moves["worst drain, percent of the work"], 100 * steps // max(1, sum(work)))
        assert self.ledger.open == []
        assert_engine_is_empty(self.engine)
        assert not self.oracle or not self.oracle.known

    # ------------------------------------------------------------------------------------------- invariants

    @invariant()
    def the_books_balance(self):
        self.scheduler.manager.check()
        served = {entry.group.request_id for entry in (*self.scheduler.waiting, *self.scheduler.running)}
        assert set(self.ledger.open) == served | set(self.scheduler.handed_off)
        if not self.ledger.open:
            assert_nothing_left(self.scheduler.manager)

    @invariant()
    def both_lines_are_sorted_by_age_and_know_their_blocks(self):
        for line in (self.scheduler.waiting, self.scheduler.running):
            assert line == sorted(line)
        for entry in self.scheduler.waiting:
            assert all(sequence.phase is Phase.WAITING and not self.scheduler.manager.has_table(sequence)
                       for sequence in entry.group.live)
        for entry in self.scheduler.running:
            assert self.scheduler.manager.has_table(entry.group.live[0])

    @invariant()
    def no_fork_outlives_its_step(self):
        assert self.scheduler._forks == {}

    @invariant()
    def every_token_is_known_between_steps(self):
        assert all(token >= 0 for sequence in self.seen for token in sequence.token_ids)

    @invariant()
    def seats_are_enough(self):
        assert self.scheduler.num_seats_taken <= self.scheduler.config.max_num_seqs

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.drain()
        self.every_token_is_known_between_steps()
        self.ledger.assert_every_answer_ended_once()
        self.ledger.assert_tokens_are_right()
        assert all(error == "spoiled" or error.startswith("Breakdown") for error in self.ledger.errors.values()), self.ledger.errors
        moves["preempted"] += self.runner.counts["preemptions"]
        moves["copies"] += self.runner.counts["copies"]
        moves["drafts accepted"] += self.scheduler.drafts.accepted
        moves["drafts rejected"] += self.scheduler.drafts.proposed - self.scheduler.drafts.accepted
        moves["planned ahead"] += self.runner.counts["ahead"]
        moves["prefill and decode in one step"] += self.runner.counts["shared steps"]
        moves["prefix hits"] += self.scheduler.manager.counters.hits


EVERY_MOVE = {"n=1", "n=2", "n=3", "beams", "step", "preempted", "cancel", "cancel one", "raise", "interrupt", "row error", "copies",
              "prefill and decode in one step", "prefix hits", "refused for ever", "handed on", "planned ahead",
              "drafts accepted", "drafts rejected"}


def run_machine(examples, **options):
    """Returns how often each thing happened, over `examples` runs of 40 moves."""
    moves.clear()
    run_state_machine_as_test(
        EngineMachine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None, database=None, **options))
    return Counter(moves)


def test_any_order_of_requests_and_faults_keeps_every_promise():
    made = run_machine(150, derandomize=True)
    assert made["step"] + made["drained steps"] >= 500
    assert EVERY_MOVE <= set(+made), f"never happened: {EVERY_MOVE - set(+made)}"


@pytest.mark.nightly
def test_ten_thousand_steps_keep_every_promise():
    made = run_machine(1200, print_blob=True)
    assert made["step"] + made["drained steps"] >= 10_000
    assert EVERY_MOVE <= set(+made), f"never happened: {EVERY_MOVE - set(+made)}"
