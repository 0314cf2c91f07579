"""The seed's formula against what was published about it."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.measurements import DecodeRow, Measurements, MixedRow, PrefillRow, TransferRow
from nanopd.cost_model.seed import SeedModel, fit_seed, seed_preset, seed_preset_names

positive = st.floats(1e-3, 1e3)
models = st.builds(SeedModel, positive, positive, st.integers(1, 64), positive, positive, st.integers(1, 10**6))


@pytest.mark.parametrize("name, published", [("rtx-4090", "7.6"), ("h20", "346")])
def test_gamma_over_transfer_rate(name, published):
    digits = len(published.partition(".")[2])
    assert f"{seed_preset(name).gamma_over_transfer_rate:.{digits}f}" == published


def test_crossover_at_load_3_and_at_any():
    rtx, h20 = seed_preset("rtx-4090"), seed_preset("h20")
    assert [rtx.prefers_disaggregated(load) for load in (1, 2, 3, 4)] == [False, False, True, True]
    assert rtx.crossover_load == 3
    assert all(h20.prefers_disaggregated(load) for load in range(1, 65))
    assert h20.crossover_load == 1


@pytest.mark.parametrize("name, alpha, beta, gamma, bandwidth", [
    ("rtx-4090", 0.1247, 51.56, 0.0869, 12.9), ("h20", 0.1452, 33.10, 0.1302, 392)])
def test_the_published_parameters_give_the_published_terms(name, alpha, beta, gamma, bandwidth):
    seed = seed_preset(name)
    assert seed.prefill_seconds(1000) == pytest.approx(alpha)  # 1000 tokens: a millisecond each is a second
    assert seed.decode_step_seconds(1) == seed.decode_step_seconds(16) == pytest.approx(beta / 1e3)
    assert seed.decode_step_seconds(24) == pytest.approx(1.5 * beta / 1e3)
    assert seed.interference_seconds(1000, 4) == pytest.approx(gamma / 4)
    assert seed.interference_seconds(1000, 16) == seed.interference_seconds(1000, 99) == pytest.approx(gamma)
    assert seed.transfer_seconds(1000) == pytest.approx(147_456 * 1000 / (bandwidth * 1e9))


@given(models, st.integers(1, 64), st.integers(1, 10_000), st.integers(0, 500))
def test_the_rule_says_which_path_costs_less(seed, load, prompt, output):
    """While gamma is above the transfer rate, or the load below the threshold."""
    gap = seed.interference_seconds(prompt, load) - seed.transfer_seconds(prompt)
    costs = seed.collocated_seconds(prompt, output, 8, load) - seed.disaggregated_seconds(prompt, output, 8)
    assert costs == pytest.approx(gap, abs=1e-9 * seed.collocated_seconds(prompt, output, 8, load))
    if load <= seed.batch_thresh and not math.isclose(seed.gamma_over_transfer_rate * load, seed.batch_thresh, rel_tol=1e-9):
        assert seed.prefers_disaggregated(load) == (gap > 0)


@given(models)
def test_crossover_is_where_the_rule_changes(seed):
    load = seed.crossover_load
    if not math.isclose(seed.gamma_over_transfer_rate * (load - 1), seed.batch_thresh, rel_tol=1e-9):
        assert seed.prefers_disaggregated(load) or math.isclose(seed.gamma_over_transfer_rate * load, seed.batch_thresh)
        assert load == 1 or not seed.prefers_disaggregated(load - 1)


def test_its_fault_is_kept_that_the_rule_forgets_the_minimum():
    slow = replace(seed_preset("rtx-4090"), bandwidth_gb_s=0.5)
    assert slow.gamma_over_transfer_rate < 1
    assert slow.prefers_disaggregated(100)
    assert slow.collocated_seconds(1000, 100, 16, load=100) < slow.disaggregated_seconds(1000, 100, 16)


def test_unknown_presets_and_bad_parameters_are_refused():
    assert seed_preset_names() == ["h20", "rtx-4090"]
    with pytest.raises(CostModelError, match="'h200'; there are h20, rtx-4090"):
        seed_preset("h200")
    for bad in (0, -1, math.nan, math.inf, "12", None, True):
        with pytest.raises(CostModelError, match="bandwidth_gb_s must be a number above 0"):
            replace(seed_preset("h20"), bandwidth_gb_s=bad)


# ------------------------------------------------------------------------------------------------------ the fit


def measured_on(model: SeedModel, prefill_in_mixed: float = 0.0) -> Measurements:
    """Rows of a machine that is as the formula says. `prefill_in_mixed`: share of the prefill that a mixed step takes as well."""
    def mixed(length: int, batch: int) -> MixedRow:
        seconds = (model.interference_seconds(length, batch) + prefill_in_mixed * model.prefill_seconds(length)
                   + model.decode_step_seconds(batch))
        return MixedRow(seconds, length, 0, batch, 100.0)

    size = model.bytes_per_token
    return Measurements(
        tuple(PrefillRow(model.prefill_seconds(length), length, 0) for length in (10, 500, 2000)),
        tuple(DecodeRow(model.decode_step_seconds(batch), batch, 100.0) for batch in (1, 4, 16, 32, 64)),
        tuple(mixed(length, batch) for length in (100, 1000) for batch in (4, 16, 32)),
        tuple(TransferRow(slower * model.transfer_seconds(tokens), "cuda:0", "cuda:1", transport, tokens * size)
              for transport, slower in (("relay", 3), ("peer", 1)) for tokens in (10, 1000)))


@pytest.mark.parametrize("name", ["rtx-4090", "h20"])
def test_the_fit_finds_the_parameters_that_made_the_rows(name):
    model = seed_preset(name)
    found = fit_seed(measured_on(model), model.bytes_per_token)
    assert asdict(found) == pytest.approx(asdict(model))


def test_a_prefill_within_the_mixed_steps_ends_up_in_gamma():
    model = seed_preset("rtx-4090")
    found = fit_seed(measured_on(model, prefill_in_mixed=1.0), model.bytes_per_token)
    assert found.alpha_ms_per_token == pytest.approx(model.alpha_ms_per_token)
    assert found.gamma_ms_per_token > model.gamma_ms_per_token + 0.9 * model.alpha_ms_per_token


def test_no_gamma_without_a_mixed_step():
    model = seed_preset("h20")
    with pytest.raises(CostModelError, match="rows of each kind; there are none of prefill, mixed$"):
        fit_seed(replace(measured_on(model), prefill=(), mixed=()), model.bytes_per_token)
