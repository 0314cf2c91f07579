"""What a figure depends on besides the code: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import nanopd

ROOT = Path(__file__).parents[2]
PEERS = ("flashinfer-python", "transformers")


def device_facts(device: torch.device) -> dict[str, Any]:
    cpu = _first_line_with("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    if device.type != "cuda":
        return {"kind": "cpu", "name": "cpu", "cpu": cpu}
    properties = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda", "name": properties.name, "cpu": cpu, "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def versions() -> dict[str, str | None]:
    found = {"nanopd": nanopd.__version__, "python": platform.python_version(), "torch": torch.__version__,
             "cuda": torch.version.cuda, "driver": _driver()}
    return found | {name: _installed(name) for name in PEERS}


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether tracked files differ from it."""
    head, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return (head.strip(), bool(status)) if head and status is not None else (None, None)


def command() -> str:
    return " ".join(["nanopd bench", *sys.argv[1:]]).replace("nanopd bench bench", "nanopd bench")


def _git(*args: str) -> str | None:
    try:
        ran = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout if ran.returncode == 0 else None


def _driver() -> str | None:
    line = _first_line_with("/proc/driver/nvidia/version", "NVRM")
    return next((word for word in (line or "").split() if word[:1].isdigit()), None)


def _first_line_with(path: str, word: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(word)), None)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
