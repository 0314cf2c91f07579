"""Hardware by name: what the seed published comes out again, and a measured model is passed on as it is."""

from __future__ import annotations

import pytest
from cost_model.models import MODEL, PEER

from nanopd.cost_model.analytical import StepWork
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.presets import preset, preset_path
from nanopd.cost_model.seed import seed_preset, seed_preset_names
from nanopd.simulator import ModelCosts
from nanopd.simulator.hardware import hardware, hardware_names


def test_all_of_them_are_there():
    assert {"nvidia-h200/qwen3-8b", "seed/h20", "seed/rtx-4090"} <= set(hardware_names())
    for name in hardware_names():
        found = hardware(name)
        assert (found.name, found.runs_ahead) == (name, True)
        assert found.notes


def test_an_unknown_one_says_which_there_are():
    with pytest.raises(CostModelError, match="unknown hardware 'h300'; there are .*seed/h20, seed/rtx-4090, and any profile.json"):
        hardware("h300")
    with pytest.raises(CostModelError, match="can't read the profile h300.json"):
        hardware("h300.json")


def test_a_profile_s_file_is_the_same_as_the_preset_made_of_it():
    name = "nvidia-h200/qwen3-8b"
    assert hardware(preset_path(name)).cost == hardware(name).cost == preset(name).cost


@pytest.mark.parametrize("name", seed_preset_names())
def test_the_seed_s_steps_and_transfers(name):
    """Long prompts, decodes and transfers take what the formula says; a short prompt's step what a decode step takes."""
    seed, cost = seed_preset(name), hardware(f"seed/{name}").cost
    for tokens in (1024, 4096):
        assert cost.step_seconds(StepWork.chunk(tokens)) == pytest.approx(seed.prefill_seconds(tokens), rel=1e-3)
        moving = cost.transfer("cuda:0", "cuda:1").seconds(tokens * cost.shape.kv_bytes_per_token)
        assert moving == pytest.approx(seed.transfer_seconds(tokens))
    for batch in (1, 8, 16, 40):
        work = StepWork(decodes=batch, context_tokens=1000 * batch)
        assert cost.step_seconds(work) == pytest.approx(seed.decode_step_seconds(batch), rel=0.02)
    assert cost.step_seconds(StepWork.chunk(16)) == pytest.approx(seed.decode_step_seconds(1), rel=1e-3)


def test_costs_of_a_model():
    costs, work = ModelCosts(MODEL), StepWork.chunk(300) + StepWork(decodes=3, context_tokens=900)
    assert costs.step_seconds(work) == MODEL.step_seconds(work)
    link = costs.link("cuda:0", "cuda:1")
    behind = MODEL.transfer_seconds(PEER, 1000, prefill_seconds=0.0)
    assert link.latency + 1000 * link.token == pytest.approx(behind)
