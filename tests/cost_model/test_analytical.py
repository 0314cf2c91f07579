from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from cost_model.models import DECODE, MIXED, MODEL, PEER, PREFILL, RELAY
from hypothesis import assume, given
from hypothesis import strategies as st

from nanopd.cost_model.analytical import (
    CostModel,
    DecodeCost,
    MixedCost,
    PrefillCost,
    Shape,
    StepWork,
    attended_pairs,
    chunks,
)
from nanopd.cost_model.checks import CostModelError

rates = st.floats(1e-12, 1e-3)
sharpness = st.floats(1, 8)
cost_models = st.builds(
    CostModel, st.builds(PrefillCost, rates, rates, rates, sharpness), st.builds(DecodeCost, rates, rates, rates, sharpness),
    st.builds(MixedCost, rates, rates, rates, rates, rates, sharpness), st.just((PEER,)), st.just(Shape(4, 1024)))
rows = st.builds(lambda new, cached: SimpleNamespace(num_new=new, num_cached=cached),
                 st.integers(1, 4096), st.integers(0, 32_768))
works = st.lists(rows, max_size=6).map(StepWork.of)
SLACK = 1 + 1e-9  # of powers and roots


# ------------------------------------------------------------------------------------------------ a step


def kind(work):
    return bool(work.prompt_tokens), bool(work.decodes)


@given(cost_models, works, works)
def test_more_work_takes_no_less_time(model, work, more):
    """But for decodes that come to lone prompts."""
    assume(kind(work) != (True, False) or not more.decodes)
    assert model.step_seconds(work + more) * SLACK >= model.step_seconds(work)


@given(cost_models, works, works)
def test_where_a_pass_takes_what_it_takes_alone_more_work_never_takes_less_time(model, work, more):
    model = replace(model, mixed=MixedCost.on_top(model.prefill, model.mixed.sequence_seconds, model.mixed.context_token_seconds))
    assert model.step_seconds(work + more) * SLACK >= model.step_seconds(work)


def test_beside_a_decode_a_short_prompt_does_not_wait_for_its_launch():
    chunk, decode = StepWork.chunk(32), StepWork(decodes=1, context_tokens=100)
    assert MODEL.step_seconds(decode) < MODEL.step_seconds(decode + chunk) < MODEL.step_seconds(chunk)


@given(cost_models, works, works)
def test_sharing_a_pass_is_never_dearer_than_two_steps_of_its_kind(model, work, more):
    assume(kind(work) == kind(more))
    assert model.step_seconds(work + more) <= (model.step_seconds(work) + model.step_seconds(more)) * SLACK


@given(cost_models, st.integers(1, 512), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64))
def test_monotone_in_batch_and_context(model, batch, context, more_sequences, more_context):
    work = StepWork(decodes=batch, context_tokens=batch * context)
    for more in (work._replace(decodes=batch + more_sequences), work._replace(context_tokens=batch * (context + more_context))):
        assert model.step_seconds(more) * SLACK >= model.step_seconds(work)


@given(cost_models, st.integers(1, 8192), st.integers(0, 8192), st.integers(1, 512))
def test_monotone_in_tokens_and_prefix(model, new, cached, more):
    seconds = model.step_seconds(StepWork.chunk(new, cached))
    assert model.step_seconds(StepWork.chunk(new + more, cached)) * SLACK >= seconds
    assert model.step_seconds(StepWork.chunk(new, cached + more)) * SLACK >= seconds


def test_a_step_of_nothing_takes_no_time():
    assert MODEL.step_seconds(StepWork.of([])) == 0


def test_work_is_read_off_rows():
    rows = [SimpleNamespace(num_new=512, num_cached=1024), SimpleNamespace(num_new=1, num_cached=99),
            SimpleNamespace(num_new=1, num_cached=49)]
    assert StepWork.of(rows) == StepWork(512, attended_pairs(512, 1024), decodes=2, context_tokens=150)


@given(st.integers(1, 300), st.integers(0, 300))
def test_pairs_are_what_causal_attention_looks_at(new, cached):
    assert attended_pairs(new, cached) == sum(cached + i + 1 for i in range(new))


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 700))
def test_chunks_make_up_the_prompt(new, cached, size):
    parts = chunks(new, cached, size)
    assert sum(count for count, _, _ in parts) == -(-new // size)
    assert sum(count * tokens for count, tokens, _ in parts) == new
    assert sum(count * pairs for count, _, pairs in parts) == pytest.approx(attended_pairs(new, cached))
    assert all(0 < tokens <= size for _, tokens, _ in parts)


def test_with_sharpness_one_the_floor_adds_and_with_much_the_larger_counts():
    added, larger = (replace(DECODE, sharpness=sharpness, context_token_seconds=0) for sharpness in (1, 64))
    assert added.seconds(100, 0) == pytest.approx(4.8e-3 + 2.5e-3)
    assert larger.seconds(100, 0) == pytest.approx(4.8e-3)
    assert larger.seconds(400, 0) == pytest.approx(10e-3)


def test_far_from_the_knee_the_terms_stand_alone():
    assert DECODE.seconds(1, 100_000) == pytest.approx(4.8e-3 + 3.8e-3, rel=1e-6)
    assert PREFILL.seconds(8000, attended_pairs(8000)) == pytest.approx(8000 * 24e-6 + 8000 * 8001 / 2 * 4e-10, rel=1e-3)


def test_a_mixed_step_does_not_pay_for_its_prefill_twice():
    decodes, chunk = StepWork(decodes=32, context_tokens=32 * 1024), StepWork.chunk(512)
    mixed = MODEL.step_seconds(decodes + chunk)
    assert MODEL.step_seconds(chunk) < mixed < MODEL.step_seconds(decodes) + MODEL.step_seconds(chunk)
    # What it has beside the pass is what decodes add; the pass holds all tokens once.
    in_pass = replace(PREFILL, floor_seconds=7e-3, token_seconds=23e-6, pair_seconds=1e-9, sharpness=3.0)
    assert mixed == pytest.approx(in_pass.seconds(544, attended_pairs(512)) + 32 * 2e-6 + 32 * 1024 * 40e-9)


def test_a_prompt_never_speeds_decodes_up():
    odd = replace(MODEL, mixed=MixedCost.on_top(replace(PREFILL, floor_seconds=1e-6), 0, 0))
    decodes = StepWork(decodes=8, context_tokens=80_000)
    assert odd.step_seconds(decodes + StepWork.chunk(2)) == odd.step_seconds(decodes)


# ------------------------------------------------------------------------------------- a request among others


@given(st.integers(1, 16_000), st.integers(0, 8000), st.sampled_from([64, 512, 2048]), st.sampled_from([0, 32]))
def test_prefill_in_chunks_is_the_sum_of_its_steps(new, cached, size, decodes):
    """Within what taking the full chunks for equal costs."""
    running = StepWork(decodes=decodes, context_tokens=1000 * decodes)
    steps = [MODEL.step_seconds(running + StepWork.chunk(min(size, new - done), cached + done)) for done in range(0, new, size)]
    assert MODEL.request(new, cached, 0, running, size).prefill_seconds == pytest.approx(sum(steps), rel=0.01)


def test_decoding_is_the_sum_of_its_steps():
    running = StepWork(decodes=10, context_tokens=9000)
    steps = [MODEL.step_seconds(running + StepWork(decodes=1, context_tokens=700 + i)) for i in range(1, 129)]
    assert MODEL.request(500, 200, 128, running).decode_seconds == pytest.approx(sum(steps))


def test_delay_is_what_each_of_the_others_loses():
    running = StepWork(decodes=64, context_tokens=64 * 1000)
    pure = MODEL.step_seconds(running)
    cost = MODEL.request(2000, 48, 100, running, chunk_tokens=500)
    assert cost.delay_by_prefill_seconds == pytest.approx(cost.prefill_seconds - 4 * pure)
    assert cost.delay_by_decode_seconds == pytest.approx(cost.decode_seconds - 100 * pure)


def test_a_prompt_that_is_computed_elsewhere_delays_by_its_decodes_alone():
    running = StepWork(decodes=64, context_tokens=64 * 1000)
    here, elsewhere = MODEL.request(2000, 48, 100, running), MODEL.request(0, 2048, 100, running)
    assert elsewhere == (0, here.decode_seconds, 0, here.delay_by_decode_seconds)


def test_where_nobody_decodes_nobody_waits():
    cost = MODEL.request(2000, 0, 100)
    assert cost.prefill_seconds == MODEL.step_seconds(StepWork.chunk(2000))
    assert cost.delay_by_prefill_seconds == cost.delay_by_decode_seconds == 0


@given(cost_models, works, st.integers(1, 5000), st.integers(0, 500), st.integers(64, 2048))
def test_a_delay_is_never_negative(model, running, new, output, chunk):
    cost = model.request(new, 0, output, running, chunk)
    assert cost.delay_by_prefill_seconds >= -1e-9 * cost.prefill_seconds
    assert cost.delay_by_decode_seconds >= -1e-9 * cost.decode_seconds


# ---------------------------------------------------------------------------------------------- transfers


def simulated_pipeline(num_bytes, computing, pieces, link):
    """When the last piece arrives after the last was computed, one by one."""
    free = 0.0
    for piece in range(1, pieces + 1):
        free = max(free, computing * piece / pieces) + num_bytes / pieces / link.bytes_per_second
    return free - computing + link.latency_seconds


@given(st.floats(1, 1e9), st.floats(0, 1), st.integers(1, 200))
def test_what_overlaps_with_computing_is_not_waited_for(num_bytes, computing, pieces):
    exposed = RELAY.exposed_seconds(num_bytes, computing, pieces)
    assert exposed == pytest.approx(simulated_pipeline(num_bytes, computing, pieces, RELAY), rel=1e-6, abs=1e-9)
    # No sooner than a send of the last piece, no later than one after which the whole floor passes.
    assert RELAY.seconds(num_bytes / pieces) <= exposed * SLACK
    assert exposed <= (RELAY.latency_seconds + RELAY.seconds(num_bytes)) * SLACK


def test_a_send_takes_its_floor_or_what_its_bytes_do():
    balanced = 20e-6 * 390e9
    assert PEER.seconds(balanced / 100) == pytest.approx(20e-6, rel=1e-5)
    assert 20e-6 < PEER.seconds(balanced) < 40e-6
    assert PEER.seconds(balanced * 100) == pytest.approx(100 * 20e-6, rel=1e-5)


def test_units_bytes_over_bytes_a_second():
    assert PEER.seconds(390e9) == pytest.approx(1)
    behind = MODEL.transfer_seconds(PEER, 2048, prefill_seconds=0.0)
    assert behind == pytest.approx(20e-6 + 2048 * 147_456 / 390e9)
    hidden = MODEL.transfer_seconds(PEER, 2048, prefill_seconds=0.05)
    assert hidden == pytest.approx(20e-6 + 2048 * 147_456 / 390e9 / 36)


def test_a_pair_that_was_not_measured_is_as_slow_as_the_slowest_by_the_same_transport():
    slow = replace(PEER, destination="cuda:2", bytes_per_second=100e9)
    model = replace(MODEL, transfers=(PEER, slow, RELAY))
    assert model.transfer("cuda:0", "cuda:1") == PEER
    assert model.transfer("cuda:0", "cuda:1", "relay") == RELAY
    assert model.transfer("cuda:3", "cuda:4", "peer") == slow
    assert model.transfer("cuda:3", "cuda:4") == slow
    with pytest.raises(CostModelError, match="by 'collective' were measured; measured: peer, relay"):
        model.transfer("cuda:0", "cuda:1", "collective")


# --------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("make, message", [
    (lambda: replace(PREFILL, floor_seconds=0), r"PrefillCost.floor_seconds must be a number above 0, got 0"),
    (lambda: replace(PREFILL, pair_seconds=-1e-9), r"PrefillCost.pair_seconds must be a number of at least 0"),
    (lambda: replace(DECODE, sequence_seconds=float("nan")), r"DecodeCost.sequence_seconds must be a number above 0"),
    (lambda: replace(DECODE, sharpness=0.5), r"DecodeCost.sharpness must be a number of at least 1"),
    (lambda: replace(PEER, bytes_per_second=0.0), r"TransferCost.bytes_per_second must be a number above 0"),
    (lambda: replace(MIXED, floor_seconds=0), r"MixedCost.floor_seconds must be a number above 0, got 0"),
    (lambda: replace(MIXED, sequence_seconds=-1), r"MixedCost.sequence_seconds must be a number of at least 0, got -1"),
    (lambda: replace(PEER, source=""), r"TransferCost.source must be a text"),
    (lambda: Shape(36, 1.5), r"Shape.kv_bytes_per_token must be an integer above 0, got 1.5"),
])
def test_impossible_parameters_are_refused(make, message):
    with pytest.raises(CostModelError, match=message):
        make()


def test_what_is_too_small_to_be_seen_may_be_zero():
    assert replace(PREFILL, pair_seconds=0).seconds(1, 1) > 0
