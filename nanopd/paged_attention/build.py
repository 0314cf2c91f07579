"""Compiling the CUDA sources: at first use, once for each kind of GPU, version of the sources and toolchain.

The kernels are registered as torch.ops.nanopd.* by one library that needs no particular torch (it is bound by torch's
stable ABI). Where they can't be had, `load_kernels` says once why, and the reference path serves.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
OLDEST_GPU = (8, 0)
NVCC_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC")
OLDEST_TORCH = "0x020b000000000000"  # 2.11, whose stable ABI the bindings keep to


class BuildError(RuntimeError):
    """CUDA code could not be compiled; the message says what is missing or wrong."""


# ------------------------------------------------------------------------------------- what there is to build with


def cuda_sources() -> list[Path]:
    """Everything that is compiled, headers included: an installed package's own copy, or the checkout's csrc/."""
    folder = PACKAGE / "_csrc" if (PACKAGE / "_csrc").is_dir() else PACKAGE.parent / "csrc"
    return sorted(path for path in folder.glob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [*(os.path.join(home, "bin") for home in homes if home), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def find_ninja() -> str | None:
    """On PATH, or in this environment's own folder of programs, which is not always on PATH."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


@cache
def nvcc_version(nvcc: str) -> str:
    """Such as 13.0."""
    ran = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"release (\d+\.\d+)", ran.stdout)
    return found[1] if found else "unknown"


def cache_folder() -> Path:
    if folder := os.environ.get("NANOPD_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanopd"


def gpu_targets() -> list[str]:
    """What to compile for: the kinds of GPU that torch sees, such as ["80", "90a"]."""
    import torch

    kinds = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [_target(*kind) for kind in sorted(kinds)]


def _target(major: int, minor: int) -> str:
    """With 9.0 come instructions that only code for exactly this GPU may use: wgmma."""
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def arch_flags(targets: Sequence[str]) -> list[str]:
    return [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]


# --------------------------------------------------------------------------------------------------- the kernels


def build(targets: Sequence[str]) -> Path:
    """The library of all kernels for these GPUs, compiled if the cache lacks it."""
    nvcc, ninja = find_nvcc(), find_ninja()
    if nvcc is None:
        raise BuildError("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    if ninja is None:
        raise BuildError("ninja was not found: pip install ninja")
    library = _library_path(targets, nvcc)
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with _lock(library.with_suffix(".lock")):
            if not library.exists():  # another process may have built it meanwhile
                _compile(library, targets, nvcc, ninja)
    return library


def _library_path(targets: Sequence[str], nvcc: str) -> Path:
    import torch

    digest = hashlib.sha256()
    for path in cuda_sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(Path(__file__).read_bytes())  # the flags are in here
    torch_version = ".".join(torch.__version__.split(".")[:2])
    name = f"sm_{'_'.join(targets)}-torch{torch_version}-cuda{nvcc_version(nvcc)}-{digest.hexdigest()[:12]}"
    return cache_folder() / "kernels" / f"{name}.so"


def _compile(library: Path, targets: Sequence[str], nvcc: str, ninja: str) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
        (Path(folder) / "build.ninja").write_text(_ninja_file(targets, nvcc))
        label = f"Building CUDA kernels for {', '.join(f'sm_{target}' for target in targets)} (once, about a minute)..."
        _run_ninja(ninja, folder, label)
        os.replace(Path(folder) / "kernels.so", library)


def torch_flags() -> list[str]:
    """For the bindings, which keep to the stable ABI of the oldest torch supported."""
    return [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", "-isystem", str(_torch_home() / "include")]


def link_flags() -> list[str]:
    """torch is in the process already; it is linked so that the loader can say so where it is not."""
    return [f"-L{_torch_home() / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]


def _torch_home() -> Path:
    import torch

    return Path(torch.__file__).parent


def _ninja_file(targets: Sequence[str], nvcc: str) -> str:
    sources = [path for path in cuda_sources() if path.suffix in (".cu", ".cpp")]
    objects = {path: f"{path.stem}.o" for path in sources}
    lines = [
        f"nvcc = {_escaped(nvcc)}",
        f"flags = {' '.join([*NVCC_FLAGS, *arch_flags(targets)])}",
        f"torch = {' '.join(map(_escaped, torch_flags()))}",
        "rule cu\n  command = $nvcc $flags -c $in -o $out",
        "rule cpp\n  command = $nvcc $flags $torch -c $in -o $out",
        f"link = {' '.join(map(_escaped, link_flags()))}",
        "rule link\n  command = $nvcc $flags -shared $in -o $out -cudart static $link",
        *(f"build {name}: {path.suffix[1:]} {_escaped(path)}" for path, name in objects.items()),
        f"build kernels.so: link {' '.join(objects.values())}",
    ]
    return "\n".join(lines) + "\n"


def _escaped(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _run_ninja(ninja: str, folder: str, label: str) -> None:
    output = []
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with subprocess.Popen([ninja], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        print(label, end="", file=sys.stderr, flush=True)
        for line in process.stdout:
            output.append(line)
            if progress := re.match(r"\[(\d+/\d+)\]", line):
                print(f"\r{label} {progress[1]}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if process.returncode:
        raise BuildError(f"the CUDA kernels did not compile:\n{_errors(output)}")


def _errors(output: list[str], at_most: int = 30) -> str:
    """The compiler's words without ninja's progress and the commands it ran."""
    lines = [line.rstrip() for line in output if not re.match(r"\[\d+/\d+\]|ninja: |FAILED|\S*nvcc ", line)]
    return "\n".join(lines[:at_most])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it should the process die."""
    import fcntl  # not on Windows, where nothing is compiled

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------------- loading them


@cache
def load_kernels() -> bool:
    """Make torch.ops.nanopd.* usable, compiling first if need be. False, with a warning, where that can't be.

    On a machine without a GPU there is nothing to say: the reference path is what runs there.
    """
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        _require_usable_gpus()
        torch.ops.load_library(str(build(gpu_targets())))
    except (BuildError, OSError) as error:
        warnings.warn(f"nanoPD runs without its CUDA kernels, slowly, by plain torch: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def _require_usable_gpus() -> None:
    import torch

    if sys.platform != "linux":
        raise BuildError("they are compiled on Linux only")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_GPU:
            raise BuildError(f"GPU {index} has compute capability {capability[0]}.{capability[1]}, below "
                             f"{OLDEST_GPU[0]}.{OLDEST_GPU[1]}; CUDA_VISIBLE_DEVICES can hide it")


def kernels_status() -> str:
    """For `nanopd doctor`: whether the kernels are compiled. Compiles nothing."""
    import torch

    nvcc = find_nvcc()
    if nvcc is None or not torch.cuda.is_available():
        return "not compiled"
    return "compiled" if _library_path(gpu_targets(), nvcc).exists() else "compiled at first use, in about a minute"


# --------------------------------------------------------------------------------------- CUDA from a notebook cell


def compile_shared(source: str, name: str = "cell", flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile CUDA code with `extern "C"` functions and load it. Compiled once; the headers in csrc/ can be included.

    Raises BuildError with the compiler's words, whose lines are those of `source`.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    command = [nvcc, *NVCC_FLAGS, *arch_flags(_targets_here()), "-shared", "-cudart", "static",
               "-I", str(cuda_sources()[0].parent), *flags]
    headers = [path.read_text() for path in cuda_sources() if path.suffix in (".h", ".cuh")]
    digest = hashlib.sha256("\0".join([nvcc_version(nvcc), *command, *headers, source]).encode()).hexdigest()[:12]
    library = cache_folder() / "cells" / f"{name}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
            (Path(folder) / f"{name}.cu").write_text(source)
            ran = subprocess.run([*command, f"{name}.cu", "-o", "library.so"], cwd=folder, capture_output=True, text=True,
                                 check=False)
            if ran.returncode:
                raise BuildError(f"{name}.cu did not compile:\n{ran.stdout}{ran.stderr}".rstrip())
            os.replace(Path(folder) / "library.so", library)
    return ctypes.CDLL(str(library))


def _targets_here() -> list[str]:
    """The GPUs there are; without one the oldest that could be, so that code can at least be compiled."""
    import torch

    return gpu_targets() if torch.cuda.is_available() else [_target(*OLDEST_GPU)]
