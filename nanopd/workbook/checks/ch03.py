"""Checks of chapter 03: attention through a block table, the number of splits, and the merge, in Python and in CUDA."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopd.paged_attention import reference
from nanopd.paged_attention.batch import AttentionBatch
from nanopd.workbook.check import exercise, say


def _close(got: Any, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return (isinstance(got, Tensor) and got.shape == expected.shape
            and bool(((got - expected).abs() <= tolerance * (1 + expected.abs())).all()))


# ---------------------------------------------------------------------------------------- 03.2, the block table


def _row(rng: random.Random, context: int, block_size: int, kv_heads: int, group: int, head_dim: int,
         ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A query, a cache that is NaN wherever no token of the row lies, and a block table in no order."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    num_blocks = -(-context // block_size)
    table = rng.sample(range(num_blocks + 3), num_blocks)
    keys, values = (torch.full((num_blocks + 3, block_size, kv_heads, head_dim), math.nan) for _ in range(2))
    for position in range(context):
        for cache in (keys, values):
            cache[table[position // block_size], position % block_size] = torch.randn(kv_heads, head_dim, generator=generator)
    return torch.randn(kv_heads * group, head_dim, generator=generator), keys, values, table


@exercise("03.2", hint_en="Position p lies in block table[p // block_size], at p % block_size. Gather the context's keys and "
                          "values, no more; query head h reads KV head h // (heads // kv_heads).",
          hint_zh="位置 p 在块 table[p // block_size] 的第 p % block_size 格。只收集上下文之内的键和值，多一格也不要；"
                  "查询头 h 读的是 KV 头 h // (heads // kv_heads)。")
def check_attention_equals_the_reference(theirs: Callable[..., Tensor]) -> None:
    rng = random.Random(32)
    for context, block_size, kv_heads, group in ((10, 4, 1, 1), (16, 16, 1, 1), (1, 4, 2, 2), (33, 8, 2, 3), (100, 16, 4, 2)):
        query, keys, values, table = _row(rng, context, block_size, kv_heads, group, head_dim=8)
        batch = AttentionBatch(torch.empty(0, dtype=torch.int64), torch.tensor([table], dtype=torch.int32), [1], [context])
        expected = reference.paged_attention(query[None], keys, values, batch, scale=8**-0.5)[0]
        got = theirs(query, keys, values, list(table), context, 8**-0.5)
        where_en = f"context {context}, blocks of {block_size}, {kv_heads} KV heads, {kv_heads * group} query heads"
        where_zh = f"上下文 {context}、块大小 {block_size}、{kv_heads} 个 KV 头、{kv_heads * group} 个查询头"
        assert not (isinstance(got, Tensor) and got.isnan().any()), say(
            f"{where_en}: NaN. A slot past the context was read: nobody has written there",
            f"{where_zh}：结果里有 NaN。读到了上下文之外的格子，那里没人写过")
        assert _close(got, expected), say(f"{where_en}: not what the reference gives", f"{where_zh}：和参考实现的结果不一样")


# ---------------------------------------------------------------------------------------------- 03.4, splits


def _cost(num_sms: int, ctas_unsplit: int, num_blocks: int, splits: int) -> int:
    return math.ceil(ctas_unsplit * splits / num_sms) * math.ceil(num_blocks / splits)


@exercise("03.4", hint_en="For each number of splits from 1 to num_blocks: waves times the blocks of the longest split. min() "
                          "over that gives the first of equals, which is the smallest.",
          hint_zh="切分数从 1 试到 num_blocks，每个都算一遍：波数乘以最长那一份的块数。min() 遇到并列时取第一个，也就是最小的切分数。")
def check_splits_are_the_best_of_the_model(theirs: Callable[[int, int, int, int], int]) -> None:
    rng = random.Random(34)
    cases = [(132, 1, 8, 1024), (132, 64, 8, 64), (132, 16, 8, 256), (108, 1, 1, 4), (4, 1, 1, 8)]
    cases += [(rng.choice([46, 84, 108, 132]), rng.randint(1, 20), rng.choice([1, 2, 8]), rng.randint(1, 300)) for _ in range(20)]
    for num_sms, batch, kv_heads, num_blocks in cases:
        costs = {n: _cost(num_sms, batch * kv_heads, num_blocks, n) for n in range(1, num_blocks + 1)}
        expected = min(costs, key=lambda n: costs[n])
        got = theirs(num_sms, batch, kv_heads, num_blocks)
        assert got == expected, say(
            f"{num_sms} SMs, batch {batch}, {kv_heads} KV heads, {num_blocks} blocks: {expected} splits cost "
            f"{costs[expected]} blocks of time, you say {got}" + (f", which costs {costs[got]}" if got in costs else ""),
            f"{num_sms} 个 SM、批大小 {batch}、{kv_heads} 个 KV 头、{num_blocks} 个块：切成 {expected} 份只要 "
            f"{costs[expected]} 块的时间，你的结果是 {got}" + (f"，要 {costs[got]} 块的时间" if got in costs else ""))


# ----------------------------------------------------------------------------------------------- 03.5, merge


def _splits(generator: torch.Generator, num_splits: int, heads: int, head_dim: int, spread: float,
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and log-sum-exps of splits of unequal length, and the attention over all of them at once."""
    lengths = torch.randint(1, 9, (num_splits,), generator=generator).tolist()
    scores = spread * torch.randn(heads, sum(lengths), generator=generator, dtype=torch.float64)
    values = torch.randn(heads, sum(lengths), head_dim, generator=generator, dtype=torch.float64)
    outputs, lses = [], []
    for part, value in zip(scores.split(lengths, 1), values.split(lengths, 1)):
        outputs.append(torch.einsum("hs,hsd->hd", part.softmax(1), value))
        lses.append(part.logsumexp(1))
    whole = torch.einsum("hs,hsd->hd", scores.softmax(1), values)
    return torch.stack(outputs).float(), torch.stack(lses).float(), whole.float()


@exercise("03.5", hint_en="A split weighs exp(its lse - the largest lse), divided by the sum of those over all splits.",
          hint_zh="每一份的权重是 exp(它的 lse − 最大的 lse)，再除以所有份的这个数之和。")
def check_the_merge_gives_the_whole(theirs: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(35)
    for num_splits, heads, head_dim in ((1, 1, 1), (2, 1, 4), (3, 4, 8), (17, 2, 16)):
        outputs, lses, whole = _splits(generator, num_splits, heads, head_dim, spread=1.0)
        assert _close(theirs(outputs, lses), whole), say(
            f"{num_splits} splits, {heads} heads: not the attention over all keys",
            f"{num_splits} 份、{heads} 个头：和对全部键做的注意力不一致")


@exercise("03.5", hint_en="exp(200) is too large for a float32. Subtract the largest log-sum-exp before you take exp.",
          hint_zh="exp(200) 超出了 float32 的范围。取 exp 之前，先减去最大的 log-sum-exp。")
def check_large_scores_do_not_overflow(theirs: Callable[[Tensor, Tensor], Tensor]) -> None:
    for shift in (-1000.0, 200.0, 1000.0):
        outputs, lses = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]]), torch.tensor([[shift], [shift]])
        assert _close(theirs(outputs, lses), torch.tensor([[2.0, 4.0]])), say(
            f"two equal splits with log-sum-exp {shift:.0f}: their mean was expected, got {theirs(outputs, lses).tolist()}",
            f"两份相等、log-sum-exp 都是 {shift:.0f}：应得两者的平均，得到 {theirs(outputs, lses).tolist()}")


# --------------------------------------------------------------------------------- 03.5b, the same in CUDA


# Enough of CUDA for a kernel without barriers and shared memory: its threads run one after the other, on the CPU.
CPU_CUDA = """
#include <cmath>
#include <cstdint>
using namespace std;
#define __global__ static
#define __device__ static
#define __expf expf
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;
"""
RUN_ON_CPU = """
extern "C" int run(float* out, const float* outputs, const float* lses, int splits, int heads, int head_dim) {
    gridDim = {unsigned(heads), 1, 1};
    blockDim = {unsigned(head_dim), 1, 1};
    for (blockIdx = {0, 0, 0}; blockIdx.x < gridDim.x; ++blockIdx.x)
        for (threadIdx = {0, 0, 0}; threadIdx.x < blockDim.x; ++threadIdx.x) merge_splits(out, outputs, lses, splits);
    return 0;
}
"""
RUN_ON_GPU = """
extern "C" int run(float* out, const float* outputs, const float* lses, int splits, int heads, int head_dim) {
    merge_splits<<<heads, head_dim>>>(out, outputs, lses, splits);
    cudaError_t launched = cudaGetLastError(), ran = cudaDeviceSynchronize();
    return launched != cudaSuccess ? launched : ran;
}
"""


def _build_for_cpu(source: str, compiler: str) -> ctypes.CDLL:
    text = CPU_CUDA + "#line 1 \"merge\"\n" + source + RUN_ON_CPU
    folder = Path(tempfile.mkdtemp(prefix="nanopd-merge-"))
    library = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    try:
        ran = subprocess.run([compiler, "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library), "-"],
                             input=text, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, _does_not_compile(ran.stderr)
        return ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(folder)


def _does_not_compile(words: str) -> str:
    errors = "\n".join(([line for line in words.splitlines() if "error" in line] or words.splitlines())[:3])
    return say(f"it does not compile:\n{errors}", f"编译不过：\n{errors}")


def _cpp_compiler() -> str | None:
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)


def _build(source: str) -> tuple[ctypes.CDLL, torch.device]:
    """For the GPU where there is one and nvcc, else for the CPU by its compiler."""
    from nanopd.paged_attention import build

    if torch.cuda.is_available() and build.find_nvcc():
        try:
            return build.compile_shared(source + RUN_ON_GPU, "merge"), torch.device("cuda")
        except build.BuildError as error:
            raise AssertionError(_does_not_compile(str(error))) from error
    compiler = _cpp_compiler()
    assert compiler, say("there is neither a GPU with nvcc nor a C++ compiler here to compile it. Install one (Debian: apt-get "
                         "install g++); exercise 03.5 is the same in Python",
                         "这里既没有带 nvcc 的 GPU，也没有能编译它的 C++ 编译器。请装一个（Debian：apt-get install g++）；"
                         "练习 03.5 是它的 Python 版")
    return _build_for_cpu(source, compiler), torch.device("cpu")


def _merged_by(library: ctypes.CDLL, device: torch.device, outputs: Tensor, lses: Tensor) -> Tensor:
    """What the learner's kernel makes of outputs [heads, splits, head_dim], in a result that starts as NaN."""
    heads, splits, head_dim = outputs.shape
    tensors = [torch.full((heads, head_dim), math.nan, device=device), outputs.to(device).contiguous(), lses.to(device).contiguous()]
    if device.type == "cuda":
        torch.cuda.synchronize()
    error = library.run(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), splits, heads, head_dim)
    assert error == 0, say(f"CUDA error {error}", f"CUDA 错误 {error}")
    return tensors[0].cpu()


def _cases() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(36)
    for num_splits, heads, head_dim, spread in ((1, 1, 32, 1.0), (2, 3, 64, 1.0), (7, 32, 128, 1.0), (33, 8, 128, 4.0)):
        outputs, lses, whole = _splits(generator, num_splits, heads, head_dim, spread)
        yield outputs.transpose(0, 1), lses.T, whole
    shift = 500.0
    yield torch.tensor([[[1.0] * 32, [3.0] * 32]]), torch.tensor([[shift, shift]]), torch.full((1, 32), 2.0)


@exercise("03.5b", hint_en="The same three steps as in 03.5, as loops over the splits: the largest lse, the sum of the weights, "
                          "the weighted sum of this thread's number. One expf for each split is enough.",
          hint_zh="和 03.5 一样的三步，写成对各份的循环：最大的 lse，权重之和，本线程那个数的加权和。每一份只需一次 expf。")
def check_the_kernel_merges(theirs: str) -> None:
    if "raise NotImplementedError" in theirs:
        raise NotImplementedError
    library, device = _build(theirs)
    for outputs, lses, whole in _cases():
        got = _merged_by(library, device, outputs, lses)
        heads, splits, head_dim = outputs.shape
        assert _close(got, whole), say(
            f"{heads} heads, {splits} splits of {head_dim} numbers: not the attention over all keys" +
            (" (some numbers were never written)" if got.isnan().any() else ""),
            f"{heads} 个头、{splits} 份、每份 {head_dim} 个数：和对全部键做的注意力不一致" +
            ("（有的数从来没写过）" if got.isnan().any() else ""))
