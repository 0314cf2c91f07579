"""The CUDA sources without a GPU: they compile for every kind of it, and the library loads and knows its limits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanopd.paged_attention import build

pytestmark = [pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc"), pytest.mark.timeout(600)]
SOURCES = [path for path in build.cuda_sources() if path.suffix in (".cu", ".cpp")]
SLOWEST_FIRST = sorted(SOURCES, key=lambda path: path.stat().st_size, reverse=True)
DECODE = "decode_attention"


@dataclass(frozen=True)
class Compiled:
    object: Path
    code: int
    said: str


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    """Every source for 8.0, 8.9 and 9.0, by its stem."""
    folder = tmp_path_factory.mktemp("objects")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(lambda path: (path.stem, _compile(path, folder)), SLOWEST_FIRST))


def _compile(source: Path, folder: Path) -> Compiled:
    target = folder / f"{source.stem}.o"
    # 8.9 has no instructions of its own here, so it shares the front end's work with 8.0
    architectures = ["-gencode=arch=compute_80,code=[sm_80,sm_89]", *build.arch_flags(["90a"])]
    # only where registers are counted is the compiler asked to do its best, which takes it long
    effort = ["-Xptxas", "-v"] if source.stem == DECODE else ["-Xcicc", "-O1", "-Xptxas", "-O1"]
    command = [build.find_nvcc(), *build.NVCC_FLAGS, *architectures, *effort, *build.torch_flags(), "-c", str(source), "-o", str(target)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return Compiled(target, ran.returncode, ran.stdout + ran.stderr)


@pytest.mark.parametrize("name", [path.stem for path in SOURCES])
def test_compiles_without_a_complaint(compiled, name):
    assert compiled[name].code == 0, compiled[name].said
    assert "error" not in compiled[name].said
    complaints = [line for line in compiled[name].said.splitlines() if "warning" in line]
    assert all("declared but never referenced" in line for line in complaints if "Remark" not in line), compiled[name].said


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_the_decode_kernel_s_main_instances_do_not_spill(compiled, arch):
    spills = {}
    for kernel, where, spilled in re.findall(r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores",
                                             compiled[DECODE].said, re.DOTALL):
        if where == arch and re.search(r"attend.*(__half|__nv_bfloat16).*Li(64|128)E", kernel):
            spills[kernel] = int(spilled)
    assert len(spills) >= 4, "the kernel's name has changed?"
    assert not any(spills.values()), spills


def test_the_library_loads_on_any_torch_and_refuses_cpu_tensors_in_words(compiled, tmp_path):
    """Every function of cuda.py is called, so that its arguments and the operator's cannot drift apart unseen."""
    library = tmp_path / "kernels.so"
    objects = [str(result.object) for result in compiled.values()]
    subprocess.run([build.find_nvcc(), "-shared", "-cudart", "static", *objects, "-o", str(library), *build.link_flags()],
                   check=True, timeout=120)
    code = f"""
        import torch
        torch.ops.load_library({str(library)!r})
        from nanopd.paged_attention import cuda
        cuda.usable = lambda x: True
        cuda._scratch = lambda device, size: torch.empty(size, dtype=torch.uint8)  # asks whether a graph is recorded
        x = torch.ones(2, 8)
        cache, query, qkv, turn = torch.ones(4, 8, 1, 32), torch.ones(2, 1, 32), torch.ones(2, 96), torch.ones(2, 32)
        ids, ints = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int32)
        tables, starts, plan = ints[:, None], torch.arange(3, dtype=torch.int32), torch.zeros(99, dtype=torch.uint8)
        for call in (
            lambda: cuda.rms_norm(x, x[0], 1e-6), lambda: cuda.silu_and_mul(x), lambda: cuda.greedy_sample(x),
            lambda: cuda.linear(x, x), lambda: cuda.linear_supports(x, x, True), lambda: cuda.move_blocks(cache, None, cache, None),
            lambda: cuda.embed(ids, ids, ids, x, (turn, turn)),
            lambda: cuda.rope_and_store(qkv, (turn, turn), None, None, 0.0, cache, cache, ids, 1),
            lambda: cuda.plan_decode(ints, cache, 1),
            lambda: cuda.naive_attention(query, query, cache, cache, tables, starts, ints, 1.0),
            lambda: cuda.decode_attention(query, query, cache, cache, tables, ints, plan, 1.0),
            lambda: cuda.prefill_attention(query, query, cache, cache, tables, starts, ints, 1, 1.0),
        ):
            try:
                call()
            except RuntimeError as error:
                print(error)
        schemas = [str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("nanopd::")]
        print(len(schemas))
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=build.PACKAGE.parent,
                         check=False)
    assert ran.returncode == 0, ran.stderr
    *refusals, count = ran.stdout.splitlines()
    assert [line.split(" must be on a CUDA device")[0] for line in refusals] == [
        "x", "gate_up", "logits", "x", "x", "target", "weight", "key_cache", "context_lens", *["key_cache"] * 3]
    bindings = next(path for path in SOURCES if path.name == "bindings.cpp").read_text()
    assert int(count) == bindings.count("m.def(") == bindings.count("m.impl(")
