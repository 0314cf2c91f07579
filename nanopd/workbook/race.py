"""The break-it lab of chapter 03: a kernel without its barrier, run on thousands of rows and under racecheck.

On a machine with a GPU and nvcc this runs what it is given. Elsewhere it shows what was recorded for `RACY` and `MENDED`,
and says so. `python -m nanopd.workbook.race` records; with a commit, where this copy has no .git.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from nanopd.benchmark.results import Report, load
from nanopd.paged_attention.build import find_nvcc
from nanopd.widgets.strings import t

RACY = r"""
// The softmax denominator of a row: each of 8 warps adds up its part, then the first warp adds the parts.
__global__ void denominator(float* out, const float* scores, int n) {
    __shared__ float parts[8];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += expf(scores[blockIdx.x * n + i]);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    // a barrier belongs here
    sum = parts[threadIdx.x % 8];
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
""".strip()
MENDED = RACY.replace("// a barrier belongs here", "__syncthreads();")

MAIN = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int, char** argv) {
    const int rows = std::atoi(argv[1]), n = 1000;
    std::vector<float> scores(size_t(rows) * n), sums(rows);
    for (float& score : scores) score = std::rand() % 1000 / 1000.0f;
    float *device_scores, *device_sums;
    cudaMalloc(&device_scores, scores.size() * sizeof(float));
    cudaMalloc(&device_sums, rows * sizeof(float));
    cudaMemcpy(device_scores, scores.data(), scores.size() * sizeof(float), cudaMemcpyHostToDevice);
    denominator<<<rows, 256>>>(device_sums, device_scores, n);
    cudaMemcpy(sums.data(), device_sums, rows * sizeof(float), cudaMemcpyDeviceToHost);
    if (cudaError_t error = cudaGetLastError()) return std::printf("%s\n", cudaGetErrorString(error)), 1;
    int wrong = 0;
    for (int row = 0; row < rows; ++row) {
        double right = 0;
        for (int i = 0; i < n; ++i) right += std::exp(double(scores[size_t(row) * n + i]));
        wrong += !(std::fabs(sums[row] - right) < 1e-4 * right);
    }
    std::printf("%d of %d rows wrong\n", wrong, rows);
}
"""
ROWS, ROWS_UNDER_RACECHECK = 4000, 64


def run(kernel: str) -> None:
    """Print how many of 4,000 rows come out wrong."""
    _show(kernel, "wrong")


def racecheck(kernel: str) -> None:
    """Print what compute-sanitizer's racecheck has to say about it."""
    _show(kernel, "racecheck")


def _show(kernel: str, what: str) -> None:
    if _runs_here():
        print(t("race.here", device=_device_name()))
        print(_examine(kernel)[what])
        return
    report = _recorded()
    found = [row[what] for row in report.rows if row["kernel"] == kernel] if report else []
    print(t("times.recorded", source=report.source) if found else t("race.not_recorded"))
    print(*found)


@cache
def _examine(kernel: str) -> dict[str, str]:
    """Compile the kernel with a `main` around it, run that, alone and under racecheck."""
    nvcc = Path(find_nvcc() or "nvcc")
    with tempfile.TemporaryDirectory(prefix="nanopd-race-") as folder:
        Path(folder, "race.cu").write_text(kernel + MAIN, encoding="utf-8")
        errors = _run(folder, str(nvcc), "-O2", "-lineinfo", "-arch=native", "-o", "race", "race.cu")
        if not Path(folder, "race").exists():
            return {"wrong": errors, "racecheck": errors}
        checker = shutil.which("compute-sanitizer") or str(nvcc.parent / "compute-sanitizer")  # the toolkit brings it
        return {"wrong": _run(folder, "./race", str(ROWS)),
                "racecheck": _run(folder, checker, "--tool", "racecheck", "./race", str(ROWS_UNDER_RACECHECK))}


def _run(folder: str, *command: str) -> str:
    """What the command prints, or that it isn't there."""
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", ran.stdout + ran.stderr).strip()


def _runs_here() -> bool:
    import torch

    return torch.cuda.is_available() and find_nvcc() is not None


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _recorded() -> Report | None:
    try:
        return load("racecheck")
    except FileNotFoundError:
        return None


def record(commit: str | None = None) -> Report:
    """Examine both kernels on this machine's GPU."""
    from nanopd.benchmark import environment

    commit, dirty = (commit, None) if commit else environment.commit()
    return Report(
        bench="racecheck", date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command="python -m nanopd.workbook.race", commit=commit, dirty=dirty,
        device=environment.device_facts(), versions=environment.versions(), ceilings={},
        rows=[{"kernel": kernel, **_examine(kernel)} for kernel in (RACY, MENDED)])


if __name__ == "__main__":
    report = record(*sys.argv[1:])
    for row in report.rows:
        print(row["wrong"], row["racecheck"], sep="\n")
    print(report.save())
