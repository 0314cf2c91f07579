"""Fits of synthetic rows, whose constants are known; on real ones `fit` reports its errors itself."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest
from cost_model.models import DECODE, MIXED, MODEL, PEER, PREFILL, RELAY
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd.cost_model.analytical import DecodeCost, MixedCost, PrefillCost, Shape
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.fit import (
    Fit,
    error_quantile,
    fit,
    fit_decode,
    fit_mixed,
    fit_prefill,
    fit_transfer,
    predicted_seconds,
    prediction_errors,
)
from nanopd.cost_model.measurements import (
    DecodeRow,
    Measurements,
    MessageRow,
    MixedRow,
    PrefillRow,
    TransferRow,
)

PROMPTS = [(new, cached) for new in (16, 64, 256, 512, 1024, 2048, 4096, 8192) for cached in (0, 1024, 4096)]
BATCHES = [(batch, context) for batch in (1, 4, 16, 32, 64, 128, 192, 256) for context in (128, 512, 1024, 2048)]
MIXES = [(new, 0, batch, batch * context) for new in (128, 512, 2048) for batch in (1, 8, 32, 64) for context in (256, 1024)]
SIZES = [2.0**power for power in range(12, 31, 2)]


def measured(model=MODEL, noise=0.0, seed=0):
    """Rows as if `model` were the machine, each off by so much (the standard deviation)."""
    draw = random.Random(seed)

    def row(kind, **values):
        exact = kind(seconds=1.0, **values)
        return replace(exact, seconds=predicted_seconds(model, exact) * (1 + draw.gauss(0, noise)))

    return Measurements(
        tuple(row(PrefillRow, new_tokens=new, cached_tokens=cached) for new, cached in PROMPTS),
        tuple(row(DecodeRow, decodes=batch, context_tokens=batch * context) for batch, context in BATCHES),
        tuple(row(MixedRow, new_tokens=new, cached_tokens=cached, decodes=batch, context_tokens=contexts)
              for new, cached, batch, contexts in MIXES),
        tuple(row(TransferRow, source=link.source, destination=link.destination, transport=link.transport, num_bytes=size)
              for link in model.transfers for size in SIZES))


def assert_close(found, true, rel):
    for name, value in asdict(true).items():
        assert getattr(found, name) == (value if isinstance(value, str) else pytest.approx(value, rel=rel)), name


def test_constants_come_back_exactly_from_exact_rows():
    model, fits = fit(measured(), MODEL.shape)
    assert_close(model.prefill, PREFILL, 1e-3)
    assert_close(model.decode, DECODE, 1e-3)
    assert_close(model.mixed, MIXED, 0.05)
    for found, true in zip(model.transfers, (PEER, RELAY)):
        assert_close(found, true, 1e-3)
    assert [each.quantity for each in fits] == [
        "prefill", "decode", "mixed", "transfer cuda:0 to cuda:1 by peer", "transfer cuda:0 to cuda:1 by relay"]
    assert all(each.p95_error < 1e-3 and each.held_out_p95_error < 1e-3 for each in fits)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_constants_come_back_from_noisy_rows(seed):
    rows = measured(noise=0.01, seed=seed)
    model, fits = fit(rows, MODEL.shape)
    for part, true, names in [
            (model.prefill, PREFILL, ("floor_seconds", "token_seconds")),
            (model.decode, DECODE, ("floor_seconds", "sequence_seconds", "context_token_seconds")),
            (model.transfers[0], PEER, ("latency_seconds", "bytes_per_second"))]:
        for name in names:
            assert getattr(part, name) == pytest.approx(getattr(true, name), rel=0.1), name
    # Constants may make up for each other; what they predict together is what counts.
    assert all(error_quantile(errors, 1) < 0.03 for errors in prediction_errors(model, measured()).values())
    assert all(each.held_out_median_error < 0.02 for each in fits)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """95% of them should; of 120 that are not quite independent a few less may."""
    inside = []
    for seed in range(30):
        _, found = fit_decode(measured(noise=0.01, seed=seed).decode)
        inside += [low <= getattr(DECODE, name) <= high for name, (low, high) in found.intervals.items()]
    assert len(inside) == 120
    assert 0.85 <= sum(inside) / len(inside) < 1


def test_the_speed_of_a_link_has_its_interval_too():
    _, found = fit_transfer([row for row in measured(noise=0.01).transfer if row.transport == "relay"])
    low, high = found.intervals["bytes_per_second"]
    assert 0.9 * 50e9 < low < 50e9 < high < 1.1 * 50e9


@pytest.mark.parametrize("factor", [10.0, 0.2])
def test_a_hiccup_does_not_pull_the_fit_along(factor):
    rows = list(measured(noise=0.005).decode)
    rows[13] = replace(rows[13], seconds=rows[13].seconds * factor)
    decode, found = fit_decode(rows)
    assert_close(replace(decode, sharpness=4.0), DECODE, 0.1)
    assert abs(found.errors[13]) > 0.8
    assert found.median_error < 0.01


def test_overheads_that_add_up_are_told_from_those_that_hide():
    slow = DecodeCost(floor_seconds=1e-3, sequence_seconds=2e-4, context_token_seconds=1e-7, sharpness=1.0)
    decode, _ = fit_decode(measured(replace(MODEL, decode=slow), noise=0.002).decode)
    assert decode.sharpness < 1.1


def test_with_few_rows_the_sharpness_is_assumed_and_it_says_so():
    rows = measured().prefill[:4]
    cost, found = fit_prefill(rows)
    assert found.assumed == ("sharpness",) and "sharpness" not in found.intervals
    assert cost.sharpness == 3.0


def test_errors_are_in_the_order_of_the_rows_and_held_out_rows_are_each_left_out_once():
    rows = measured(noise=0.02)
    model, fits = fit(rows, MODEL.shape)
    again = prediction_errors(model, rows)
    assert fits[0].errors == pytest.approx(again["prefill"])
    assert fits[1].errors == pytest.approx(again["decode"])
    assert fits[2].errors == pytest.approx(again["mixed"])
    assert len(fits[1].held_out_errors) == len(rows.decode)
    # What a fit has not seen it predicts no better than what it has.
    assert fits[1].held_out_median_error >= 0.9 * fits[1].median_error


def test_without_mixed_rows_decodes_cost_what_they_cost_among_themselves():
    model, fits = fit(replace(measured(), mixed=(), transfer=()), Shape(36, 147_456))
    assert model.mixed.sequence_seconds == pytest.approx(1e-6, rel=0.01)  # 25 us, of which a token of a prompt's pass is 24
    assert model.mixed == MixedCost.on_top(model.prefill, model.mixed.sequence_seconds, model.decode.context_token_seconds)
    assert model.transfers == ()
    assert len(fits) == 2


def test_a_message_takes_the_median_of_those_that_were_measured():
    rows = replace(measured(), messages=tuple(map(MessageRow, (3e-4, 9e-2, 2e-4))))
    model, fits = fit(rows, MODEL.shape)
    assert model.message_seconds == 3e-4
    assert fit(measured(), MODEL.shape) == (replace(model, message_seconds=0.0), fits)


def machine(seed):
    """Some machine, from a slow CPU's overheads that add up to a large GPU's that hide."""
    draw = random.Random(seed)

    def size(low, high):
        return 10 ** draw.uniform(low, high)

    prefill = PrefillCost(size(-3, -2), size(-6, -3.5), size(-12, -8), draw.uniform(1, 8))
    decode = DecodeCost(prefill.floor_seconds * draw.uniform(0.3, 1), size(-7, -3), size(-9, -6), draw.uniform(1, 8))
    return replace(MODEL, prefill=prefill, decode=decode, mixed=MixedCost.assumed(prefill, decode))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_machine_is_like(seed):
    model = machine(seed)
    found, _ = fit(measured(model, noise=0.01, seed=seed), model.shape)
    assert {quantity: error_quantile(errors, 0.95) < 0.05 and error_quantile(errors, 0.5) < 0.02
            for quantity, errors in prediction_errors(found, measured(model)).items()} == dict.fromkeys(
                ("prefill", "decode", "mixed", "transfer"), True)


def test_what_cannot_be_told_is_not_said_to_be_known():
    """Batches too small for their computing to be seen behind the weights."""
    hidden = replace(DECODE, sequence_seconds=1e-9, sharpness=8.0)
    _, found = fit_decode(measured(replace(MODEL, decode=hidden), noise=0.01).decode)
    low, high = found.intervals["sequence_seconds"]
    assert low == 0 and (high is None or high > 1e-7)


@pytest.mark.parametrize("refit, message", [
    (lambda rows: fit_prefill(rows.prefill[:3]), "prefill: 3 rows are too few for 3 constants; measure at least 4"),
    (lambda rows: fit_prefill([rows.prefill[0]] * 9), "the 9 rows don't tell floor_seconds, token_seconds, pair_seconds apart"),
    (lambda rows: fit_decode([]), "decode: 0 rows are too few"),
    (lambda rows: fit_decode([row for row in rows.decode if row.context_tokens == 512 * row.decodes]),
     "apart; measure several batches and, in batches of one size, several contexts"),
    (lambda rows: fit_decode([row for row in rows.decode if row.decodes == 16] * 3), "decode: the 12 rows don't tell"),
    (lambda rows: fit_mixed(rows.mixed[:5]), "mixed: 5 rows are too few for 5 constants; measure at least 6"),
    (lambda rows: fit_mixed([rows.mixed[0]] * 6), "mixed: the 6 rows don't tell"),
    (lambda rows: fit_mixed([row for row in rows.mixed if row.decodes == 8]), "measure prompts of several lengths beside several"),
    (lambda rows: fit_transfer([rows.transfer[0]] * 5), "by peer: the 5 rows don't tell latency_seconds, byte_seconds apart"),
    (lambda rows: fit_transfer(rows.transfer), "one pair of devices and one transport at a time, not of 2"),
    (lambda rows: fit_transfer([]), "not of 0"),
])
def test_too_few_or_degenerate_rows_are_refused(refit, message):
    with pytest.raises(CostModelError, match=message):
        refit(measured())


@pytest.mark.parametrize("values, message", [
    (dict(seconds=0, new_tokens=4, cached_tokens=0), "PrefillRow.seconds must be a number above 0, got 0"),
    (dict(seconds=float("nan"), new_tokens=4, cached_tokens=0), "PrefillRow.seconds"),
    (dict(seconds=1, new_tokens=4.5, cached_tokens=0), "PrefillRow.new_tokens must be an integer above 0, got 4.5"),
    (dict(seconds=1, new_tokens=4, cached_tokens=-1), "PrefillRow.cached_tokens must be an integer of at least 0, got -1"),
])
def test_rows_that_cannot_be_are_refused(values, message):
    with pytest.raises(CostModelError, match=message):
        PrefillRow(**values)


def test_quantiles_of_errors():
    errors = [0.01, -0.02, 0.03, -0.04]
    assert error_quantile(errors, 0.5) == 0.02
    assert error_quantile(errors, 0.95) == 0.04
    found = Fit("decode", {}, (), tuple(errors), ())
    assert found.held_out_median_error != found.held_out_median_error  # nan
