"""Every kernel once under each tool of compute-sanitizer: python tests/gpu/sanitize.py [memcheck racecheck ...]

The cases are small, but have rows of padding, blocks that are partly filled, splits and every type.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanopd.paged_attention.build import find_nvcc, load_kernels

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def run_under(tool: str) -> bool:
    """Whether the tool found nothing."""
    # torch hands out parts of large allocations; the tools know only whole ones
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [_sanitizer(), "--tool", tool, "--error-exitcode", "1", sys.executable, __file__, "--calls"]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(f"{tool}: {'clean' if ran.returncode == 0 else 'NOT clean'}", *ran.stdout.splitlines()[-60:], sep="\n  ", flush=True)
    return ran.returncode == 0


def _sanitizer() -> str:
    beside_nvcc = Path(find_nvcc() or "nvcc").with_name("compute-sanitizer")
    return shutil.which("compute-sanitizer") or str(beside_nvcc)


def calls() -> None:
    import torch
    from test_kernels import DTYPES, AttentionCase, cuda, ints, normal

    assert load_kernels()
    for dtype in DTYPES:
        for head_dim, block_size, group in ((64, 16, 4), (128, 16, 1), (40, 8, 7)):
            shape = dict(head_dim=head_dim, block_size=block_size, group=group, dtype=dtype)
            decodes = AttentionCase([(1, context) for context in (0, 1, 16, 17, 300, 1500)], **shape)
            prefills = AttentionCase([(1, 1), (5, 25), (70, 200), (3, 3)], **shape)
            decodes.decode()
            prefills.prefill()
            prefills.naive()
        case = AttentionCase([(1, 40)] * 3, dtype=dtype)
        qkv, weight = normal(3, 12 * 64, dtype=dtype), normal(64, dtype=dtype)
        rotation = normal(3, 64, dtype=dtype, seed=1), normal(3, 64, dtype=dtype, seed=2)
        cuda.rope_and_store(qkv, rotation, weight, weight, 1e-6, *case.cache, ints([0, -1, 7], torch.int64), 8)
        for size in (63, 64, 1024):
            x = normal(5, 2 * size, dtype=dtype)
            cuda.rms_norm(x, x[0].clone(), 1e-6)
            cuda.silu_and_mul(x)
            cuda.greedy_sample(x)
        cuda.move_blocks(case.key_cache, ints([0, 2], torch.int64), case.value_cache, ints([1, 3], torch.int64))
        cuda.embed(ints([3, -1], torch.int64), ints([0, 2], torch.int64), ints([4], torch.int64), normal(9, 96, dtype=dtype), rotation)
        for tokens in (1, 7, 16, 40, 100):
            x, weight = normal(tokens, 256, dtype=dtype), normal(512, 256, dtype=dtype)
            for silu in (False, True):
                if cuda.linear_supports(x, weight, silu):
                    cuda.linear(x, weight, weight[:, 0].clone(), norm_weight=x[0].clone(), eps=1e-6, silu=silu)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:] == ["--calls"]:
        calls()
    else:
        with ThreadPoolExecutor() as pool:
            sys.exit(not all(list(pool.map(run_under, sys.argv[1:] or TOOLS))))
