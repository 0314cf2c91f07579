"""What the scheduler decides, case by case: who runs, how much, who is let in, who has to go. Block size 4 throughout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler.fakes import (
    Ledger,
    assert_engine_is_empty,
    assert_plans_were_sound,
    drain,
    expected_answer,
    key_of,
    make_engine,
)

from nanopd.core import (
    BeamSearchParams,
    FinishReason,
    InvalidRequest,
    Phase,
    Request,
    SamplingParams,
    Sequence,
    SequenceGroup,
)


def greedy(max_tokens=8, **options):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def several(n, max_tokens=8, **options):
    return SamplingParams(n=n, temperature=1, max_tokens=max_tokens, ignore_eos=True, **options)


class Bench:
    """An engine with a client that keeps the books. Requests are named a, b, c, ... in their order."""

    def __init__(self, **options):
        self.engine = make_engine(**{"caching": False, **options})
        self.scheduler, self.runner = self.engine.scheduler, self.engine.runner
        self.manager = self.scheduler.manager
        self.ledger = Ledger(self.scheduler.max_len)

    def add(self, length, params=None, *, start=1, handoff=False):
        name = "abcdefghij"[len(self.ledger.requests)]
        beam = params if isinstance(params, BeamSearchParams) else None
        prompt = [(start + i * i) % 11 + 1 for i in range(length)]
        request = Request(name, prompt, greedy() if params is None or beam else params, beam=beam)
        self.engine.add(request, handoff=handoff)
        self.ledger.add(request)
        return request

    def step(self):
        """The step's rows as (request, new tokens, tokens before them)."""
        num_plans = len(self.runner.plans)
        self.ledger.take(self.engine.step())
        assert_plans_were_sound(self.runner)
        self.manager.check()
        return [(row.request.request_id, row.num_new, row.num_cached)
                for plan in self.runner.plans[num_plans:] for row in plan.rows]

    def step_until(self, condition):
        for _ in range(200):
            if condition():
                return
            self.step()
        raise AssertionError("it did not come to that")

    def finish(self):
        drain(self.engine, self.ledger, 500)
        self.ledger.assert_every_answer_ended_once()
        self.ledger.assert_tokens_are_right()
        assert_engine_is_empty(self.engine)

    def group(self, name):
        return self.scheduler.find(name)

    @property
    def running(self):
        return [entry.group.request_id for entry in self.scheduler.running]

    @property
    def waiting(self):
        return [entry.group.request_id for entry in self.scheduler.waiting]


# ------------------------------------------------------------------------------------------- a step's budget


def test_decodes_go_first_then_begun_prompts_then_new_ones():
    bench = Bench(budget=10, max_num_seqs=4)
    bench.add(3)
    bench.add(14)
    assert bench.step() == [("a", 3, 0), ("b", 7, 0)]
    bench.add(9)
    assert bench.step() == [("a", 1, 3), ("b", 7, 7), ("c", 2, 0)]
    assert bench.step() == [("a", 1, 4), ("b", 1, 14), ("c", 7, 2)]
    bench.finish()


def test_a_decode_goes_before_the_chunk_of_an_elder():
    bench = Bench(budget=6, max_num_seqs=4, chunk=5)
    bench.add(12)
    bench.add(1)
    assert bench.step() == [("a", 5, 0), ("b", 1, 0)]
    assert bench.step() == [("b", 1, 1), ("a", 5, 5)]
    bench.finish()


def test_several_prompts_share_a_step():
    bench = Bench(budget=32)
    for length in (5, 7, 9, 15):
        bench.add(length)
    assert bench.step() == [("a", 5, 0), ("b", 7, 0), ("c", 9, 0), ("d", 11, 0)]
    assert bench.step() == [("a", 1, 5), ("b", 1, 7), ("c", 1, 9), ("d", 4, 11)]
    bench.finish()


def test_a_chunk_is_never_longer_than_its_setting():
    bench = Bench(budget=32, chunk=4)
    bench.add(10)
    bench.add(3)
    assert [bench.step() for _ in range(3)] == [
        [("a", 4, 0), ("b", 3, 0)], [("b", 1, 3), ("a", 4, 4)], [("b", 1, 4), ("a", 2, 8)]]
    bench.finish()


def test_only_the_last_chunk_draws():
    bench = Bench(budget=8, max_num_seqs=4)
    bench.add(20, several(3))
    for _ in range(3):
        bench.step()
    assert [plan.rows[0].num_samples for plan in bench.runner.plans] == [0, 0, 3]
    assert [sequence.index for sequence in bench.group("a").live] == [0, 1, 2]
    bench.finish()


def test_chunks_go_through_whatever_the_sizes():
    for chunk in (1, 2, 3, 7, 50):
        bench = Bench(budget=16, chunk=chunk, caching=True)
        for number in range(3):
            bench.add(17, several(2), start=number % 2)
        bench.finish()


# --------------------------------------------------------------------------------------------- coming in


def test_admission_needs_blocks_for_the_whole_prompt():
    bench = Bench(num_blocks=8, budget=64)
    bench.add(17)  # 5 blocks
    bench.add(13)  # 4: one too many
    assert bench.step() == [("a", 17, 0)]
    assert (bench.running, bench.waiting) == (["a"], ["b"])
    bench.finish()


def test_the_watermark_is_left_free_for_those_that_run():
    bench = Bench(num_blocks=10, watermark=0.3, budget=64)
    bench.add(16)  # 4 of 10
    bench.add(16)  # would leave 2, less than 3
    bench.step()
    assert bench.waiting == ["b"]
    bench.finish()


def test_the_watermark_does_not_count_when_nobody_runs():
    bench = Bench(num_blocks=10, watermark=0.3, budget=64, max_model_len=40)
    bench.add(38)
    assert bench.step() == [("a", 38, 0)]
    bench.finish()


def test_first_come_first_served_the_head_holds_back_who_would_fit():
    bench = Bench(num_blocks=8, budget=64)
    bench.add(17)
    bench.add(13)
    bench.add(2)
    bench.step()
    assert bench.waiting == ["b", "c"]
    bench.step_until(lambda: "b" in bench.running)
    assert bench.waiting == [] or bench.waiting == ["c"]
    bench.finish()


def test_seats_count_all_answers_from_the_start():
    bench = Bench(max_num_seqs=4, budget=64)
    bench.add(5, several(3))
    bench.add(5, several(2))
    bench.add(5)
    bench.step()
    assert bench.running == ["a"] and bench.scheduler.num_seats_taken == 3
    bench.finish()


def test_seats_of_answers_that_have_ended_are_free():
    bench = Bench(max_num_seqs=3, budget=64)
    bench.add(5, several(3))
    bench.step()
    bench.add(5)
    bench.engine.cancel("a", 1)
    bench.ledger.ends["a", 1] = FinishReason.ABORT
    bench.step()
    assert bench.running == ["a", "b"] and bench.scheduler.num_seats_taken == 3
    bench.finish()


def test_seats_that_are_promised_are_given_to_nobody_who_waits():
    bench = Bench(max_num_seqs=4, budget=64)
    bench.scheduler.num_seats_promised = 2
    for _ in range(3):
        bench.add(5)
    bench.step()
    assert bench.running == ["a", "b"] and bench.scheduler.num_seats_taken == 2
    assert bench.scheduler.num_seats_wanted == 2 + 2 + 1
    bench.scheduler.num_seats_promised = 0
    bench.step()
    assert bench.running == ["a", "b", "c"] and bench.scheduler.num_seats_wanted == 3
    bench.finish()


def test_who_is_first_in_line_and_lacks_blocks_is_told_from_who_lacks_a_seat():
    bench = Bench(max_num_seqs=1, num_blocks=6, budget=64)
    assert not bench.scheduler.lacks_blocks
    bench.add(5)
    bench.step()
    bench.add(5)
    assert not bench.scheduler.lacks_blocks  # it waits for the seat
    bench.finish()
    bench.add(18)
    bench.scheduler.config = replace(bench.scheduler.config, max_num_seqs=4)
    bench.step()
    bench.add(9)
    assert bench.scheduler.lacks_blocks
    bench.finish()


def test_a_prefix_hit_costs_only_what_is_new():
    bench = Bench(caching=True, budget=64)
    bench.add(13, greedy(2))
    bench.finish()
    bench.add(13, greedy(2))
    assert bench.step() == [("b", 1, 12)]
    bench.finish()


# ------------------------------------------------------------------------------------------------ preemption


def test_the_youngest_goes_first():
    bench = Bench(num_blocks=6, budget=64)
    for _ in range(3):
        bench.add(7, greedy(10))  # 2 blocks each, full after one more token
    bench.step()
    bench.step()
    assert bench.step() == [("a", 1, 8), ("b", 1, 8)]  # c's two blocks are enough for both
    assert (bench.running, bench.waiting) == (["a", "b"], ["c"])
    assert bench.runner.plans[-1].preempted == ["c"]
    bench.finish()


def test_who_finds_no_block_and_is_youngest_goes_itself():
    bench = Bench(num_blocks=5, budget=64)
    bench.add(11, greedy(4))  # 3 blocks: no more until 12 tokens
    bench.add(8, greedy(4))
    bench.step()
    assert bench.step() == [("a", 1, 11)]
    assert bench.waiting == ["b"]
    bench.finish()


def test_nobody_is_let_in_during_a_step_that_preempts():
    bench = Bench(num_blocks=5, budget=64)
    bench.add(11, greedy(4))
    bench.add(8, greedy(4))
    bench.step()
    bench.add(1)
    bench.step()
    assert bench.waiting == ["b", "c"]
    bench.finish()


def test_an_elders_chunk_takes_back_a_youngers_place_in_the_step():
    """b's decode is planned first, then a's second answer, being recomputed, needs b's blocks: b must not run."""
    bench = Bench(num_blocks=7, budget=12, chunk=8)
    bench.add(9, several(2, 8))
    bench.step_until(lambda: bench.group("a").live[0].num_output == 5)
    bench.scheduler.withdraw(bench.scheduler.schedule())
    bench.add(4, greedy(8), start=5)
    assert bench.step() == [("a", 8, 0), ("b", 4, 0)]
    assert bench.step() == [("b", 1, 4), ("a", 1, 8)]
    assert bench.step() == [("a", 5, 9), ("a", 5, 9)]
    assert (bench.running, bench.waiting) == (["a"], ["b"])
    bench.finish()


def test_the_preempted_come_back_before_those_who_came_later():
    bench = Bench(num_blocks=6, budget=64)
    for _ in range(3):
        bench.add(7, greedy(10))
    bench.step_until(lambda: bench.scheduler.num_preemptions)
    bench.add(1, greedy(3))
    assert bench.waiting == ["c", "d"]
    order = []
    bench.step_until(lambda: order.extend(name for name in bench.running if name not in order) or "d" in order)
    assert order.index("c") < order.index("d")
    bench.finish()


def test_a_preempted_request_keeps_its_tokens_and_gets_no_second_first_token():
    bench = Bench(num_blocks=6, budget=64)
    for number in range(3):
        bench.add(7, greedy(10), start=number)
    bench.finish()
    assert bench.scheduler.num_preemptions > 0
    assert [len(tokens) for tokens in bench.ledger.tokens.values()] == [10, 10, 10]


def test_answers_that_were_preempted_recompute_their_prompt_once():
    bench = Bench(budget=64, max_model_len=60)
    bench.add(18, several(3))
    for _ in range(4):
        bench.step()
    bench.scheduler.withdraw(bench.scheduler.schedule())
    assert bench.waiting == ["a"] and bench.manager.num_used_blocks == 0
    assert {sequence.phase for sequence in bench.group("a").live} == {Phase.WAITING}
    # The leader reads the prompt, the others only what each has written itself: 4 tokens, one of them not yet run.
    assert bench.step() == [("a", 18, 0)]
    assert bench.step() == [("a", 4, 18)] * 3
    tables = [bench.manager.block_table(sequence) for sequence in bench.group("a").live]
    assert tables[0][:4] == tables[1][:4] == tables[2][:4]
    assert len({table[4] for table in tables}) == 3  # the prompt's last block was half full
    bench.finish()


def test_a_recomputed_prompt_comes_from_the_prefix_cache_where_it_can():
    bench = Bench(budget=64, caching=True)
    bench.add(17, several(3))
    for _ in range(3):
        bench.step()
    bench.scheduler.withdraw(bench.scheduler.schedule())
    rows = bench.step()
    assert rows[0] == ("a", 1, 16)
    bench.finish()


def test_the_leader_of_a_recomputation_may_be_cancelled():
    bench = Bench(budget=8, max_num_seqs=4)
    bench.add(18, several(3))
    bench.step_until(lambda: len(bench.group("a").live) == 3)
    bench.scheduler.withdraw(bench.scheduler.schedule())
    bench.step()  # 8 of the prompt's 18 tokens
    assert [bench.manager.has_table(sequence) for sequence in bench.group("a").live] == [True, False, False]
    bench.ledger.take(bench.engine.cancel("a", 0))
    assert bench.waiting == ["a"] and bench.manager.num_used_blocks == 0
    bench.finish()


def test_beams_that_were_preempted_find_the_same_answers():
    bench = Bench(num_blocks=14, budget=32)
    bench.add(16, greedy(20))
    bench.add(22, BeamSearchParams(3, 9, ignore_eos=True), start=4)
    bench.finish()
    assert bench.scheduler.num_preemptions > 0


def test_beams_withdrawn_at_any_step_find_the_same_answers():
    for moment in range(1, 9):
        bench = Bench(budget=9, chunk=3)
        bench.add(7, BeamSearchParams(3, 6), start=4)
        for _ in range(moment):
            bench.step()
        bench.scheduler.withdraw(bench.scheduler.schedule())
        bench.step()
        bench.scheduler.withdraw(bench.scheduler.schedule())
        bench.finish()


# ------------------------------------------------------------------------------------------------- cancelling


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode", "preempted", "recomputing"])
@pytest.mark.parametrize("params", [greedy(), several(3), BeamSearchParams(2, 8, ignore_eos=True)], ids=["n=1", "n=3", "beams"])
def test_cancel_in_any_phase_frees_everything(phase, params):
    bench = Bench(budget=6, max_num_seqs=5)
    bench.add(15, params)
    if phase == "prefill":
        bench.step()
    if phase in ("decode", "preempted", "recomputing"):
        for _ in range(4):
            bench.step()
        assert all(sequence.phase is Phase.DECODE for sequence in bench.group("a").live)
    if phase in ("preempted", "recomputing"):
        bench.scheduler.withdraw(bench.scheduler.schedule())
    if phase == "recomputing":
        bench.step()
        assert bench.group("a").live[0].phase is Phase.PREFILL
    events = bench.ledger.take(bench.engine.cancel("a"))
    assert [(event.index, event.finish_reason) for event in events] == [
        (index, FinishReason.ABORT) for index in range(bench.ledger.requests["a"].num_answers)]
    assert_engine_is_empty(bench.engine)
    assert bench.engine.cancel("a") == [] and bench.engine.step() == []


def test_one_answer_that_has_begun_can_be_cancelled():
    bench = Bench()
    bench.add(5, several(3))
    assert bench.engine.cancel("a", 1) == []  # not begun: the answers are still one sequence
    bench.step()
    before = bench.manager.num_used_blocks
    bench.step()
    assert [event.index for event in bench.ledger.take(bench.engine.cancel("a", 1))] == [1]
    assert bench.manager.num_used_blocks < before + 3 and bench.engine.cancel("a", 1) == []
    bench.finish()
    assert bench.ledger.ends == {("a", 0): FinishReason.LENGTH, ("a", 1): FinishReason.ABORT, ("a", 2): FinishReason.LENGTH}


def test_one_beam_can_not():
    bench = Bench()
    bench.add(5, BeamSearchParams(2, 4))
    for _ in range(2):
        assert bench.engine.cancel("a", 0) == []
        bench.step()
    bench.finish()


def test_an_error_ends_all_answers_that_were_open_and_says_why():
    bench = Bench()
    bench.add(5, several(2))
    bench.step()
    events = bench.ledger.take(bench.engine.fail("a", "it broke"))
    assert [(event.index, event.finish_reason, event.error) for event in events] == [
        (index, FinishReason.ERROR, "it broke") for index in range(2)]
    assert_engine_is_empty(bench.engine)


def test_a_step_that_raises_fails_those_it_served_and_no_others():
    bench = Bench(max_num_seqs=2, budget=8)
    for _ in range(3):
        bench.add(3)
    bench.step()
    bench.runner.break_at = "middle"
    bench.step()
    assert bench.ledger.errors == dict.fromkeys("ab", "Breakdown: the runner broke at the middle")
    bench.finish()
    assert bench.ledger.ends["c", 0] is FinishReason.LENGTH


def test_a_row_with_an_error_fails_its_request_and_no_others():
    bench = Bench()
    for number in range(3):
        bench.add(3, several(2), start=number)
    bench.step()
    bench.runner.spoiled = {"b"}
    bench.step()
    assert bench.ledger.errors == {"b": "spoiled"}
    bench.finish()
    assert bench.ledger.ends["b", 0] is bench.ledger.ends["b", 1] is FinishReason.ERROR


def test_an_interrupt_fails_nobody():
    bench = Bench(budget=9)
    bench.add(13, several(2))
    bench.add(3)
    for moment in ("start", "middle", "end"):
        bench.step()
        bench.runner.break_at, bench.runner.break_with = moment, KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            bench.step()
    bench.finish()
    assert bench.ledger.errors == {}


# ---------------------------------------------------------------------------------- handing over and adopting


def test_a_handoff_ends_its_stay_with_its_first_token():
    bench = Bench()
    request = bench.add(6, several(3), handoff=True)
    bench.step()
    assert list(bench.scheduler.handed_off) == ["a"] and not bench.engine.has_work
    assert [sequence.phase for sequence in bench.group("a").live] == [Phase.TRANSFER] * 3
    assert bench.manager.num_used_blocks == 2  # held until the KV has travelled
    firsts = [(sequence.index, sequence.output_token_ids) for sequence in bench.scheduler.first_tokens("a")]
    assert firsts == [(index, expected_answer(request, index, 64)[0][:1]) for index in range(3)]
    bench.scheduler.release_handed_off("a")
    assert_engine_is_empty(bench.engine)


def test_a_handoff_can_be_cancelled_while_its_kv_travels():
    bench = Bench()
    bench.add(6, handoff=True)
    bench.step()
    bench.ledger.take(bench.engine.cancel("a"))
    assert_engine_is_empty(bench.engine)


def adopted(bench, length, n, firsts):
    """A request whose prompt comes from elsewhere, written into the lease's blocks. `firsts`: the answers that go on."""
    params = several(n) if n > 1 else greedy()
    request = Request("x", [i % 11 + 1 for i in range(length)], params)
    lease = bench.manager.grant_lease(request.prompt_token_ids)
    for position in range(length):
        slot = lease.block_ids[position // 4], position % 4
        bench.runner.cache.layers[0][slot] = key_of(request.prompt_token_ids[: position + 1], 0)
    bench.ledger.add(request)
    tokens = {index: expected_answer(request, index, 64)[0][0] for index in range(n)}
    group = SequenceGroup.resume(request, [(index, [tokens[index]], [-1.0]) for index in firsts])
    bench.scheduler.adopt(group, lease)
    bench.manager.release_lease(lease, "writer")
    for index in range(n):
        bench.ledger.tokens["x", index].append(tokens[index])
    return request


@pytest.mark.parametrize("length", [3, 8, 9])
def test_several_answers_are_adopted_with_one_lease(length):
    bench = Bench(budget=8)
    adopted(bench, length, 3, [0, 1, 2])
    assert bench.manager.num_used_blocks == -(-length // 4) and bench.manager.leases == []
    assert bench.step() == [("x", 1, length)] * 3
    bench.finish()


def test_those_that_ended_with_their_first_token_are_not_adopted():
    bench = Bench()
    adopted(bench, 9, 3, [1])
    bench.ledger.ends |= {("x", 0): FinishReason.ABORT, ("x", 2): FinishReason.ABORT}
    assert bench.scheduler.num_seats_taken == 1
    assert bench.step() == [("x", 1, 9)]
    bench.finish()


def test_what_was_adopted_is_younger_than_what_runs_and_is_preempted_first():
    bench = Bench(num_blocks=6)
    bench.add(7, greedy(12))
    bench.step()
    adopted(bench, 9, 1, [0])
    bench.step_until(lambda: bench.scheduler.num_preemptions)
    assert (bench.running, bench.waiting) == (["a"], ["x"])
    bench.finish()


# ------------------------------------------------------------------------------------------------- the phases


LEGAL = {
    Phase.WAITING: {Phase.PREFILL, Phase.DECODE, Phase.FINISHED},
    Phase.PREFILL: {Phase.DECODE, Phase.TRANSFER, Phase.WAITING, Phase.FINISHED},
    Phase.DECODE: {Phase.WAITING, Phase.FINISHED},
    Phase.TRANSFER: {Phase.FINISHED},
    Phase.FINISHED: set(),
}


@pytest.mark.parametrize("start", list(Phase))
@pytest.mark.parametrize("end", list(Phase))
def test_only_legal_transitions_are_made(start, end):
    sequence = Sequence([1])
    sequence.phase = start
    if end is start or end in LEGAL[start]:
        sequence.move_to(end)
        assert sequence.phase is end
    else:
        with pytest.raises(RuntimeError, match=f"can't go from {start.value} to {end.value}"):
            sequence.move_to(end)
        assert sequence.phase is start


# -------------------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize(("length", "params", "message"), [
    (0, greedy(), "the prompt is empty"),
    (30, greedy(), "the context holds 30, one of which is for the answer"),
    (24, greedy(), "6 blocks of 4 = 24 tokens"),
    (3, several(5), "a batch holds 4 sequences"),
    (3, BeamSearchParams(5, 2), "a batch holds 4 sequences"),
    (9, several(4, 12), "may need 14 blocks; the KV cache has 6"),
])
def test_what_can_never_be_served_is_refused(length, params, message):
    bench = Bench(num_blocks=6, max_num_seqs=4, max_model_len=30)
    with pytest.raises(InvalidRequest, match=message):
        bench.add(length, params)
    assert_engine_is_empty(bench.engine)


@pytest.mark.parametrize(("length", "params"), [(23, greedy(20)), (8, several(4, 5)), (9, several(2, 8)), (8, several(4, 1)),
                                                (4, BeamSearchParams(2, 9, ignore_eos=True))])
def test_what_just_fits_is_served_alone(length, params):
    bench = Bench(num_blocks=6, max_num_seqs=4, max_model_len=30)
    bench.add(length, params)
    bench.finish()
    assert bench.scheduler.num_preemptions == 0


def test_an_answer_ends_where_the_context_does():
    bench = Bench(max_model_len=12)
    bench.add(7, greedy(100))
    bench.add(7, several(2, None))
    bench.finish()
    assert [len(tokens) for tokens in bench.ledger.tokens.values()] == [5, 5, 5]
    assert set(bench.ledger.ends.values()) == {FinishReason.LENGTH}


def test_a_request_is_served_once_at_a_time():
    bench = Bench()
    request = bench.add(3)
    with pytest.raises(ValueError, match="'a' is being served already"):
        bench.engine.add(request)
    bench.finish()
    bench.engine.add(request)
    bench.engine.cancel("a")


def test_a_stop_token_counts_only_after_min_tokens():
    bench = Bench()
    plain = bench.add(5, greedy(6))
    bench.finish()
    first, third = bench.ledger.tokens["a", 0][0], bench.ledger.tokens["a", 0][2]
    for min_tokens in (0, 3):
        stops = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=(first, third), min_tokens=min_tokens)
        request = Request(f"min {min_tokens}", plain.prompt_token_ids, stops)
        bench.engine.add(request)
        bench.ledger.add(request)
        bench.finish()
    assert len(bench.ledger.tokens["min 0", 0]) == 1 and bench.ledger.ends["min 0", 0] is FinishReason.STOP
    assert len(bench.ledger.tokens["min 3", 0]) > 3


def test_the_history_tells_each_step_as_it_was():
    bench = Bench(budget=10, max_num_seqs=4)
    bench.add(3, greedy(3))
    bench.add(14, greedy(2))
    bench.finish()
    records = list(bench.engine.history)
    assert [[(row.request_id, row.kind, row.num_new, row.num_cached) for row in record.rows] for record in records] == [
        [("a", "prefill", 3, 0), ("b", "prefill", 7, 0)],
        [("a", "decode", 1, 3), ("b", "prefill", 7, 7)],
        [("a", "decode", 1, 4), ("b", "decode", 1, 14)],
    ]
    assert [record.step for record in records] == [0, 1, 2]
