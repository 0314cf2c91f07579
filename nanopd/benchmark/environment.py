"""What a figure depends on besides the code: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import nanopd
from nanopd.engine.factory import cpu_name

ROOT = Path(__file__).parents[2]
PEERS = ("flashinfer-python", "transformers")


class CannotMeasure(ValueError):
    """Something is missing. The message says what."""


def device_facts(on_cpu: bool = False) -> dict[str, Any]:
    """The GPU if there is one, else the CPU. `on_cpu`: the CPU in any case."""
    cpu = cpu_name()
    if on_cpu or not torch.cuda.is_available():
        return {"kind": "cpu", "name": "cpu", "cpu": cpu}
    properties = torch.cuda.get_device_properties(0)
    return {
        "kind": "cuda", "name": properties.name, "cpu": cpu, "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def versions() -> dict[str, str | None]:
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    found = {"nanopd": nanopd.__version__, "python": platform.python_version(), "torch": torch.__version__,
             "cuda": torch.version.cuda, "driver": driver.strip() if driver else None}
    return found | {name: _installed(name) for name in PEERS}


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether tracked files other than recorded results differ from it."""
    head = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".",
                    ":!nanopd/benchmark/results")
    return (None, None) if head is None or changes is None else (head.strip(), bool(changes))


def _said(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout if ran.returncode == 0 else None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
