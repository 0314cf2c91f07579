"""Checks of chapter 02: seats, admission and the draw, each against the engine's own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from nanopd.block_manager import BlockSpaceManager
from nanopd.config import SchedulerConfig
from nanopd.core import PlanRow, Request, RowResult, SamplingParams, Sequence, SequenceGroup, StepResult
from nanopd.engine.scheduler import Scheduler
from nanopd.workbook.check import exercise, say


def _group(request_id: str, prompt_len: int, max_tokens: int) -> SequenceGroup:
    return SequenceGroup(Request(request_id, [1] * prompt_len, SamplingParams(temperature=0, max_tokens=max_tokens)))


def _run_step(scheduler: Scheduler) -> None:
    """One step with a model that always says 1."""
    plan = scheduler.schedule()
    drawn = [RowResult([1] * row.num_samples, [0.0] * row.num_samples) for row in plan.rows]
    scheduler.commit(plan, StepResult(drawn))


def _steps_of_the_engine(lengths: list[int], seats: int) -> int:
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=seats), BlockSpaceManager(4096, 16))
    for i, length in enumerate(lengths):
        scheduler.add(_group(str(i), 1, length))
    steps = 0
    while scheduler.has_work:
        _run_step(scheduler)
        steps += 1
    return steps


@exercise("02.1", hint_en="Keep, for each seat, the step from which it is free; the next request takes the one free soonest.",
          hint_zh="给每个座位记下从第几步起空闲；下一个请求坐最早空出来的那个。")
def check_steps_equal_the_engines(theirs: Callable[[list[int], int], int]) -> None:
    rng = random.Random(21)
    cases = [([3, 12, 5, 2, 9, 4, 11, 6], 4), ([5], 3), ([4, 4, 4], 1)]
    cases += [([rng.randint(1, 20) for _ in range(rng.randint(1, 15))], rng.randint(1, 5)) for _ in range(20)]
    for lengths, seats in cases:
        expected, got = _steps_of_the_engine(lengths, seats), theirs(list(lengths), seats)
        assert got == expected, say(f"lengths {lengths} on {seats} seats: the engine takes {expected} steps, you say {got}",
                                    f"长度 {lengths}、{seats} 个座位：引擎走 {expected} 步，你的结果是 {got}")


def _admitted_by_the_engine(blocks_needed: list[int], free: int, watermark: int, running: int) -> int:
    """`running` sequences hold a block each; then the others queue up and the scheduler plans one step."""
    num_blocks = free + running
    manager = BlockSpaceManager(num_blocks, 16, enable_prefix_caching=False, watermark=(watermark + 0.5) / num_blocks)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=100_000), manager)
    for i in range(running):
        manager.allocate(Sequence([i]))
    for i, blocks in enumerate(blocks_needed):
        scheduler.add(_group(str(i), blocks * 16 - 1, 8))
    scheduler.schedule()
    return len(scheduler.running)


@exercise("02.4", hint_en="First come, first served: stop at the first that does not fit. The watermark stays free once "
                          "anything runs, and whoever has just come in counts as running.",
          hint_zh="先到先进：遇到第一个放不下的就停。只要有人在跑，水位线就得留出来；刚放进来的也算在跑。")
def check_admission_equals_the_schedulers(theirs: Callable[[list[int], int, int, int], int]) -> None:
    rng = random.Random(24)
    cases = [([10], 10, 2, 0), ([10], 10, 2, 1), ([4, 20, 1], 16, 1, 2), ([3, 3, 3], 9, 1, 0), ([2], 0, 0, 1)]
    cases += [([rng.randint(1, 8) for _ in range(rng.randint(1, 6))], rng.randint(4, 24), rng.randint(0, 3), rng.randint(0, 4))
              for _ in range(30)]
    for needed, free, watermark, running in cases:
        expected, got = _admitted_by_the_engine(needed, free, watermark, running), theirs(list(needed), free, watermark, running)
        assert got == expected, say(
            f"waiting {needed}, {free} free, watermark {watermark}, {running} running: the engine admits {expected}, you {got}",
            f"排队 {needed}、空闲 {free}、水位线 {watermark}、在跑 {running}：引擎放进 {expected} 个，你放进 {got} 个")


def _drawn_by_the_engine(probs: list[float], seed: int, top_k: int, top_p: float) -> tuple[int, float]:
    """The engine's own choice for a request of this seed, and the uniform number it used."""
    import torch

    from nanopd.engine.sampler import sample, uniform

    request = Request("draw", [0], SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p), seed=seed)
    row = PlanRow(Sequence([0]), request, num_new=1, num_cached=0, block_table=[0], num_samples=1)
    logits = torch.tensor([[math.log(p) for p in probs]])
    return sample(logits, [row], frozenset())[0].token_ids[0], uniform(seed, 0, 0)


@exercise("02.5", hint_en="Cut to top_k and scale to 1; keep a token while the sum of those before it is below top_p; then "
                          "walk along the sums of what is kept until they pass u times their total.",
          hint_zh="先截到 top_k 并归一；一个 token 前面各项之和还小于 top_p，就保留它；然后沿着保留项的累加和走，走到超过 u 乘以总和为止。")
def check_draws_equal_the_samplers(theirs: Callable[[list[float], float, int, float], int]) -> None:
    rng = random.Random(25)
    for seed in range(200):
        weights = sorted((rng.random() + 0.01 for _ in range(rng.randint(2, 8))), reverse=True)
        probs = [weight / sum(weights) for weight in weights]
        top_k, top_p = rng.choice([0, 1, 2, 3]), rng.choice([1.0, 0.9, 0.5, 0.2])
        expected, u = _drawn_by_the_engine(probs, seed, top_k, top_p)
        got = theirs(list(probs), u, top_k, top_p)
        shown = [round(p, 3) for p in probs]
        assert got == expected, say(
            f"probabilities {shown}, u {u:.3f}, top_k {top_k}, top_p {top_p}: the engine draws {expected}, you {got}",
            f"概率 {shown}、u {u:.3f}、top_k {top_k}、top_p {top_p}：引擎抽到 {expected}，你抽到 {got}")
