"""The engine with a runner that launches: which steps are planned before the one before them has ended, and which not."""

from __future__ import annotations

import pytest
from scheduler.fakes import Ledger, assert_engine_is_empty, assert_plans_were_sound, drain, make_engine

from nanopd.core import BeamSearchParams, FinishReason, Request, SamplingParams


class Bench:
    def __init__(self, **options):
        self.engine = make_engine(**{"caching": False, "ahead": True, **options})
        self.scheduler, self.runner, self.manager = self.engine.scheduler, self.engine.runner, self.engine.scheduler.manager
        self.ledger = Ledger(self.scheduler.max_len)

    def add(self, length=5, *, name=None, start=1, beam=None, handoff=False, **params):
        options = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, **params}
        prompt = [(start + i * i) % 11 + 1 for i in range(length)]
        request = Request(name or "abcdef"[len(self.ledger.requests)], prompt, SamplingParams(**options), beam=beam)
        self.engine.add(request, handoff=handoff)
        self.ledger.add(request)
        return request

    def step(self):
        events = self.ledger.take(self.engine.step())
        assert_plans_were_sound(self.runner)
        self.manager.check()
        return events

    def finish(self):
        drain(self.engine, self.ledger, 300)
        self.ledger.assert_every_answer_ended_once()
        self.ledger.assert_tokens_are_right()
        assert_engine_is_empty(self.engine)

    @property
    def num_ahead(self):
        """Plans that the runner was given before their predecessor's result was known."""
        return sum(plan.run_ahead for plan in self.runner.plans)


def test_a_decode_runs_on_a_token_that_is_not_known_yet():
    bench = Bench()
    bench.add()
    bench.step()
    prompt, decode = bench.runner.plans
    assert prompt.run_ahead and decode.rows[0].num_cached == 5
    assert bench.runner.counts["ahead"] == 1
    bench.finish()
    assert len(bench.runner.plans) == 8  # nothing runs after the last token, which max_tokens told beforehand
    assert bench.runner.counts["ahead"] == 7


def test_an_end_that_nobody_foresaw_costs_one_row_and_no_pause():
    plain = Bench(ahead=False)
    plain.add(max_tokens=20)
    plain.finish()
    stop = plain.ledger.tokens["a", 0][3]
    assert stop not in plain.ledger.tokens["a", 0][:3]
    bench = Bench()
    bench.add(max_tokens=20, stop_token_ids=(stop,))
    bench.add(max_tokens=20, start=3)
    bench.finish()
    rows = [len(plan.rows) for plan in bench.runner.plans]
    assert rows == [2] * 5 + [1] * 15
    assert bench.num_ahead == 20  # every step was planned on top of another, the first apart


def test_a_cancel_between_steps_leaves_no_trace_of_the_row_that_runs():
    bench = Bench()
    bench.add()
    bench.add(start=4)
    for _ in range(3):
        bench.step()
    bench.ledger.take(bench.engine.cancel("a"))
    bench.manager.check()
    bench.finish()
    assert bench.ledger.ends["a", 0] is FinishReason.ABORT


def test_when_all_are_cancelled_nothing_is_left_to_do():
    bench = Bench()
    bench.add()
    bench.step()
    bench.ledger.take(bench.engine.cancel("a"))
    bench.step()
    assert_engine_is_empty(bench.engine)
    assert bench.step() == []


def test_a_newcomer_of_the_same_name_is_another_request():
    """The old one's answer ends while its next row runs; what becomes of that row is nothing to the new one."""
    for fault in ("start", "middle", "end", "spoiled"):
        bench = Bench()
        bench.add(name="x", max_tokens=20)
        bench.add(name="y", max_tokens=20, start=3)
        for _ in range(3):
            bench.step()
        bench.ledger.take(bench.engine.cancel("x"))
        bench.ledger.tokens["x", 0].clear()
        del bench.ledger.ends["x", 0]
        bench.add(name="x", start=5)
        if fault == "spoiled":
            bench.runner.spoiled = {"x"}
        else:
            bench.runner.break_at = fault
        bench.step()  # the row of the old x and y's
        assert list(bench.ledger.errors) == ([] if fault == "spoiled" else ["y"])
        bench.finish()
        assert bench.ledger.ends["x", 0] is FinishReason.LENGTH


def test_a_refused_launch_fails_those_it_would_have_served_and_nothing_is_built_on_it():
    bench = Bench(max_num_seqs=2, budget=8)
    for start in range(3):
        bench.add(3, start=start)
    bench.step()
    bench.runner.break_at = "launch"
    bench.step()  # its own step is fine; the one that was to follow is not
    assert bench.ledger.errors == {}
    bench.step()
    assert bench.ledger.errors == dict.fromkeys("ab", "Breakdown: the runner broke at the launch")
    bench.finish()
    assert bench.ledger.ends["c", 0] is FinishReason.LENGTH


@pytest.mark.parametrize("moment", ["launch", "start", "middle", "end"])
def test_an_interrupt_takes_back_both_steps(moment):
    bench = Bench(budget=9)
    bench.add(13, n=2, temperature=1, max_tokens=20)
    bench.add(3, max_tokens=20)
    for num_steps in (0, 1, 4):
        for _ in range(num_steps):
            bench.step()
        bench.runner.break_at, bench.runner.break_with = moment, KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            for _ in range(3):  # not every step launches another
                bench.step()
        bench.manager.check()
        assert all(token >= 0 for name in "ab" for sequence in bench.scheduler.find(name).live for token in sequence.token_ids)
    bench.finish()
    assert bench.ledger.errors == {}


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"beam": BeamSearchParams(2, 8)}], ids=["penalty", "beams"])
def test_what_depends_on_the_token_waits_for_it(options):
    bench = Bench()
    bench.add(**options)
    bench.add(start=4)
    bench.step()
    bench.step()
    assert bench.num_ahead == 0
    bench.finish()


def test_answers_fork_when_their_first_tokens_are_known_and_run_ahead_from_there():
    bench = Bench()
    bench.add(n=3, temperature=1)
    bench.step()
    assert bench.num_ahead == 0 and len(bench.runner.plans) == 1
    bench.step()
    assert bench.num_ahead == 1
    bench.finish()


def test_a_prompt_that_is_handed_on_ends_its_stay_with_its_first_token():
    bench = Bench()
    bench.add(handoff=True)
    bench.step()
    assert bench.num_ahead == 0 and list(bench.scheduler.handed_off) == ["a"]
    bench.scheduler.release_handed_off("a")
    assert_engine_is_empty(bench.engine)


def test_nobody_is_preempted_before_it_is_known_who_ends():
    bench = Bench(num_blocks=6)
    bench.add(7, max_tokens=3)
    bench.add(7, max_tokens=9, start=3)
    bench.add(7, max_tokens=9, start=5)
    bench.finish()
    assert 0 < bench.num_ahead < len(bench.runner.plans)
