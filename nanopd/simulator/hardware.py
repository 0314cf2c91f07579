"""What is simulated: a measured machine by a preset's name or a profile's file, or one of the seed's.

The seed published five parameters of a formula, not the times of steps. As far as they say what a step takes, `of_seed`
makes a cost model of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanopd.cost_model.analytical import CostModel, DecodeCost, MixedCost, PrefillCost, Shape, TransferCost
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.presets import SEED, preset, preset_names
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.seed import SeedModel, seed_preset, seed_preset_names

SEED_LAYERS = 36  # the seed's parameters are of Qwen3-8B
SHARP = 64.0  # a sharpness so high that a pass takes the longer of its two times
OF_SEED = (
    "made of the five parameters that the seed published for Qwen3-8B, not measured with this engine",
    "a prompt's step takes alpha for each token, and no less than a decode step, since both are one pass over the model",
    "attention's share is in alpha, and the contexts' share of a decode step in beta: neither grows with the length",
    "gamma is left out: it was measured on steps that held the prompt too. What decodes add to a prompt's step is assumed "
    "to be what they add to a decode step",
    "transfers have no latency, and between any two devices the one bandwidth that was published",
)


@dataclass(frozen=True)
class Hardware:
    """A kind of device with a model on it."""

    name: str
    cost: CostModel
    runs_ahead: bool  # as GPUs do: each step is planned while the one before it runs
    notes: tuple[str, ...]  # where its constants come from


def hardware_names() -> list[str]:
    """Of all presets, such as "nvidia-h200/qwen3-8b"."""
    return [*preset_names(), *(f"{SEED}/{name}" for name in seed_preset_names())]


def hardware(name: str | Path) -> Hardware:
    """A preset, or a profile's file, which ends in .json. Raises CostModelError where there is none, and says which there are."""
    name = str(name)
    if name.endswith(".json"):
        return _of_profile(name, Profile.load(name))
    if name in preset_names():
        return _of_profile(name, preset(name))
    if name in hardware_names():
        return Hardware(name, of_seed(seed_preset(name.removeprefix(f"{SEED}/"))), True, OF_SEED)
    raise CostModelError(f"unknown hardware {name!r}; there are {', '.join(hardware_names())}, and any profile.json that "
                         "`nanopd profile` made")


def _of_profile(name: str, profile: Profile) -> Hardware:
    notes = (f"measured on {profile.device}, {profile.model}, {profile.dtype}, {profile.date[:10]}", *profile.notes)
    return Hardware(name, profile.cost, "nvidia" in profile.device.lower(), notes)


def of_seed(seed: SeedModel) -> CostModel:
    """What the notes OF_SEED say."""
    alpha, beta = seed.alpha_ms_per_token / 1e3, seed.beta_ms / 1e3
    prefill = PrefillCost(beta, alpha, 0.0, SHARP)
    decode = DecodeCost(beta, beta / seed.batch_thresh, 0.0, SHARP)
    link = TransferCost("cuda:0", "cuda:1", "published", 0.0, seed.bandwidth_gb_s * 1e9)
    return CostModel(prefill, decode, MixedCost.assumed(prefill, decode), (link,), Shape(SEED_LAYERS, int(seed.bytes_per_token)))
