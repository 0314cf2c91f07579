"""Checks of chapter 00: intensity, chunks, and the size of a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanopd.block_manager import BlockSpaceManager
from nanopd.config import ModelSpec, SchedulerConfig
from nanopd.core import Request, RowResult, SamplingParams, SequenceGroup, StepResult
from nanopd.engine.scheduler import Scheduler
from nanopd.workbook.check import exercise, say


def _about(got: Any, expected: float) -> bool:
    return abs(got - expected) <= 1e-9 * abs(expected)


@exercise("00.3", hint_en="A multiplication and an addition for each parameter and token; each parameter is moved once.",
          hint_zh="每个参数对每个 token 做一次乘法和一次加法；每个参数只搬一次。")
def check_intensity_of_decode_and_prefill(theirs: Callable[[int, int, int], float]) -> None:
    for num_params, width, tokens, expected in ((1000, 2, 1, 1), (8_190_000_000, 2, 1024, 1024), (4096, 4, 256, 128)):
        got = theirs(num_params, width, tokens)
        assert got is not None and _about(got, expected), say(
            f"{num_params:,} parameters of {width} bytes, {tokens} tokens: {expected} operations a byte, got {got}",
            f"{num_params:,} 个参数、每个 {width} 字节、{tokens} 个 token：每字节应为 {expected} 次运算，得到 {got}")


def _chunks_of_the_engine(prompt_len: int, budget: int, num_decoding: int) -> list[int]:
    """What the real scheduler does: let `num_decoding` sequences decode, then add the prompt."""
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=budget, max_num_batched_tokens=budget), BlockSpaceManager(4096, 16))
    forever = SamplingParams(temperature=0, max_tokens=None)

    def step() -> list[int]:
        plan = scheduler.schedule()
        drawn = [RowResult([1] * row.num_samples, [0.0] * row.num_samples) for row in plan.rows]
        scheduler.commit(plan, StepResult(drawn))
        return [row.num_new for row in plan.rows if row.request.request_id == "prompt" and row.kind == "prefill"]

    for i in range(num_decoding):
        scheduler.add(SequenceGroup(Request(str(i), [1], forever)))
    step()
    scheduler.add(SequenceGroup(Request("prompt", list(range(prompt_len)), forever)))
    chunks: list[int] = []
    while sum(chunks) < prompt_len:
        chunks += step()
    return chunks


@exercise("00.4", hint_en="What is left of the budget after the decodes is the longest chunk; the last one may be shorter, "
                          "and there is no empty one.",
          hint_zh="预算扣掉解码占去的部分，就是最长的分块；最后一个分块可以短一些，但不会有空的。")
def check_chunks_equal_the_schedulers(theirs: Callable[[int, int, int], list[int]]) -> None:
    for prompt_len, budget, decoding in ((1000, 256, 0), (1000, 256, 8), (512, 128, 0), (5, 64, 63), (3, 64, 2)):
        expected = _chunks_of_the_engine(prompt_len, budget, decoding)
        got = theirs(prompt_len, budget, decoding)
        assert got == expected, say(
            f"{prompt_len} tokens, budget {budget}, {decoding} decoding: the engine runs {expected}, you say {got}",
            f"{prompt_len} 个 token、预算 {budget}、{decoding} 条在解码：引擎实际跑的是 {expected}，你的结果是 {got}")


@exercise("00.5", hint_en="A key and a value, for each token, layer and KV head, of head_dim elements.",
          hint_zh="每个 token、每一层、每个 KV 头各有一个键和一个值，长度都是 head_dim。")
def check_kv_bytes_equal_the_specs(theirs: Callable[[ModelSpec, int, int], int]) -> None:
    for layers, kv_heads, head_dim in ((36, 8, 128), (5, 2, 64), (28, 2, 128)):
        spec = ModelSpec("qwen3", 1000, 64, 64, layers, 4 * kv_heads, kv_heads, head_dim, 4096)
        for tokens, width in ((1, 2), (1000, 4)):
            expected = tokens * spec.kv_bytes_per_token(width)
            got = theirs(spec, tokens, width)
            assert got == expected, say(
                f"{layers} layers, {kv_heads} KV heads of {head_dim}, {tokens} tokens, {width} bytes a number: "
                f"{expected:,} bytes, got {got}",
                f"{layers} 层、{kv_heads} 个 KV 头、每头 {head_dim}、{tokens} 个 token、每个数 {width} 字节："
                f"应为 {expected:,} 字节，得到 {got}")
