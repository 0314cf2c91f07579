"""Panels for the workbook: one module each, loaded when first named, so that `strings` alone costs no plotly."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PANELS: dict[str, str] = {
    "BatchTimeline": "batch_timeline",
    "BlockMap": "block_map",
    "ClusterTimeline": "cluster_timeline",
    "CostModelExplorer": "cost_model_explorer",
    "KernelExplorer": "kernel_explorer",
    "KernelTimes": "kernel_times",
    "LiveReplay": "live_replay",
    "LiveServing": "live_serving",
    "Roofline": "roofline",
    "RoutingMicroscope": "routing_microscope",
    "SweepExplorer": "sweep_explorer",
    "TransferTimes": "transfer_times",
}  # class name -> module in this package


def __getattr__(name: str) -> Any:
    if name not in _PANELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PANELS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PANELS])
