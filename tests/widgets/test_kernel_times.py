"""Times come from this machine's GPU, or from a recorded run, and what is printed says which."""

from __future__ import annotations

from unittest.mock import create_autospec

import pytest

from nanopd.benchmark import attention
from nanopd.benchmark.results import Report
from nanopd.widgets import kernel_times
from nanopd.widgets.kernel_estimate import Shape
from nanopd.widgets.kernel_times import DATA_SHEET, KernelTimes, show_recorded
from nanopd.widgets.strings import set_language

CEILINGS = {"read_gb_s": 4000.0, "matmul_tflop_s": 800.0, "launch_us": 5.0}
LAYER = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 16}
ROWS = [
    {"op": "decode_attention", "batch": 64, "context": 1024, **LAYER, "kernel": "split_kv", "us": 100.0},
    {"op": "decode_attention", "batch": 64, "context": 1024, **LAYER, "kernel": "naive", "us": 1000.0},
    {"op": "decode_attention", "batch": 64, "context": 1024, **LAYER, "kernel": "flashinfer", "us": 120.0},
    {"op": "prefill_attention", "new": 2048, "prefix": 0, **LAYER, "kernel": "engine", "us": 200.0},
    {"op": "linear_chain", "tokens": 1, "kernel": "nanopd", "us": 9.0},
]
REPORT = Report("kernels", "2026-01-01T00:00:00+00:00", "nanopd bench kernels", "abcdef0123", False,
                {"kind": "cuda", "name": "Some GPU", "multiprocessors": 100}, {}, CEILINGS, ROWS, notes=["warm"])


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """A machine without a GPU, in English, where REPORT was recorded."""
    set_language("en")
    monkeypatch.setattr(kernel_times, "_kernels_run_here", lambda: False)
    monkeypatch.setattr(kernel_times, "_recorded", lambda bench: REPORT if bench == "kernels" else None)
    yield
    set_language(None)


def test_recorded_times_bring_their_device_and_badge():
    times = KernelTimes()
    assert not times.live and times.source == "recorded on Some GPU, 2026-01-01, commit abcdef0"
    assert (times.device.num_sms, times.device.bandwidth, times.device.peak_flops) == (100, 4e12, 8e14)
    assert times.launch_us == 5 and times.conditions == ["warm"]
    shape = Shape(64, 1024)
    assert times.seconds("split_kv", shape) == pytest.approx(1e-4)
    assert times.percent("split_kv", shape) == pytest.approx(100 * shape.kv_bytes / 1e-4 / 4e12)
    assert times.percent("split_kv", Shape(64, 2048)) == "no figure"
    assert [row["kernel"] for row in times.prefill_rows()] == ["engine"]


def test_on_a_gpu_chunks_are_measured(monkeypatch):
    monkeypatch.setattr(kernel_times, "_kernels_run_here", lambda: True)
    monkeypatch.setattr(kernel_times, "_ceilings_here", lambda: (DATA_SHEET, 8.0))
    monkeypatch.setattr(attention, "prefill_rows", create_autospec(attention.prefill_rows, return_value=iter(ROWS[3:4])))
    assert KernelTimes().prefill_rows() == ROWS[3:4]


def test_the_table_shows_what_there_is(capsys):
    KernelTimes().table("naive", [1, 64], [1024, 4096])
    badge, title, head, one, many = capsys.readouterr().out.splitlines()
    assert "recorded on Some GPU" in badge and title.startswith("naive: share of the bandwidth")
    assert head.split() == ["1,024", "4,096"]
    assert one.split() == ["1", "-", "-"] and many.split() == ["64", "7%", "-"]


def test_the_explorer_shows_all_that_was_recorded_at_a_shape():
    panel = KernelTimes().explorer(Shape(64, 1024))
    assert panel.measure_button.disabled
    assert panel.message.value.count("Recorded on Some GPU") == 1
    assert [word for word in ("flashinfer 120 µs", "split-KV 100 µs", "naive 1 ms") if word not in panel.message.value] == []


def test_where_nothing_was_recorded_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(kernel_times, "_recorded", lambda bench: None)
    times = KernelTimes()
    assert times.device == DATA_SHEET and "no recorded run" in times.source and "data sheet" in times.source
    assert times.percent("naive", Shape()) == "no figure"
    assert times.prefill_rows() == times.recorded == times.conditions == []
    times.table("naive", [1], [1024])
    assert show_recorded("decode", ["ms"]) == []
    assert "no recorded run of `nanopd bench decode`" in capsys.readouterr().out


def test_recorded_rows_are_filtered_and_printed_under_their_badge(capsys):
    rows = show_recorded("kernels", ["kernel", "us", "missing"], op="linear_chain")
    assert rows == [ROWS[-1]]
    badge, head, row = capsys.readouterr().out.splitlines()
    assert badge == "recorded on Some GPU, 2026-01-01, commit abcdef0"
    assert head.split() == ["kernel", "us", "missing"] and row.split() == ["nanopd", "9", "-"]


def test_with_a_gpu_each_shape_is_measured_once_and_nothing_recorded_is_shown(monkeypatch):
    measured = []

    def measure(kernel, shape):
        measured.append((kernel, shape))
        return 2e-4

    monkeypatch.setattr(kernel_times, "_kernels_run_here", lambda: True)
    monkeypatch.setattr(kernel_times, "_ceilings_here", lambda: kernel_times._device(REPORT.device, CEILINGS))
    monkeypatch.setattr(kernel_times, "measure_attention", measure)
    monkeypatch.setattr(kernel_times, "_fits", lambda shape: shape.batch <= 64)
    times = KernelTimes()
    assert times.source == "measured on this machine: Some GPU" and times.recorded == []
    assert times.seconds("naive", Shape()) == times.seconds("naive", Shape()) == 2e-4 and len(measured) == 1
    assert times.seconds("naive", Shape(batch=256)) is None and len(measured) == 1, "too large for this GPU"
    panel = times.explorer()
    panel.measure()
    assert len(measured) == 2 and "Measured here" in panel.message.value


def test_what_the_engine_does_not_have_is_not_measured():
    with pytest.raises(ValueError, match="can be measured"):
        kernel_times.measure_attention("grouped", Shape())


def test_a_run_on_a_cpu_does_not_pose_as_a_gpus(monkeypatch):
    monkeypatch.undo()
    report = Report("kernels", "2026-01-01", "", None, None, {"kind": "cpu", "name": "cpu"}, {}, {}, [])
    monkeypatch.setattr(kernel_times, "load", lambda bench: report)
    assert kernel_times._recorded("kernels") is None
