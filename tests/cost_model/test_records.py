"""What is read from steps whose times are known."""

from __future__ import annotations

import pytest

from nanopd.core import RowRecord, StepRecord
from nanopd.cost_model.measurements import DecodeRow, MixedRow, PrefillRow
from nanopd.cost_model.records import decode_rows, gap_between, mixed_rows, prefill_rows, typical


def step(start, duration, *rows, **options):
    """`rows`: (request id, new tokens, cached tokens)."""
    records = tuple(RowRecord(name, 0, "prefill" if new > 1 else "decode", new, cached) for name, new, cached in rows)
    return StepRecord(0, start, records, options.pop("preempted", ()), 0, 0, options.pop("num_copies", 0), duration, **options)


def chain(*durations, gap=0.25, rows=None):
    """Steps one after the other; `rows(i)`: what the i-th holds."""
    steps, start = [], 10.0
    for number, duration in enumerate(durations):
        steps.append(step(start, duration, *(rows(number) if rows else [("a", 1, 7 + number)])))
        start += duration + gap
    return steps


def test_the_first_of_several_is_for_warming_up():
    assert typical([9.0, 1.0, 3.0]) == 2.0
    assert typical([9.0]) == 9.0


def test_a_gap_is_what_passes_between_like_steps():
    assert gap_between(chain(1, 2, 1, 3)) == pytest.approx(0.25)
    others = [step(0, 1, ("a", 1, 5)), step(9, 1, ("a", 1, 6), ("b", 1, 3)), step(20, 1, ("a", 4, 7))]
    assert gap_between(others) == 0  # a request came, and a prompt: nobody knows what was waited for
    assert gap_between([]) == 0
    assert gap_between(chain(1, 1, 1, gap=-0.5)) == 0  # a late look at the end of a step


def test_one_slow_step_between_does_not_move_the_gap():
    steps = chain(1, 1, 1, 1, 1)
    late = [*steps, step(100, 1, ("a", 1, 30))]
    assert gap_between(late) == pytest.approx(0.25)


def test_decode_rows_have_the_mean_of_the_contexts_and_the_gap():
    steps = chain(5, 1, 2, 3, rows=lambda i: [("a", 1, 10 + i), ("b", 1, 20 + i)])
    # contexts with the new token: 11 + 21, then two more in each step
    assert decode_rows(steps, 0.5) == [DecodeRow(2.5, decodes=2, context_tokens=35)]


def test_batches_of_several_sizes_give_a_row_each():
    steps = chain(1, 1, rows=lambda i: [("a", 1, 10)]) + chain(2, 2, rows=lambda i: [("a", 1, 10), ("b", 1, 10)])
    assert decode_rows(steps, 0) == [DecodeRow(1, 1, 11), DecodeRow(2, 2, 22)]


def test_prefill_rows_are_of_lone_prompts():
    steps = [step(0, 4, ("a", 64, 0)), step(5, 3, ("b", 64, 0)), step(9, 3.5, ("c", 64, 0)), step(20, 6, ("d", 30, 64)),
             step(30, 1, ("d", 1, 94)), step(40, 9, ("e", 64, 0), ("f", 64, 0)), step(50, 9, ("g", 8, 0), ("d", 1, 95))]
    assert prefill_rows(steps, 0.5) == [PrefillRow(3.75, 64, 0), PrefillRow(6.5, 30, 64)]


def test_mixed_rows_are_of_one_prompt_beside_decodes():
    steps = [step(0, 4, ("a", 1, 10), ("b", 1, 20), ("p", 32, 0)), step(5, 3, ("a", 1, 12), ("b", 1, 22), ("q", 32, 0)),
             step(9, 3, ("a", 1, 13), ("p", 8, 0), ("q", 8, 0)), step(12, 1, ("a", 1, 14))]
    assert mixed_rows(steps, 0.5) == [MixedRow(3.5, 32, 0, decodes=2, context_tokens=34)]


@pytest.mark.parametrize("besides", [{"num_drafts": 2}, {"num_copies": 1}, {"preempted": ("z",)}])
def test_steps_that_did_something_besides_do_not_count(besides):
    assert decode_rows([step(0, 1, ("a", 1, 5), **besides)], 0) == []


def test_of_a_long_prompt_s_chunks_some_are_kept_for_all():
    steps = chain(*[1] * 20, rows=lambda i: [("a", 512, 512 * i)])
    assert [row.cached_tokens // 512 for row in prefill_rows(steps, 0)] == [0, 1, 2, 3, 4, 7, 8, 15, 16]
