"""What either path costs, term by term, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanopd.cost_model.analytical import CostModel, DecodeCost, MixedCost, PrefillCost, Shape, TransferCost
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.measurements import DecodeRow, MixedRow, PrefillRow
from nanopd.cost_model.presets import preset
from nanopd.cost_model.seed import SeedModel
from nanopd.widgets.path_costs import FittedModel, FiveParameters, Request, five_of

SEED = SeedModel(alpha_ms_per_token=0.1, beta_ms=20, batch_thresh=8, gamma_ms_per_token=0.08, bandwidth_gb_s=10, bytes_per_token=100_000)
# Sharpness 1: everything adds up.
PREFILL = PrefillCost(5e-3, 1e-4, 0.0, 1.0)
MODEL = CostModel(PREFILL, DecodeCost(5e-3, 1e-4, 0.0, 1.0), MixedCost.on_top(PREFILL, 0.0, 0.0),
                  (TransferCost("a", "b", "slow", 1e-3, 1e9), TransferCost("a", "b", "quick", 1e-3, 1e10)), Shape(10, 100_000))


def test_the_seeds_terms():
    here, there = FiveParameters(SEED).paths(Request(1000, 10, 4)).values()
    assert here == pytest.approx({"prefill": 0.1, "interference": 0.04, "decode": 0.2})
    assert there == pytest.approx({"prefill": 0.1, "transfer": 0.01, "decode": 0.2})
    loaded = FiveParameters(SEED).paths(Request(1000, 10, 15))["collocated"]
    assert loaded == pytest.approx({"prefill": 0.1, "interference": 0.08, "decode": 0.4}), "16 decode, twice batch_thresh"


def test_the_fitted_models_terms():
    here, there = FittedModel(MODEL).paths(Request(1000, 11, 4)).values()
    # A step of 4 takes 5.4 ms and of 5 5.5 ms; with the prompt 105.4 ms, so that each of the 4 waits 100 ms, and 10 times 0.1 ms.
    assert here == pytest.approx({"prefill": 0.1054, "decode": 0.055, "others": 4 * 0.101})
    assert there == pytest.approx({"prefill": 0.105, "transfer": 2e-3, "decode": 0.055, "others": 4 * 0.001})


def test_nobody_is_held_up_by_a_request_alone():
    here, there = FittedModel(MODEL).paths(Request(1000, 11, 0)).values()
    assert here["others"] == there["others"] == 0 and sum(here.values()) < sum(there.values())


def test_a_mixed_step_is_charged_its_prompt_its_interference_and_a_step_of_decodes():
    five = FiveParameters(SEED)
    assert five.row_seconds(PrefillRow(1.0, 500, 0)) == pytest.approx(0.05)
    assert five.row_seconds(DecodeRow(1.0, 16, 1600)) == pytest.approx(0.04)
    assert five.row_seconds(MixedRow(1.0, 500, 0, 4, 400)) == pytest.approx(0.05 + 0.02 + 0.02)
    assert FittedModel(MODEL).row_seconds(MixedRow(1.0, 500, 0, 4, 400)) == pytest.approx(0.0554)


def test_five_parameters_of_a_profile_without_mixed_steps_take_gamma_from_its_model():
    profile = preset("nvidia-h200/qwen3-8b")
    profile = replace(profile, measurements=replace(profile.measurements, mixed=()))
    five = five_of(profile)
    assert five.bytes_per_token == profile.cost.shape.kv_bytes_per_token and five.gamma_ms_per_token > 0
    with pytest.raises(CostModelError, match="none of transfer"):
        five_of(replace(profile, measurements=replace(profile.measurements, transfer=())))
