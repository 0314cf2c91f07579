"""Presets, and profiles made of recorded results: of synthetic ones, and of those in the repository."""

from __future__ import annotations

import pytest
from cost_model.models import DECODE, MODEL, PEER, PREFILL

from nanopd.benchmark.results import RECORDED, Report, slug
from nanopd.cost_model.analytical import Shape, attended_pairs
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.fit import fit, predicted_seconds
from nanopd.cost_model.presets import (
    BYTES_PER_ELEMENT,
    PRESETS,
    from_results,
    preset,
    preset_names,
    preset_path,
)
from nanopd.cost_model.profile import Profile
from nanopd.models.spec import load_spec

CELLS = ((1, 512), (16, 1026), (32, 1027), (64, 1029), (256, 1041))  # as `nanopd bench decode` has them
LENGTHS = (64, 512, 2048, 8000)
BLOCKS = (1, 16, 64, 256, 1024, 2048)
BLOCK_BYTES = 16 * 147_456


@pytest.fixture(scope="module")
def spec():
    return load_spec("qwen3-8b")


def report(bench, rows, summary=None, name="NVIDIA H200"):
    return Report(bench, "2026-01-02T03:04:05+00:00", f"nanopd bench {bench}", "0123456789abcdef", False,
                  {"kind": "cuda", "name": name}, {"torch": "2.11.0", "driver": None}, {}, rows, summary or {})


@pytest.fixture
def folder(tmp_path):
    """What the benchmarks would have recorded on a machine that is as the model says, and rows of another model."""
    decode = [{"model": "qwen3-8b", "batch": batch, "context": 1024, "mean_context": context,
               "ms": DECODE.seconds(batch, batch * context) * 1e3} for batch, context in CELLS]
    report("decode", [*decode, decode[0] | {"model": "qwen3-0.6b", "ms": 0.8}]).save(tmp_path)
    report("prefill", [{"model": "qwen3-8b", "tokens": length, "ms": PREFILL.seconds(length, attended_pairs(length)) * 1e3}
                       for length in LENGTHS]).save(tmp_path)
    return tmp_path / "nvidia-h200"


def save_transfers(folder):
    rows = [{"transport": "peer", "pieces": pieces, "blocks": count, "mb": count * BLOCK_BYTES / 1e6,
             "ms": count * BLOCK_BYTES / PEER.bytes_per_second * 1e3 * slower}
            for pieces, slower in (("whole", 1), ("layers", 2)) for count in BLOCKS]
    report("transfer", rows, {"latency_us": {"peer": PEER.seconds(BLOCK_BYTES / 36) * 1e6}}).save(folder.parent)


def test_a_profile_of_recorded_results(folder, spec):
    profile = from_results(folder, "qwen3-8b", spec)
    assert (profile.device, profile.model, profile.dtype) == ("NVIDIA H200", "qwen3-8b", "bfloat16")
    assert profile.cost.shape == MODEL.shape
    assert len(profile.measurements.decode) == 5 and len(profile.measurements.prefill) == 4
    assert "decode: recorded 2026-01-02, commit 0123456" in profile.notes
    # The sharpness can't be seen in so few rows and is assumed to be another than this machine's.
    assert all(each.assumed == ("sharpness",) and each.p95_error < 0.05 for each in profile.fits)
    assert profile.cost.decode.seconds(64, 64 * 1024) == pytest.approx(DECODE.seconds(64, 64 * 1024), rel=0.05)
    assert profile.cost.transfers == ()


def test_with_transfers(folder, spec):
    save_transfers(folder)
    link, = from_results(folder, "qwen3-8b", spec).cost.transfers
    assert (link.source, link.destination, link.transport) == ("cuda:0", "cuda:1", "peer")
    assert link.latency_seconds == pytest.approx(PEER.latency_seconds, rel=0.01)
    assert link.bytes_per_second == pytest.approx(PEER.bytes_per_second, rel=0.01)


def test_it_can_be_saved_and_loaded(folder, spec, tmp_path):
    save_transfers(folder)
    profile = from_results(folder, "qwen3-8b", spec)
    profile.save(tmp_path / "preset.json")
    assert Profile.load(tmp_path / "preset.json") == profile


def test_results_that_do_not_suffice_are_refused(folder, spec):
    with pytest.raises(CostModelError, match="prefill: 0 rows are too few"):
        from_results(folder, "llama-3.1-8b", spec)
    (folder / "decode.json").unlink()
    with pytest.raises(CostModelError, match="can't read the recorded result .*record it with `nanopd bench decode`"):
        from_results(folder, "qwen3-8b", spec)


def test_results_of_several_devices_are_not_mixed(folder, spec):
    other = report("prefill", [], name="NVIDIA H20").save(folder.parent)
    (folder / "prefill.json").write_text(other.read_text())
    with pytest.raises(CostModelError, match="several devices: NVIDIA H20, NVIDIA H200"):
        from_results(folder, "qwen3-8b", spec)


def test_an_unknown_preset_says_which_there_are():
    with pytest.raises(CostModelError, match="no preset 'h300'; there are .*nanopd profile"):
        preset("h300")
    assert not any(name.startswith("seed/") for name in preset_names())
    assert preset_path("nvidia-h200/qwen3-8b").parent.parent == PRESETS


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_of_what_it_is_named_after(name):
    found, (device, model) = preset(name), name.split("/")
    spec = load_spec(model)
    assert (slug(found.device), found.model) == (device, model)
    assert found.cost.shape == Shape(spec.num_layers, spec.kv_bytes_per_token(BYTES_PER_ELEMENT))


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_s_constants_are_what_its_measurements_give(name):
    """Up to the last digits, in which versions of scipy differ."""
    found = preset(name)
    again, fits = fit(found.measurements, found.cost.shape)
    assert [each.quantity for each in fits] == [each.quantity for each in found.fits]
    assert again.message_seconds == found.cost.message_seconds
    rows = found.measurements
    for row in (*rows.prefill, *rows.decode, *rows.mixed, *rows.transfer):
        assert predicted_seconds(found.cost, row) == pytest.approx(predicted_seconds(again, row), rel=1e-3)


def test_the_recorded_results_give_a_profile():
    profile = from_results(RECORDED / "nvidia-h200", "qwen3-8b", load_spec("qwen3-8b"))
    assert (slug(profile.device), profile.model, profile.cost.shape) == ("nvidia-h200", "qwen3-8b", MODEL.shape)
    assert {link.transport for link in profile.cost.transfers} >= {"peer", "relay"}
    for note, bench in zip(profile.notes, ("decode", "prefill", "transfer")):
        assert note.startswith(f"{bench}: recorded ")
