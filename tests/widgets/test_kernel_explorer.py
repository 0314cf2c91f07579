"""The kernel explorer: bytes, thread blocks, waves and times by hand, and a figure that follows the sliders."""

from __future__ import annotations

import pytest

from nanopd.widgets.kernel_estimate import KERNELS, Device, Measurement, Shape, estimate
from nanopd.widgets.kernel_explorer import CURVE, ESTIMATE, HERE, MEASURED, RECORDED, KernelExplorer
from nanopd.widgets.strings import set_language

DEVICE = Device("round numbers", num_sms=100, bandwidth=4e12, peak_flops=8e14)
LONE = Shape(batch=1, context=16384)


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


# ------------------------------------------------------------------------------------------------- arithmetic


def test_what_must_be_read_and_computed():
    shape = Shape(batch=64, context=1024)
    assert shape.kv_bytes == 64 * 1024 * 4096 and shape.heads == 32
    assert shape.flops / shape.kv_bytes == shape.group, "in 16 bits, the group is the intensity"


def test_the_naive_kernel_asks_for_each_key_once_for_each_head_of_the_group():
    shape = Shape(batch=64, context=1024)
    naive, grouped = estimate(shape, DEVICE, "naive"), estimate(shape, DEVICE, "grouped")
    assert (naive.ctas, grouped.ctas) == (64 * 32, 64 * 8)
    assert (naive.moved, grouped.moved) == (4 * shape.kv_bytes, shape.kv_bytes)
    assert naive.floor == grouped.floor == shape.kv_bytes / 4e12
    assert (naive.waves, grouped.waves) == (21, 6)


def test_full_waves_cost_the_floor():
    shape = Shape(batch=25, context=4096, kv_heads=4)
    exact = estimate(shape, DEVICE, "grouped")
    assert (exact.ctas, exact.waves) == (100, 1) and exact.seconds == pytest.approx(exact.floor)
    late = estimate(Shape(batch=26, context=4096, kv_heads=4), DEVICE, "grouped")
    assert late.waves == 2 and late.seconds == pytest.approx(2 * exact.seconds)


def test_one_long_sequence_needs_splits():
    alone = estimate(LONE, DEVICE, "split_kv", 1)
    assert (alone.ctas, alone.waves) == (8, 1) and alone.seconds == pytest.approx(100 / 8 * alone.floor)
    times = [estimate(LONE, DEVICE, "split_kv", n).seconds for n in range(1, 65)]
    assert times[11] < alone.seconds / 8 and times[12] > 1.5 * times[11], "96 thread blocks are one wave, 104 are two"
    assert min(times) < 1.1 * alone.floor
    assert estimate(LONE, DEVICE, "split_kv", 12).moved > LONE.kv_bytes, "partial results are written and read"


def test_splits_are_whole_blocks_and_no_more_than_there_are():
    short = Shape(batch=1, context=40, block_size=16)
    assert estimate(short, DEVICE, "split_kv", 64) == estimate(short, DEVICE, "split_kv", 3)
    assert estimate(short, DEVICE, "split_kv", 3).ctas == 3 * 8


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_estimate_is_below_the_floor(kernel):
    for batch in (1, 3, 64, 256):
        for context in (512, 5000, 131072):
            for splits in (1, 7, 64):
                guess = estimate(Shape(batch, context), DEVICE, kernel, splits)
                assert guess.seconds >= guess.floor * (1 - 1e-9)


# -------------------------------------------------------------------------------------------------- the panel


def test_the_sliders_move_the_figure_and_the_words():
    panel = KernelExplorer(DEVICE)
    uids = [trace.uid for trace in panel.figure.data]
    before = panel.figure.data[ESTIMATE].y[0], list(panel.figure.data[CURVE].y), panel.message.value
    panel.sliders["context"].value = 16384
    panel.sliders["batch"].value = 1
    assert panel.shape == LONE and "8 thread blocks on 100 SMs: 1 wave" in panel.message.value
    panel.splits_slider.value = 12
    assert "96 thread blocks" in panel.message.value and panel.figure.data[HERE].x[0] == 12
    after = panel.figure.data[ESTIMATE].y[0], list(panel.figure.data[CURVE].y), panel.message.value
    assert all(old != new for old, new in zip(before, after))
    assert [trace.uid for trace in panel.figure.data] == uids, "changed in place"


def test_the_number_of_splits_belongs_to_split_kv():
    panel = KernelExplorer(DEVICE, LONE)
    panel.show(kernel="split_kv", num_splits=8)
    assert panel.num_splits == 8 and not panel.splits_slider.disabled
    panel.show(kernel="naive")
    assert panel.num_splits == 1 and panel.splits_slider.disabled
    assert "4 times that" in panel.message.value


def test_a_shape_of_ones_own_joins_the_choices():
    panel = KernelExplorer(DEVICE, Shape(batch=48, context=1000, group=3, head_dim=64))
    assert panel.shape == Shape(batch=48, context=1000, group=3, head_dim=64)


def test_measuring_shows_the_time_and_its_share_of_the_bandwidth():
    calls = []

    def measure(kernel, shape):
        calls.append((kernel, shape))
        return 2 * shape.kv_bytes / DEVICE.bandwidth

    panel = KernelExplorer(DEVICE, LONE, measure=measure)
    assert not panel.figure.data[MEASURED].x
    panel.measure_button.click()
    assert calls == [("split_kv", LONE)]
    assert "Measured here" in panel.message.value and "(50%)" in panel.message.value
    assert panel.figure.data[MEASURED].y[0] == pytest.approx(LONE.flops * DEVICE.bandwidth / 2 / LONE.kv_bytes)
    panel.show(context=512)
    assert not panel.figure.data[MEASURED].x, "a measurement belongs to its shape"


def test_without_a_gpu_the_button_is_off_and_the_method_says_why():
    panel = KernelExplorer(DEVICE)
    assert panel.measure_button.disabled and "no GPU" in panel.measure_button.tooltip
    with pytest.raises(RuntimeError, match="no GPU"):
        panel.measure()


def test_what_was_recorded_elsewhere_says_so():
    source = "NVIDIA <X>, 2026-01-01, commit abcdef0"
    recorded = [Measurement("naive", LONE, 1e-3, source), Measurement("split_kv", LONE, 1e-4, source)]
    panel = KernelExplorer(DEVICE, recorded=recorded)
    assert not panel.figure.data[RECORDED].x and "Recorded" not in panel.message.value
    panel.show(batch=1, context=16384)
    assert len(panel.figure.data[RECORDED].x) == 2 and not panel.figure.data[MEASURED].x
    badge = "Recorded on NVIDIA &lt;X&gt;, 2026-01-01, commit abcdef0</b> naive 1 ms (2%) · split-KV 100 µs (17%)"
    assert badge in panel.message.value
    low, high = panel.figure.layout.yaxis.range
    assert all(10**low < y < 10**high for y in panel.figure.data[RECORDED].y)


def test_an_error_while_measuring_is_shown():
    def fails(kernel, shape):
        raise MemoryError("<too large>")

    panel = KernelExplorer(DEVICE, measure=fails)
    panel.measure_button.click()  # outside a kernel ipywidgets logs the error
    assert "MemoryError: &lt;too large&gt;" in panel.message.value


def test_the_snapshot_is_static_and_says_what_it_shows():
    panel = KernelExplorer(DEVICE, LONE)
    figure = panel.snapshot()
    assert type(figure).__name__ == "Figure" and "8 thread blocks" in figure.layout.title.text
    before = figure.data[ESTIMATE].y
    panel.show(num_splits=8)
    assert figure.data[ESTIMATE].y == before


def test_it_speaks_chinese():
    set_language("zh")
    panel = KernelExplorer(DEVICE, LONE)
    assert "8 个线程块，100 个 SM：1 波" in panel.message.value
    assert panel.figure.layout.xaxis2.title.text == "切分数"
