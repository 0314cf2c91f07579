"""Drafts in the scheduler: what they may take, what becomes of right and wrong ones, and that the books balance."""

from __future__ import annotations

import pytest
from scheduler.fakes import Ledger, Oracle, assert_engine_is_empty, assert_plans_were_sound, make_engine

from nanopd.core import BeamSearchParams, FinishReason, Request, SamplingParams


class Bench:
    """An engine whose drafts come from an oracle that errs with every `wrong`-th token."""

    def __init__(self, *, drafts=4, wrong=10**9, **options):
        self.engine = make_engine(**{"budget": 64, "caching": False, **options})
        self.scheduler, self.runner, self.manager = self.engine.scheduler, self.engine.runner, self.engine.scheduler.manager
        self.ledger = Ledger(self.scheduler.max_len)
        self.oracle = Oracle(self.ledger, drafts, wrong)
        self.scheduler.proposer = self.oracle

    def add(self, length, *, start=1, beam=None, **params):
        options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}
        prompt = [(start + i * i) % 11 + 1 for i in range(length)]
        request = Request("abcdef"[len(self.ledger.requests)], prompt, SamplingParams(**options), beam=beam)
        self.engine.add(request)
        self.ledger.add(request)
        return request

    def step(self):
        """The step's rows as (request, new tokens, drafts, drafts accepted)."""
        num_plans = len(self.runner.plans)
        self.ledger.take(self.engine.step())
        assert_plans_were_sound(self.runner)
        self.manager.check()
        return [(row.request.request_id, row.num_new, row.num_drafts, row.num_accepted)
                for plan in self.runner.plans[num_plans:] for row in plan.rows]

    def finish(self):
        for _ in range(300):
            if not self.engine.has_work:
                break
            self.step()
        self.ledger.assert_every_answer_ended_once()
        self.ledger.assert_tokens_are_right()
        assert_engine_is_empty(self.engine)
        assert not self.oracle.known


def test_right_drafts_come_with_the_token_after_them():
    bench = Bench()
    bench.add(6, max_tokens=12)
    assert [bench.step() for _ in range(4)] == [[("a", 6, 0, 0)], [("a", 5, 4, 4)], [("a", 5, 4, 4)], [("a", 1, 0, 0)]]
    bench.finish()
    assert (bench.scheduler.drafts.proposed, bench.scheduler.drafts.accepted, bench.scheduler.drafts.acceptance) == (8, 8, 1.0)


def test_a_wrong_draft_ends_what_is_accepted():
    bench = Bench(wrong=4)  # tokens 8, 12, ... of the sequence are guessed wrong
    bench.add(6)
    bench.step()
    assert bench.step() == [("a", 5, 4, 1)]  # token 7 was right, 8 was not, and came out right all the same
    assert len(bench.ledger.tokens["a", 0]) == 3
    bench.finish()


@pytest.mark.parametrize("wrong", [1, 2, 3, 5])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("caching", [False, True])
def test_answers_are_what_they_are_without_drafts(wrong, block_size, caching):
    bench = Bench(wrong=wrong, block_size=block_size, num_blocks=160 // block_size, caching=caching)
    bench.add(6, max_tokens=20)
    bench.add(9, n=3, temperature=1, max_tokens=9, start=3)
    bench.add(7, ignore_eos=False, stop_token_ids=(3,), min_tokens=2, start=5)
    bench.finish()
    assert bench.scheduler.drafts.proposed > 0
    assert (bench.scheduler.drafts.accepted > 0) == (wrong > 1)


def test_a_stop_token_among_the_drafts_ends_the_answer_there():
    plain = Bench(drafts=0)
    plain.add(6)
    plain.finish()
    third = plain.ledger.tokens["a", 0][2]
    bench = Bench(drafts=6)
    bench.add(6, stop_token_ids=(third,))
    bench.finish()
    assert bench.ledger.tokens["a", 0] == plain.ledger.tokens["a", 0][: plain.ledger.tokens["a", 0].index(third) + 1]
    assert bench.ledger.ends["a", 0] is FinishReason.STOP


def test_no_draft_goes_past_the_last_token_an_answer_may_have():
    bench = Bench(drafts=9)
    bench.add(6, max_tokens=4)  # one from the prompt; then two drafts and the token after them
    bench.add(6, max_tokens=2, start=2)
    bench.step()
    assert bench.step() == [("b", 1, 0, 0), ("a", 3, 2, 2)]  # rows of one token come first
    bench.finish()
    bench = Bench(drafts=9, max_model_len=9)
    bench.add(6, max_tokens=None)
    bench.step()
    assert bench.step() == [("a", 2, 1, 1)]
    bench.finish()


def test_drafts_take_what_is_left_of_the_budget():
    bench = Bench(budget=7, max_num_seqs=3)
    for start in range(2):
        bench.add(3, start=start)
    bench.step()
    assert bench.step() == [("a", 5, 4, 4), ("b", 2, 1, 1)]
    bench.add(4, start=4)
    assert bench.step() == [("b", 1, 0, 0), ("a", 2, 1, 1), ("c", 4, 0, 0)]
    bench.finish()


def test_nobody_is_preempted_for_a_draft():
    for num_blocks in range(5, 12):
        bench = Bench(num_blocks=num_blocks, max_model_len=12)
        bench.add(7, max_tokens=5)  # 3 blocks without drafts: at most one more while it drafts
        bench.add(7, max_tokens=5, start=3)
        bench.finish()
        assert bench.scheduler.num_preemptions == (num_blocks < 6)


def test_drafts_live_in_blocks_of_their_own():
    bench = Bench(drafts=3)
    bench.add(6)
    bench.step()
    plan = bench.scheduler.schedule()
    (row,) = plan.rows
    sequence = bench.scheduler.find("a").live[0]
    own, forked = bench.manager.block_table(sequence), bench.manager.block_table(row.sequence)
    assert own[0] == forked[0] and plan.copies == [(own[1], forked[1])]  # the second block was half full
    assert len(own) == 2 and len(forked) == 3 and not set(own) & set(forked[1:])
    assert bench.manager.ref_count(own[0]) == 1  # read, not held
    bench.manager.check()
    result = bench.runner.execute(plan)
    bench.scheduler.commit(plan, result)
    assert bench.manager.block_table(sequence) == forked and bench.manager.ref_count(own[1]) == 0
    bench.engine.cancel("a")
    assert_engine_is_empty(bench.engine)


def test_what_wrong_drafts_took_is_free_again():
    bench = Bench(drafts=9, wrong=1)
    bench.add(6)
    bench.step()
    before = bench.manager.num_free_blocks
    bench.step()
    (sequence,) = bench.scheduler.find("a").live
    assert len(bench.manager.block_table(sequence)) == bench.manager.blocks_needed(sequence.num_computed) == 2
    assert bench.manager.num_free_blocks == before
    bench.finish()


def test_right_drafts_are_found_in_the_prefix_cache_at_once():
    bench = Bench(drafts=9, caching=True)
    bench.add(6, max_tokens=30)
    for _ in range(2):
        bench.step()
    (sequence,) = bench.scheduler.find("a").live
    assert sequence.num_computed == 16 and len(bench.manager.cached_prefix(sequence.token_ids)) == 4
    bench.finish()


def test_wrong_drafts_are_never_found_in_the_prefix_cache():
    bench = Bench(drafts=9, wrong=1, caching=True)
    request = bench.add(6, max_tokens=16)
    bench.finish()
    tokens = request.prompt_token_ids + bench.ledger.tokens["a", 0]
    assert len(bench.manager.cached_prefix(tokens)) == (len(tokens) - 1) // 4
    assert sum(bench.manager.snapshot()["cached"]) == (len(tokens) - 1) // 4


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"logprobs": 2}, {"beam": BeamSearchParams(2, 6)}])
def test_some_requests_are_not_drafted_for(options):
    bench = Bench()
    bench.add(6, **options)
    bench.finish()
    assert bench.scheduler.drafts.proposed == 0


@pytest.mark.parametrize("moment", ["start", "middle", "end"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_with_drafts_that_breaks_leaves_nothing_behind(moment, ahead):
    bench = Bench(ahead=ahead)
    bench.add(6, max_tokens=40)
    bench.add(5, n=2, temperature=1, max_tokens=40)
    bench.step()
    bench.runner.break_at, bench.runner.break_with = moment, KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        bench.step()
    bench.manager.check()
    for _ in range(3):
        bench.step()
    bench.runner.break_at, bench.runner.break_with = moment, RuntimeError
    bench.step()
    assert set(bench.ledger.errors) == {"a", "b"}
    assert_engine_is_empty(bench.engine)


def test_a_row_with_an_error_fails_its_request_alone():
    bench = Bench()
    bench.add(6)
    bench.add(5)
    bench.step()
    bench.runner.spoiled = {"a"}
    bench.step()
    assert bench.ledger.errors == {"a": "spoiled"}
    bench.finish()


def test_steps_that_may_draft_are_not_planned_ahead():
    bench = Bench(ahead=True)
    bench.add(6)
    bench.add(5, repetition_penalty=1.5)
    bench.finish()
    assert bench.runner.counts["ahead"] == 0 and bench.scheduler.drafts.accepted > 0


def test_the_history_counts_drafts():
    bench = Bench(wrong=4)
    bench.add(6)
    bench.finish()
    records = bench.engine.history
    assert sum(record.num_drafts for record in records) == bench.scheduler.drafts.proposed > 0
    assert sum(record.num_accepted for record in records) == bench.scheduler.drafts.accepted > 0
    assert {row.kind for record in list(records)[1:] for row in record.rows} == {"decode"}
