"""Times of the engine's kernels for chapter 03: measured on this machine's GPU, or else as recorded on another one.

Every line that is printed here says which of the two it is; where nothing was recorded, it says that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanopd.benchmark.results import Report, load
from nanopd.widgets.kernel_estimate import Device, Measurement, Shape
from nanopd.widgets.strings import t

if TYPE_CHECKING:
    from nanopd.widgets.kernel_explorer import KernelExplorer

DATA_SHEET = Device("NVIDIA H200", num_sms=132, bandwidth=4.8e12, peak_flops=989e12)  # where nothing was recorded


class KernelTimes:
    """What the notebook asks for a time.

    `live`: this machine has a GPU on which the engine's kernels run, so times are measured here, at the first question.
    `device`: the ceilings, measured here or recorded. `launch_us`: what the CPU takes to launch one operation.
    """

    def __init__(self) -> None:
        self.live = _kernels_run_here()
        self.report = None if self.live else _recorded("kernels")
        self.launch_us = 8.0
        self.device = DATA_SHEET
        if self.live:
            self.device, self.launch_us = _ceilings_here()
        elif self.report:
            self.device, self.launch_us = _device(self.report.device, self.report.ceilings)
        self._known = {(m.kernel, m.shape): m.seconds for m in self.recorded}

    @property
    def source(self) -> str:
        """The badge: where the times come from."""
        if self.live:
            return t("times.live", device=self.device.name)
        if self.report:
            return t("times.recorded", source=self.report.source)
        return t("times.data_sheet", device=self.device.name)

    @property
    def conditions(self) -> list[str]:
        """What a recorded run says of itself, such as which version of the kernels it measured."""
        return self.report.notes if self.report else []

    @property
    def recorded(self) -> list[Measurement]:
        """Decode attention as recorded elsewhere; empty on a machine that can measure."""
        rows = [row for row in self.report.rows if row["op"] == "decode_attention"] if self.report else []
        return [Measurement(row["kernel"], _shape(row), row["us"] / 1e6, self.report.source) for row in rows]

    def seconds(self, kernel: str, shape: Shape) -> float | None:
        """Of one layer's decode attention; None where it was not recorded, or is too large for this GPU."""
        if self.live and (kernel, shape) not in self._known and _fits(shape):
            self._known[kernel, shape] = measure_attention(kernel, shape)
        return self._known.get((kernel, shape))

    def percent(self, kernel: str, shape: Shape) -> float | str:
        """Of the bandwidth, counting each key and value once, or the words that there is no such time."""
        seconds = self.seconds(kernel, shape)
        return t("times.none") if seconds is None else 100 * shape.kv_bytes / seconds / self.device.bandwidth

    def table(self, kernel: str, batches: list[int], contexts: list[int]) -> None:
        """Print the percentages of the bandwidth over batch and context."""
        print(self.source)
        print(t("times.table", kernel=t(f"explorer.{kernel}")))
        print(" " * 8, *(f"{context:>8,}" for context in contexts))
        for batch in batches:
            cells = [self.percent(kernel, Shape(batch, context)) for context in contexts]
            print(f"{batch:>8}", *(f"{cell:>7.0f}%" if isinstance(cell, float) else f"{'-':>8}" for cell in cells))

    def prefill_rows(self) -> list[dict[str, Any]]:
        """Attention of one prompt's chunk by each kernel there is: rows of `nanopd bench kernels`."""
        if self.live:
            from nanopd.benchmark import attention

            return [*attention.prefill_rows()]
        return [row for row in self.report.rows if row["op"] == "prefill_attention"] if self.report else []

    def explorer(self, shape: Shape | None = None) -> KernelExplorer:
        """The panel, with what can be measured here or was recorded elsewhere."""
        from nanopd.widgets.kernel_explorer import KernelExplorer

        return KernelExplorer(self.device, shape, measure=measure_attention if self.live else None, recorded=self.recorded)


def show_recorded(bench: str, columns: list[str], **match: Any) -> list[dict[str, Any]]:
    """Print what `nanopd bench` has recorded where the rows match, under its badge; and give the rows back."""
    report = _recorded(bench)
    rows = [row for row in report.rows if all(row.get(key) == value for key, value in match.items())] if report else []
    print(t("times.recorded", source=report.source) if report else t("times.no_run", bench=bench))
    if rows:
        cells = [columns, *([_plain(row.get(column)) for column in columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        for line in cells:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    return rows


def measure_attention(kernel: str, shape: Shape) -> float:
    """Seconds of one layer's decode attention on this machine's GPU."""
    from nanopd.benchmark import attention

    if kernel not in ("naive", "split_kv"):
        raise ValueError(t("times.not_a_kernel", kernel=t(f"explorer.{kernel}")))
    layer = attention.Shape(shape.heads, shape.kv_heads, shape.head_dim, shape.block_size)
    return attention.decode_us(kernel, shape.batch, shape.context, layer) / 1e6


def _fits(shape: Shape) -> bool:
    import torch

    from nanopd.benchmark.attention import FREE_SHARE

    return shape.kv_bytes <= FREE_SHARE * torch.cuda.mem_get_info()[0]


def _kernels_run_here() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    from nanopd.paged_attention import cuda

    return cuda.usable(torch.empty(1, device="cuda", dtype=torch.bfloat16))


def _ceilings_here() -> tuple[Device, float]:
    from nanopd.benchmark import ceilings, environment

    return _device(environment.device_facts(), ceilings.measure())


def _device(facts: dict[str, Any], ceilings: dict[str, float]) -> tuple[Device, float]:
    device = Device(facts["name"], facts["multiprocessors"], ceilings["read_gb_s"] * 1e9, ceilings["matmul_tflop_s"] * 1e12)
    return device, ceilings["launch_us"]


def _recorded(bench: str) -> Report | None:
    """The latest run on a GPU."""
    try:
        report = load(bench)
    except FileNotFoundError:
        return None
    return report if report.device["kind"] == "cuda" else None


def _shape(row: dict[str, Any]) -> Shape:
    return Shape(row["batch"], row["context"], row["kv_heads"], row["heads"] // row["kv_heads"], row["head_dim"], row["block_size"])


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
