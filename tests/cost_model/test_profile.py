from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
from cost_model.models import MODEL
from cost_model.test_fit import measured

from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.profile import ForeignProfile, Profile

ABOUT = dict(device="NVIDIA H200", model="qwen3-8b", dtype="bfloat16", date="2026-01-02T03:04:05+00:00",
             versions={"torch": "2.11.0", "driver": None}, notes=("synthetic",))
HERE = dict(device="NVIDIA H200", model="qwen3-8b", dtype="bfloat16")


@pytest.fixture(scope="module")
def profile():
    return Profile.of(measured(noise=0.01), MODEL.shape, **ABOUT)


def changed(profile, path, value):
    """The profile's JSON with something else at `path`; `None` in its place: without it."""
    data = json.loads(profile.to_json())
    *parents, last = path
    place = data
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(data)


def test_what_was_saved_is_loaded(profile, tmp_path):
    path = tmp_path / "new" / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert Profile.load(str(path)) == profile
    assert [each.name for each in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize("path, value, message", [
    (["cost", "decode", "floor_seconds"], -0.004, r"profile.cost.decode: DecodeCost.floor_seconds must be a number above 0"),
    (["cost", "decode", "floor_seconds"], 0, r"profile.cost.decode: DecodeCost.floor_seconds must be a number above 0"),
    (["cost", "prefill", "token_seconds"], "fast", r"profile.cost.prefill.token_seconds must be a number, got 'fast'"),
    (["cost", "prefill", "token_seconds"], float("nan"), r"profile.cost.prefill.token_seconds must be a number, got nan"),
    (["cost", "prefill", "token_seconds"], None, r"profile.cost.prefill lacks token_seconds"),
    (["cost", "prefill", "beta"], 1.0, r"profile.cost.prefill has unknown beta"),
    (["cost", "transfers", 0, "bytes_per_second"], -1, r"profile.cost.transfers\[0\]: TransferCost.bytes_per_second"),
    (["cost", "shape", "num_layers"], 36.5, r"profile.cost.shape.num_layers must be an integer, got 36.5"),
    (["cost", "shape", "num_layers"], True, r"profile.cost.shape.num_layers must be an integer, got True"),
    (["cost"], [], r"profile.cost must be an object, got \[\]"),
    (["measurements", "decode", 3, "seconds"], 0, r"profile.measurements.decode\[3\]: DecodeRow.seconds must be"),
    (["measurements", "decode"], {}, r"profile.measurements.decode must be a list, got {}"),
    (["fits", 0, "intervals", "floor_seconds"], [1.0], r"profile.fits\[0\].intervals.floor_seconds must be a list of 2"),
    (["versions", "torch"], 2, r"profile.versions.torch must be a text, got 2"),
    (["date"], "yesterday", r"profile: date 'yesterday' is not as in"),
    (["device"], "", r"profile: device is empty"),
    (["schema"], 0, r"schema 0, this version reads 2: make the profile again"),
    (["schema"], None, r"schema None, this version reads 2"),
])
def test_a_malformed_profile_says_where(profile, path, value, message):
    with pytest.raises(CostModelError, match=message):
        Profile.from_json(changed(profile, path, value))


@pytest.mark.parametrize("text, message", [
    ("", "is not a profile: not JSON"), ("[1, 2]", r"is not a profile: profile must be an object, got \[1, 2\]"),
    ('{"alpha_ms_per_token": 0.1}', "is not a profile: schema None")])
def test_a_foreign_file_is_named(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(CostModelError, match=f"other.json {message}"):
        Profile.load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CostModelError, match=r"can't read the profile .*nowhere.json"):
        Profile.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(CostModelError, match=r"can't read the profile .*binary.json"):
        Profile.load(tmp_path / "binary.json")


def test_another_machine_or_model_is_warned_about(profile):
    with pytest.warns(ForeignProfile, match="another device 'NVIDIA H200', here it is 'NVIDIA H20'; another dtype 'bfloat16', "
                                            "here it is 'float16'"):
        said = profile.warn_if_foreign(device="NVIDIA H20", model="qwen3-8b", dtype="float16")
    assert len(said) == 2


def test_its_own_machine_is_not(profile):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert profile.warn_if_foreign(**HERE) == []


def test_measurements_that_do_not_suffice_make_no_profile():
    with pytest.raises(CostModelError, match="prefill: 0 rows are too few"):
        Profile.of(replace(measured(), prefill=()), MODEL.shape, **ABOUT)
