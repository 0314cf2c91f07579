"""`nanopd doctor`: what this machine has, what nanoPD can do with it, and what to do about the rest.

Each `check_*` turns facts about one thing into Findings and looks at nothing itself, so a test can feed it any
machine. `examine` gathers the facts of this one. A fact that can't be had becomes a finding, never a crash.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopd.paged_attention import build

if TYPE_CHECKING:
    from rich.console import RenderableType

PACKAGE = Path(__file__).parent
GIB = 2**30
PYTHONS = ((3, 10), (3, 13))  # oldest and newest supported
REQUIRED = ("torch", "transformers", "numpy", "safetensors")
LAB = ("jupyterlab", "ipywidgets", "plotly", "anywidget")
ENGINE_ON_CPU = "Engine on the CPU"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL_LAB = "make lab installs it; or pip install 'nanopd[lab]'"


class State(str, Enum):
    OK = "ok"
    LIMITED = "limited"  # works with less, or only part of it is there
    MISSING = "missing"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One row: what was looked for, in what state it is, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    runs: list[Finding]  # what nanoPD can do here

    @property
    def exit_code(self) -> int:
        """0 wherever the engine can run at all."""
        return 0 if self.runs[0].state is not State.MISSING else 1

    def to_json(self) -> str:
        import nanopd

        return json.dumps({"nanopd": nanopd.__version__, **asdict(self)}, indent=2, ensure_ascii=False)


# ------------------------------------------------------------------------------------- facts into findings


def check_python(version: tuple[int, int, int]) -> Finding:
    found = ".".join(map(str, version))
    oldest, newest = PYTHONS
    if oldest <= version[:2] <= newest:
        return Finding("Python", State.OK, found)
    return Finding("Python", State.LIMITED, found, f"nanoPD is tested on Python {oldest[0]}.{oldest[1]} to "
                   f"{newest[0]}.{newest[1]}: make PYTHON=/path/to/one demo")


def check_torch(torch: Any | None, why_not: str = "", has_nvidia_driver: bool = False) -> Finding:
    """`torch` is the module, or None with the reason why it did not import."""
    if torch is None:
        return Finding("torch", State.MISSING, why_not or "not installed",
                       "make demo installs it; or pip install 'torch>=2.11,<2.14'")
    cuda = getattr(torch.version, "cuda", None)
    if cuda:
        return Finding("torch", State.OK, f"{torch.__version__}, built for CUDA {cuda}")
    if has_nvidia_driver:
        return Finding("torch", State.LIMITED, f"{torch.__version__}, built for the CPU",
                       "this machine has an NVIDIA driver; install a CUDA build of torch to use its GPUs")
    return Finding("torch", State.OK, f"{torch.__version__}, built for the CPU")


def check_gpus(torch: Any | None) -> list[Finding]:
    """One row for each GPU, or one that says there is none."""
    if torch is None or not torch.cuda.is_available():
        return [Finding("GPU", State.MISSING, "none that torch can use",
                        "not needed: the engine and the workbook run on the CPU")]
    return [_guarded(f"GPU {index}", lambda index=index: _check_gpu(torch, index))
            for index in range(torch.cuda.device_count())]


def _check_gpu(torch: Any, index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    found = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability {capability}"
    if properties.major < 8:
        return Finding(f"GPU {index}", State.LIMITED, found, "no bfloat16 in hardware: pass dtype='float16'")
    if free < total / 4:
        return Finding(f"GPU {index}", State.LIMITED, found, "most of its memory is taken: nvidia-smi shows by whom")
    return Finding(f"GPU {index}", State.OK, found)


def check_p2p(torch: Any | None) -> Finding:
    """Whether each GPU can read each other's memory directly."""
    count = torch.cuda.device_count() if torch is not None and torch.cuda.is_available() else 0
    pairs = list(combinations(range(count), 2))
    if not pairs:
        return Finding("P2P", State.MISSING, f"{count} GPU{'s' * (count != 1)}, so no pair",
                       "not needed: several workers can share one device")
    can = torch.cuda.can_device_access_peer
    apart = [(a, b) for a, b in pairs if not (can(a, b) and can(b, a))]
    if not apart:
        return Finding("P2P", State.OK, f"all {len(pairs)} pairs" if len(pairs) > 1 else "0-1")
    missing = ", ".join(f"{a}-{b}" for a, b in apart)
    state = State.MISSING if len(apart) == len(pairs) else State.LIMITED
    return Finding("P2P", state, f"{len(pairs) - len(apart)} of {len(pairs)} pairs; not {missing}",
                   "between these, data goes through the host's memory")


def check_nvcc(path: str | None, version_text: str = "") -> Finding:
    if path is None:
        return Finding("nvcc", State.MISSING, "not on PATH, nor under CUDA_HOME",
                       "only needed to compile CUDA kernels: install the CUDA toolkit")
    release = next((part.strip() for part in version_text.split(",") if "release" in part), "version unknown")
    return Finding("nvcc", State.OK, f"{release.splitlines()[-1]} ({path})")


def check_ninja(path: str | None) -> Finding:
    if path is None:
        return Finding("ninja", State.MISSING, "not found", "only needed to compile CUDA kernels: pip install ninja")
    return Finding("ninja", State.OK, path)


def check_kernels(sources: Sequence[str], status: str) -> Finding:
    """`status` says whether they are compiled for this machine's GPUs."""
    if not sources:
        return Finding("CUDA sources", State.MISSING, "not found", "the engine runs by plain torch; install nanoPD again")
    return Finding("CUDA sources", State.OK, f"{len(sources)} .cu file{'s' * (len(sources) != 1)}, {status}")


def check_memory(total: int | None, available: int | None) -> Finding:
    if total is None:
        return Finding("Host memory", State.LIMITED, "could not be read")
    free = "" if available is None else f"{available / GIB:.1f} of "
    found = f"{free}{total / GIB:.1f} GiB{' free' if free else ''}"
    if (total if available is None else available) < 2 * GIB:
        return Finding("Host memory", State.LIMITED, found, "little is left for a model: close other programs")
    return Finding("Host memory", State.OK, found)


def check_cores(count: int) -> Finding:
    if count < 2:
        return Finding("CPU cores", State.LIMITED, str(count), "everything runs, slowly")
    return Finding("CPU cores", State.OK, str(count))


def check_package(name: str, version: str | None, advice: str) -> Finding:
    return Finding(name, State.OK, version) if version else Finding(name, State.MISSING, "not installed", advice)


def check_embedded_model(folder: Path) -> Finding:
    """Its files are there and whole. Reads no more of the weights than their header."""
    name, again = "Embedded model", "install nanoPD again; in a checkout, git checkout nanopd/tiny/weights"
    absent = [file for file in ("config.json", "tokenizer.json", "model.safetensors") if not (folder / file).is_file()]
    if absent:
        return Finding(name, State.MISSING, f"{folder} lacks {', '.join(absent)}", again)
    for file in ("config.json", "tokenizer.json"):
        json.loads((folder / file).read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    expected, size = _safetensors_size(weights), weights.stat().st_size
    if size != expected:
        return Finding(name, State.MISSING, f"{weights.name} has {size} bytes; its header says {expected}", again)
    return Finding(name, State.OK, f"tiny, {size / 2**20:.1f} MiB")


def _safetensors_size(path: Path) -> int:
    """How long the file must be: 8 bytes, the header, and the data that the header lists."""
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > path.stat().st_size:
            raise ValueError(f"{path.name} is cut short")
        header = json.loads(file.read(header_size))
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    return 8 + header_size + max(ends, default=0)


def check_chromium(path: str | None) -> Finding:
    if path is None:
        return Finding("Chromium", State.MISSING, "not found", "only for the browser tests, which are skipped without it; "
                       "on Debian: apt-get install chromium fonts-noto-cjk")
    return Finding("Chromium", State.OK, path)


def check_disk(free: int, where: str) -> Finding:
    found = f"{free / GIB:.1f} GiB free at {where}"
    if free < 2 * GIB:
        return Finding("Disk", State.LIMITED, found, "model checkpoints may not fit")
    return Finding("Disk", State.OK, found)


# --------------------------------------------------------------------------------------- what runs here


def what_runs(findings: Iterable[Finding]) -> list[Finding]:
    """What the findings add up to. The first row is the engine on the CPU, which everything else stands on."""
    by_name = {finding.name: finding for finding in findings}
    gpus = [f for name, f in by_name.items() if name.startswith("GPU ") and f.state is not State.MISSING]
    cpu = _engine_on_cpu(by_name)
    engine = cpu.state is not State.MISSING
    return [cpu, _engine_on_gpu(gpus, engine), _compiled_kernels(by_name, bool(gpus)),
            _direct_transfer(by_name["P2P"]), _notebooks(by_name, engine)]


def _absent(by_name: dict[str, Finding], *names: str) -> list[str]:
    return [name for name in names if by_name[name].state is State.MISSING]


def _engine_on_cpu(by_name: dict[str, Finding]) -> Finding:
    name = ENGINE_ON_CPU
    absent = _absent(by_name, *REQUIRED)
    if absent:
        return Finding(name, State.MISSING, f"needs {', '.join(absent)}", by_name[absent[0]].advice)
    model = by_name["Embedded model"]
    if model.state is State.MISSING:
        return Finding(name, State.LIMITED, "yes, but not with the embedded model", model.advice)
    return Finding(name, State.OK, "yes: nanopd demo")


def _engine_on_gpu(gpus: list[Finding], engine: bool) -> Finding:
    name = "Engine on a GPU"
    if not gpus:
        return Finding(name, State.MISSING, "no GPU that torch can use")
    if not engine:
        return Finding(name, State.MISSING, "the engine does not run yet")
    return Finding(name, State.OK, f"yes, on {len(gpus)} GPU{'s' * (len(gpus) != 1)}")


def _compiled_kernels(by_name: dict[str, Finding], has_gpu: bool) -> Finding:
    name = "Compiled kernels"
    if by_name["CUDA sources"].state is State.MISSING:
        return Finding(name, State.MISSING, "no sources; the engine runs by plain torch", by_name["CUDA sources"].advice)
    absent = _absent(by_name, "nvcc", "ninja")
    if absent:
        return Finding(name, State.MISSING, f"needs {' and '.join(absent)}", by_name[absent[0]].advice)
    return Finding(name, State.OK if has_gpu else State.LIMITED,
                   "yes; compiled at first use and kept" if has_gpu else "can be compiled, not run: no GPU")


def _direct_transfer(p2p: Finding) -> Finding:
    says = {State.OK: "between all GPUs", State.LIMITED: p2p.found, State.MISSING: "no two GPUs that reach each other"}
    return Finding("P2P between GPUs", p2p.state, says[p2p.state])


def _notebooks(by_name: dict[str, Finding], engine: bool) -> Finding:
    name = "Notebooks"
    absent = _absent(by_name, *LAB)
    if absent:
        return Finding(name, State.MISSING, f"needs {', '.join(absent)}", "make lab installs what is missing and opens them")
    if not engine:
        return Finding(name, State.LIMITED, "they open; the engine behind them does not run yet")
    return Finding(name, State.OK, "yes: make lab")


# ---------------------------------------------------------------------------------- facts of this machine


def examine() -> Report:
    """Look at this machine."""
    torch, why_not = _import_torch()
    findings = [
        check_python(sys.version_info[:3]),
        _guarded("torch", lambda: check_torch(torch, why_not, shutil.which("nvidia-smi") is not None)),
        *[check_package(name, _version(name), f"pip install {name}") for name in REQUIRED[1:]],
        *_gpus(torch),
        _guarded("P2P", lambda: check_p2p(torch)),
        _guarded("nvcc", lambda: check_nvcc(*_nvcc())),
        _guarded("ninja", lambda: check_ninja(build.find_ninja())),
        _guarded("CUDA sources", lambda: check_kernels(_cuda_sources(), build.kernels_status())),
        _guarded("CPU cores", lambda: check_cores(_cores())),
        _guarded("Host memory", lambda: check_memory(*_memory())),
        _guarded("Disk", lambda: check_disk(shutil.disk_usage(Path.cwd()).free, str(Path.cwd()))),
        _guarded("Embedded model", lambda: check_embedded_model(PACKAGE / "tiny" / "weights")),
        *[check_package(name, _version(name), INSTALL_LAB) for name in LAB],
        check_chromium(next(filter(None, map(shutil.which, CHROMIUMS)), None)),
    ]
    return Report(findings, what_runs(findings))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever broke is what there is to report
        return Finding(name, State.MISSING, f"{type(error).__name__}: {error}")


def _gpus(torch: Any | None) -> list[Finding]:
    try:
        return check_gpus(torch)
    except Exception as error:
        return [Finding("GPU", State.MISSING, f"{type(error).__name__}: {error}", "look at what nvidia-smi says")]


def _import_torch() -> tuple[Any | None, str]:
    try:
        import torch
    except Exception as error:  # a broken CUDA library shows as OSError, a half-installed torch as almost anything
        return None, "not installed" if isinstance(error, ModuleNotFoundError) else f"does not import: {error}"
    return torch, ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package) if importlib.util.find_spec(package) else None
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _nvcc() -> tuple[str | None, str]:
    path = build.find_nvcc()
    if path is None:
        return None, ""
    ran = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    return path, ran.stdout


def _cuda_sources() -> list[str]:
    return [path.name for path in build.cuda_sources() if path.suffix == ".cu"]


def _cores() -> int:
    """Those this process may use, which in a container are often fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        return total, available
    if platform.system() == "Darwin":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    return None, None


# -------------------------------------------------------------------------------------------- on screen

def _colour(finding: Finding) -> str:
    """Red only for what nothing works without."""
    if finding.state is State.MISSING:
        return "red" if finding.name in (*REQUIRED, ENGINE_ON_CPU) else "bright_black"
    return "green" if finding.state is State.OK else "yellow"


def render(report: Report) -> RenderableType:
    from rich.console import Group

    return Group(_table("This machine", report.findings), "", _table("What runs here", report.runs))


def _table(title: str, findings: Iterable[Finding]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("what", "state", "found", "what to do"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("what", "state"))
    for finding in findings:
        state = Text(str(finding.state), style=_colour(finding))
        table.add_row(Text(finding.name), state, Text(finding.found), Text(finding.advice))
    return table
