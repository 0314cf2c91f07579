"""Any order of requests, cancels and faults through both pipelines, on fake models with tiny pools.

Once with all workers in turn, once with messages and workers that dawdle. After every step the books of every worker
balance and every row reads its own context, wherever that was computed. At the end every answer has ended exactly
once, with the very tokens of an undisturbed model, and nothing is left anywhere: no block, lease, transfer or load.
"""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduler.fakes import VOCAB, Breakdown
from workers.fake_cluster import FakeCluster

from nanopd.core import BeamSearchParams, InvalidRequest, Request, SamplingParams

moves = Counter()  # how often each thing happened: the tests below ask that enough of it did
picks = st.integers(0, 10**6)
MODES = {"P:cpu D:cpu": "disaggregated", "P:cpu P:cpu D:cpu D:cpu": "disaggregated", "D:cpu P:cpu": "disaggregated",
         "C:cpu C:cpu": "collocated"}


@st.composite
def requests(draw):
    """(prompt, sampling, beam): prompts often begin alike."""
    prompt = [1, 2, 1, 1, 2, 2, 1, 2][: draw(st.integers(0, 8))] + draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5))
    max_tokens = draw(st.sampled_from([1, 2, 6, 10]))
    if draw(st.integers(0, 4)) == 0:
        return prompt, SamplingParams(), BeamSearchParams(2, max_tokens, ignore_eos=draw(st.booleans()))
    n = draw(st.sampled_from([1, 1, 2, 3]))
    stops = draw(st.sampled_from([(), (), (3, 4, 5)]))
    return prompt, SamplingParams(n=n, temperature=1, max_tokens=max_tokens, stop_token_ids=stops, ignore_eos=draw(st.booleans())), None


class PipelineMachine(RuleBasedStateMachine):
    @initialize(
        topology=st.sampled_from(sorted(MODES)),
        late=st.sampled_from([None, 0.3, 0.7]),
        seed=st.integers(0, 1000),
        tokens=st.tuples(st.integers(20, 60), st.integers(20, 40)),  # that the pools of P and D hold
        block_size=st.integers(1, 4),
        caching=st.booleans(),
        watermark=st.sampled_from([0.0, 0.1]),
        seats=st.tuples(st.integers(3, 5), st.integers(3, 5)),
        chunk=st.sampled_from([None, 2, 5]),
    )
    def set_up(self, topology, late, seed, tokens, block_size, caching, watermark, seats, chunk):
        luck = random.Random(seed)
        blocks = [-(-number // block_size) for number in tokens]
        self.cluster = FakeCluster(
            topology, MODES[topology], is_late=None if late is None else lambda: luck.random() < late,
            by_role={"D": dict(num_blocks=blocks[1], max_num_seqs=seats[1])}, num_blocks=blocks[0], max_num_seqs=seats[0],
            block_size=block_size, caching=caching, watermark=watermark, budget=8, chunk=chunk, max_model_len=20)
        self.ledger = self.cluster.ledger

    @rule(request=requests(), times=st.sampled_from([1, 1, 3]))
    def submit(self, request, times):
        prompt, sampling, beam = request
        for _ in range(times):
            request = Request(str(len(self.ledger.requests)), prompt, sampling, beam=beam)
            try:
                self.cluster.submit(request)
            except InvalidRequest:
                moves["refused for ever"] += 1
                return
            moves["beams" if beam else f"n={sampling.n}"] += 1

    @rule(times=st.sampled_from([1, 1, 2, 5]))
    def step(self, times):
        moves["step"] += times
        self.cluster.step(times)

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks)
    def cancel(self, index):
        request_id = self.ledger.open[index % len(self.ledger.open)]
        moves[f"cancel while {self.cluster.central._entries[request_id].stage.value}"] += 1
        assert self.cluster.cancel(request_id) and request_id not in self.ledger.open
        assert self.cluster.cancel(request_id) == []

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks, answer=st.integers(0, 2))
    def cancel_one_answer(self, index, answer):
        events = self.cluster.cancel(self.ledger.open[index % len(self.ledger.open)], answer)
        moves["cancel one"] += len(events)

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks, moment=st.sampled_from(["start", "middle", "end"]))
    def break_a_worker(self, index, moment):
        runner = self.a_worker(index).engine.runner
        runner.break_at = moment
        before = runner.counts["raises"]
        self.cluster.step()
        runner.break_at = None
        moves["raise"] += runner.counts["raises"] - before

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks, moment=st.sampled_from(["start", "middle", "end"]))
    def interrupt_a_worker(self, index, moment):
        """Ctrl-C: nobody ends, and no message is lost."""
        runner = self.a_worker(index).engine.runner
        runner.break_at, runner.break_with = moment, KeyboardInterrupt
        before = self.ledger.open
        try:
            self.cluster.step()
        except KeyboardInterrupt:
            moves["interrupt"] += 1
            assert self.ledger.open == before
        finally:
            runner.break_at, runner.break_with = None, Breakdown

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks)
    def spoil_rows(self, index):
        """Whatever a request draws next, wherever it is, comes back with an error."""
        runners = [worker.engine.runner for worker in self.cluster.workers.values()]
        for runner in runners:
            runner.spoiled = {self.ledger.open[index % len(self.ledger.open)]}
        before = sum(runner.counts["row errors"] for runner in runners)
        self.cluster.step(2)
        for runner in runners:
            runner.spoiled = set()
        moves["row error"] += sum(runner.counts["row errors"] for runner in runners) - before

    def a_worker(self, index):
        """One that has something to do, if any has."""
        workers = list(self.cluster.workers.values())
        workers = [worker for worker in workers if worker.engine.has_work] or workers
        return workers[index % len(workers)]

    def teardown(self):
        if not hasattr(self, "cluster"):
            return
        moves["steps to settle"] += self.cluster.settle(max_steps=100 + 200 * len(self.ledger.requests))
        self.cluster.assert_empty()
        for worker in self.cluster.workers.values():
            moves[f"preempted on {worker.role}"] += worker.engine.scheduler.num_preemptions
        timelines = self.cluster.central.timelines.values()
        moves["refused for now"] += sum(timeline.num_refusals for timeline in timelines)
        moves["through P and D"] += sum(len(timeline.path) == 2 for timeline in timelines)


EVERY_MOVE = {"n=1", "n=2", "n=3", "beams", "cancel while queued", "cancel while prefill", "cancel while decode", "cancel one",
              "raise", "interrupt", "row error", "refused for now", "through P and D", "preempted on D"}


def run_machine(examples, **options):
    """Returns how often each thing happened, over `examples` runs of 40 moves."""
    moves.clear()
    run_state_machine_as_test(
        PipelineMachine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None, database=None, **options))
    return +moves


def test_any_order_of_requests_and_faults_leaves_nothing_behind():
    made = run_machine(100, derandomize=True)
    assert EVERY_MOVE <= set(made), f"never happened: {EVERY_MOVE - set(made)}"


@pytest.mark.nightly
def test_any_order_of_requests_and_faults_leaves_nothing_behind_for_long():
    made = run_machine(1000, print_blob=True)
    assert made["step"] + made["steps to settle"] >= 10_000
    assert EVERY_MOVE | {"cancel while reserving", "preempted on C"} <= set(made), f"never happened: {EVERY_MOVE - set(made)}"
