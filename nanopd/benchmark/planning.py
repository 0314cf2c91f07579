"""What the scheduler costs: CPU time to plan a step and to take in its result, in steady decode. No torch."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable
from typing import Any

from nanopd.benchmark.show import progress
from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.config import SchedulerConfig
from nanopd.core import Request, RowResult, SamplingParams, SequenceGroup, StepPlan, StepResult
from nanopd.engine.scheduler import Scheduler

BLOCK_SIZE = 16
WARM_UP = 20
BATCHES = (1, 4, 16, 64, 256)


def run(batches: Iterable[int] = BATCHES, context: int = 1024, steps: int = 200) -> list[dict[str, Any]]:
    """A row for each batch size: microseconds of a step's planning and committing, the median and the 99th percentile."""
    rows = []
    for batch in batches:
        progress(f"scheduler: {batch} sequences")
        schedule, commit = _step_times(_decoding(batch, context, WARM_UP + steps), batch, steps)
        both = [planning + committing for planning, committing in zip(schedule, commit)]
        rows.append({"batch": batch, "context": context, "schedule_us": statistics.median(schedule),
                     "commit_us": statistics.median(commit), "step_us": statistics.median(both),
                     "step_p99_us": sorted(both)[int(0.99 * (len(both) - 1))]})
    return rows


def _decoding(batch: int, context: int, steps: int) -> Scheduler:
    """A scheduler whose sequences have all been read. Their lengths differ, so that they fill their blocks in turn."""
    longest = context + BLOCK_SIZE + steps + 4
    manager = BlockSpaceManager(batch * (longest // BLOCK_SIZE + 2), BLOCK_SIZE)
    scheduler = Scheduler(SchedulerConfig(batch, batch * longest, max_model_len=longest + 1), manager)
    draw = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=steps + 4, ignore_eos=True)
    for i in range(batch):
        prompt = [draw.randrange(1000) for _ in range(context + i % BLOCK_SIZE)]
        scheduler.add(SequenceGroup(Request(str(i), prompt, params)))
    plan = scheduler.schedule()  # all prompts at once: the budget allows it
    scheduler.commit(plan, _drawn(plan))
    return scheduler


def _step_times(scheduler: Scheduler, batch: int, steps: int) -> tuple[list[float], list[float]]:
    """As the engine does beside a GPU: the next step is planned before the tokens of this one are known."""
    schedule, commit = [], []
    plan = scheduler.schedule()
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        ahead = scheduler.schedule_ahead(plan)
        planned = time.perf_counter()
        result = _drawn(plan)
        drawn = time.perf_counter()
        scheduler.commit(plan, result)
        end = time.perf_counter()
        assert ahead is not None and len(ahead.rows) == batch
        plan = ahead
        schedule.append((planned - start) * 1e6)
        commit.append((end - drawn) * 1e6)
    return schedule[WARM_UP:], commit[WARM_UP:]


def _drawn(plan: StepPlan) -> StepResult:
    """What a model would have said: always the same token."""
    return StepResult([RowResult([7] * row.num_samples, [0.0] * row.num_samples) for row in plan.rows])
