"""Any order of requests, cancels, faults and losses through both pipelines, on fake models with tiny pools.

Once with all workers in turn, once with messages and workers that dawdle, and die. After every step the books of every
worker balance and every row reads its own context, wherever that was computed. At the end every answer has ended exactly
once, with the very tokens of an undisturbed model or an error that says why not, and nothing is left anywhere: no block,
lease, transfer or load. What was lost has been sent nothing more.
"""

import random
import re
from collections import Counter

import pytest
from cost_model.models import MODEL
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
from workers.fake_cluster import REASON, ErraticRouter, FakeCluster

from nanopd.config import ConfigError
from nanopd.core import BeamSearchParams, InvalidRequest, Request, SamplingParams
from nanopd.router.cost_router import CostRouter
from nanopd.router.explain import explain
from nanopd.router.length_predictor import BayesianLengthPredictor

moves = Counter()  # how often each thing happened: the tests below ask that enough of it did
picks = st.integers(0, 10**6)
MODES = {"P:cpu D:cpu": "disaggregated", "P:cpu P:cpu D:cpu D:cpu": "disaggregated", "D:cpu P:cpu": "disaggregated",
         "C:cpu C:cpu": "collocated", "C:cpu P:cpu D:cpu C:cpu D:cpu P:cpu": "disaggregated",
         "C:cpu C:cpu P:cpu D:cpu": "collocated", "D:cpu C:cpu P:cpu": "adaptive",
         "C:cpu P:cpu D:cpu D:cpu P:cpu C:cpu": "adaptive"}
ERRORS = re.compile(
    r"the router ErraticRouter (failed: IndexError: out of luck|answered (Decision|Route|7)|sent it to .*(X0|role|open))|"
    rf"Breakdown: the runner broke|spoiled$|timed out after \d+ s|"
    rf"no (prefill|decode|collocated) worker is left: .\d was lost \({REASON}\)|"
    rf"gave up after 4 attempts: ((.\d was lost \({REASON}\)|the transfer from .\d to .\d failed \((the link broke|it is gone)\)|"
    r"what arrived at .\d was not what was sent \(checksum\))(; |$)){4}")


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


def make_router(name, luck):
    return CostRouter(MODEL, BayesianLengthPredictor()) if name == "cost" else ErraticRouter(luck, 0.1 * (name == "wrong"))


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
        router=st.sampled_from(["cost", "erratic", "wrong"]),  # of an adaptive cluster
        transfers=st.sampled_from([(0, 0, 0), (0.5, 0.1, 0.1), (0.1, 0.4, 0.4)]),  # how often late, broken, corrupted
    )
    def set_up(self, topology, late, seed, tokens, block_size, caching, watermark, seats, chunk, router, transfers):
        luck = self.luck = random.Random(seed)
        faults, odds = ["late", "broken", "corrupted", None], [*transfers, 1 - sum(transfers)]
        blocks = [-(-number // block_size) for number in tokens]
        self.cluster = FakeCluster(
            topology, MODES[topology], is_late=None if late is None else lambda: luck.random() < late,
            luck=lambda: luck.choices(faults, odds)[0], router=make_router(router, luck) if MODES[topology] == "adaptive" else None,
            by_role={"D": dict(num_blocks=blocks[1], max_num_seqs=seats[1])}, num_blocks=blocks[0], max_num_seqs=seats[0],
            block_size=block_size, caching=caching, watermark=watermark, budget=8, chunk=chunk, max_model_len=20)
        self.ledger = self.cluster.ledger

    @rule(request=requests(), times=st.sampled_from([1, 1, 3]), timeout=st.sampled_from([None, None, 3]),
          mode=st.sampled_from([None, None, "collocated", "disaggregated", "adaptive"]))
    def submit(self, request, times, timeout, mode):
        prompt, sampling, beam = request
        now = self.cluster.clock()
        for _ in range(times):
            request = Request(str(len(self.ledger.requests)), prompt, sampling, beam=beam, arrival_time=now,
                              deadline=timeout and now + timeout)
            try:
                self.cluster.submit(request, mode)
            except InvalidRequest:
                moves["refused for ever"] += 1
                return
            moves["beams" if beam else f"n={sampling.n}"] += 1
            moves["in the other mode"] += mode not in (None, self.cluster.central.mode)
            moves["routed"] += (mode or self.cluster.central.mode) == "adaptive"

    @rule(times=st.sampled_from([1, 1, 2, 5]))
    def step(self, times):
        moves["step"] += times
        self.cluster.step(times)

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks)
    def cancel(self, index):
        request_id = self.ledger.open[index % len(self.ledger.open)]
        if self.is_known(request_id):
            moves[f"cancel while {self.cluster.central._entries[request_id].stage.value}"] += 1
        assert self.cluster.cancel(request_id) and request_id not in self.ledger.open
        assert self.cluster.cancel(request_id) == []

    @precondition(lambda self: self.ledger.open)
    @rule(index=picks)
    def cancel_one_answer(self, index):
        """One that has begun, if any has."""
        open_answers = [answer for answer in self.ledger.tokens if answer not in self.ledger.ends]
        begun = [answer for answer in open_answers if self.ledger.tokens[answer]] or open_answers
        events = self.cluster.cancel(*begun[index % len(begun)])
        moves["cancel one"] += len(events)

    @precondition(lambda self: self.ledger.open and self.cluster.living)
    @rule(index=picks, moment=st.sampled_from(["start", "middle", "end"]))
    def break_a_worker(self, index, moment):
        runner = self.a_worker(index).engine.runner
        runner.break_at = moment
        before = runner.counts["raises"]
        self.cluster.step()
        runner.break_at = None
        moves["raise"] += runner.counts["raises"] - before

    @precondition(lambda self: self.ledger.open and self.cluster.living)
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

    @precondition(lambda self: self.ledger.open and self.cluster.living)
    @rule(index=picks)
    def spoil_rows(self, index):
        """Whatever a request draws next, wherever it is, comes back with an error."""
        request_id = self.ledger.open[index % len(self.ledger.open)]
        if not self.is_known(request_id):
            return
        runners = [worker.engine.runner for worker in self.cluster.living.values()]
        for runner in runners:
            runner.spoiled = {self.cluster.central._entries[request_id].job}
        before = sum(runner.counts["row errors"] for runner in runners)
        self.cluster.step(2)
        for runner in runners:
            runner.spoiled = set()
        moves["row error"] += sum(runner.counts["row errors"] for runner in runners) - before

    def is_known(self, request_id):
        """False where its end came in a step that was interrupted, and has not been told."""
        return request_id in self.cluster.central._entries

    def a_worker(self, index):
        """One that lives and has something to do, if any has."""
        workers = list(self.cluster.living.values())
        workers = [worker for worker in workers if worker.engine.has_work] or workers
        return workers[index % len(workers)]

    def teardown(self):
        if not hasattr(self, "cluster"):
            return
        moves["steps to settle"] += self.cluster.settle(max_steps=100 + 200 * len(self.ledger.requests))
        self.cluster.assert_empty()
        for worker_id, worker in self.cluster.living.items():
            state = self.cluster.central.fleet.workers[worker_id]
            assert (state.role, state.next_role) == (worker.role, None)
            moves["has another role"] += worker.role != worker_id[0]
            moves[f"preempted on {worker.role}"] += worker.engine.scheduler.num_preemptions
        self.count_ends()

    def count_ends(self):
        for link in self.cluster.links.values():
            moves.update({f"transfer {what}": number for what, number in link.happened.items()})
        for error in self.ledger.errors.values():
            assert ERRORS.match(error), error
            moves[error[:8]] += 1
        failed = {request_id for (request_id, _), reason in self.ledger.ends.items() if reason == "error"}
        assert failed == set(self.ledger.errors)
        timelines = self.cluster.central.timelines
        ended_well = self.ledger.requests.keys() - failed
        moves["retried and ended well"] += sum(len(timelines[request_id].jobs) > 1 for request_id in ended_well)
        timelines = timelines.values()
        moves["refused for now"] += sum(timeline.num_refusals for timeline in timelines)
        moves["explained"] += sum(bool(str(explain(timeline))) for timeline in timelines if timeline.decision)
        moves["through P and D"] += sum(len(timeline.path) == 2 for timeline in timelines)


class LosingMachine(PipelineMachine):
    """As time passes, workers change their roles and die."""

    @precondition(lambda self: hasattr(self.cluster.executor, "lose") and self.cluster.living)
    @rule(index=picks, num_said=st.integers(0, 3))
    def lose_a_worker(self, index, num_said):
        self.lose(self.a_worker(index), num_said)

    @precondition(lambda self: hasattr(self.cluster.executor, "lose") and self.ledger.open)
    @rule(num_said=st.integers(0, 3), at_its_end=st.booleans())
    def lose_one_end_of_a_transfer(self, num_said, at_its_end):
        """As soon as there is one, or not at all."""
        for _ in range(10):
            for worker_id, state in self.cluster.central.fleet.workers.items():
                for where in state.writes.values():
                    worker = self.cluster.living.get(where.worker_id if at_its_end else worker_id)
                    if worker is not None and self.lose(worker, num_said):
                        moves["lost while it is written to" if at_its_end else "lost while it writes"] += 1
                    return
            self.cluster.step()

    def lose(self, worker, num_said):
        """The last of a role is mostly spared: with it goes all that could show what is left behind."""
        others = [other for other in self.cluster.living.values() if other is not worker and other.role == worker.role]
        if self.luck.random() < (0.6 if others else 0.1):
            moves[f"lost {worker.role}"] += 1
            self.cluster.lose(worker.worker_id, num_said)
        return worker.worker_id not in self.cluster.living

    @precondition(lambda self: self.cluster.living)
    @rule(index=picks, role=st.sampled_from("CPD"))
    def switch_role(self, index, role):
        if self.luck.random() < 0.7:
            return
        worker_id = list(self.cluster.living)[index % len(self.cluster.living)]
        try:
            self.cluster.central.set_role(worker_id, role)
            moves["role switch"] += 1
        except ConfigError:
            moves["role switch refused"] += 1

    @rule(seconds=st.integers(1, 2))
    def pass_time(self, seconds):
        self.cluster.clock.now += seconds


EVERY_MOVE = {"n=1", "n=2", "n=3", "beams", "cancel while queued", "cancel while prefill", "cancel while decode", "cancel one",
              "raise", "interrupt", "row error", "refused for now", "through P and D", "preempted on D", "in the other mode",
              "retried and ended well", "gave up ", "routed", "explained", "the rout",
              "transfer late", "transfer broken", "transfer corrupted"}
EVERY_LOSS = {"lost C", "lost P", "lost D", "retried and ended well",
              "timed ou", "role switch", "role switch refused", "has another role",
              "through P and D", "cancel while decode", "routed", "explained"}


def run_machine(machine, examples, **options):
    """Returns how often each thing happened, over `examples` runs of 40 moves."""
    moves.clear()
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None, database=None, **options))
    return +moves


@pytest.mark.parametrize(("machine", "examples", "expected"),
                         [(PipelineMachine, 220, EVERY_MOVE), (LosingMachine, 180, EVERY_LOSS)])
def test_any_order_of_requests_and_faults_leaves_nothing_behind(machine, examples, expected):
    made = run_machine(machine, examples, derandomize=True)
    assert expected <= set(made), f"never happened: {expected - set(made)}"


@pytest.mark.nightly
@pytest.mark.parametrize(("machine", "expected"), [
    (PipelineMachine, EVERY_MOVE | {"cancel while reserving", "preempted on C"}),
    (LosingMachine, EVERY_MOVE | EVERY_LOSS | {
        "no decod", "no prefi", "no collo", "lost while it writes", "lost while it is written to"})])
def test_any_order_of_requests_and_faults_leaves_nothing_behind_for_long(machine, expected):
    made = run_machine(machine, 1000, print_blob=True)
    assert made["step"] + made["steps to settle"] >= 10_000
    assert expected <= set(made), f"never happened: {expected - set(made)}"
