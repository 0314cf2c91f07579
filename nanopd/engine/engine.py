"""The engine: schedule, execute, commit. Token ids in, token events out; no text and no torch in here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from nanopd.core import (
    FinishReason,
    Request,
    RowRecord,
    SequenceGroup,
    StepPlan,
    StepRecord,
    StepResult,
    TokenEvent,
)
from nanopd.engine.limits import Limits
from nanopd.engine.scheduler import Scheduler, Update
from nanopd.interrupts import interruptible

STEPS_KEPT = 4096
OnLayer = Callable[[int], None]


class Runner(Protocol):
    """Executes one step. `on_layer(i)` is called once layer i's keys and values of the step are in the cache.

    A runner whose device works on its own also has `launch`, with the same arguments: it queues the step and returns
    a function that waits for the result. The engine then plans the next step meanwhile.
    """

    def execute(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult: ...


@dataclass
class RunningStep:
    """A step that has begun. `wait` gives its result, or raises what went wrong."""

    plan: StepPlan
    wait: Callable[[], StepResult]
    draws: bool = True  # False: the runner refused it, so nothing can be planned on what it draws


class Engine:
    """Serves requests in continuous batches on one device.

    `layer_hook(plan)` gives what is to be called as each layer of the step has been stored, for a transfer to start
    from there, or None. `clock` gives seconds: tokens and steps are dated by it, and all that a worker around it does.
    The records of the last `steps_kept` steps are there to look at.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, limits: Limits,
                 layer_hook: Callable[[StepPlan], OnLayer | None] | None = None,
                 clock: Callable[[], float] = time.monotonic, steps_kept: int = STEPS_KEPT) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.limits = limits
        self.layer_hook = layer_hook
        self.clock = clock
        self.history: deque[StepRecord] = deque(maxlen=steps_kept)
        self.num_steps = 0
        self.ahead: RunningStep | None = None  # begun before the result of the step before it was known
        self._abandoned: RunningStep | None = None  # begun like that, and nobody is left to take what it draws

    def add(self, request: Request, *, handoff: bool = False) -> None:
        """Queue a request. Raises InvalidRequest if this engine could never serve it."""
        self.limits.check(request)
        self.add_group(SequenceGroup(request, handoff=handoff))

    def add_group(self, group: SequenceGroup) -> None:
        """Queue a request that `limits` allow, as somebody has seen to. Something may be written already: that is recomputed,
        and the answers go on."""
        if self.scheduler.find(group.request_id) is not None:
            raise ValueError(f"request {group.request_id!r} is being served already")
        self.scheduler.add(group)

    def step(self) -> list[TokenEvent]:
        """Run one step. Returns the tokens drawn in it; none if there was nothing that could run.

        Where the runner can, the step after it is planned and queued meanwhile, so that the device never waits.
        """
        step, self.ahead = self.ahead or self._begin(self.scheduler.schedule()), None
        if step is None:
            return []
        try:
            if step.draws and hasattr(self.runner, "launch"):
                self.ahead = self._begin(self.scheduler.schedule_ahead(step.plan))
            with interruptible():
                result = step.wait()
        except Exception as error:  # whatever broke, the requests of this step get to know and the others go on
            return self._fail_step(step.plan, error)
        except BaseException:  # Ctrl-C: who is served on afterwards must not miss what this step would have written
            self._withdraw(step)
            raise
        broken = self._fail_broken_rows(step.plan, result)
        updates = self.scheduler.commit(step.plan, result)
        now = self.clock()
        self._record(step.plan, result, now)
        if self.ahead and all(row.sequence.finished for row in self.ahead.plan.rows):
            self._abandoned, self.ahead = self.ahead, None
        return broken + [self._event(update, now) for update in updates]

    def _begin(self, plan: StepPlan | None) -> RunningStep | None:
        """Hand a plan to the runner. A runner that has no `launch` executes it as it is waited for."""
        if not plan:
            return None
        on_layer = self._on_layer(plan)
        if not hasattr(self.runner, "launch"):
            return RunningStep(plan, lambda: self.runner.execute(plan, on_layer))
        try:
            return RunningStep(plan, self.runner.launch(plan, on_layer))
        except Exception as error:
            return RunningStep(plan, partial(_raise, error), draws=False)
        except BaseException:
            self.scheduler.withdraw(plan)
            raise

    def _withdraw(self, step: RunningStep) -> None:
        for running in (step, self.ahead):
            if running is not None:
                self.scheduler.withdraw(running.plan)
        self.ahead = None

    def quiesce(self) -> None:
        """Wait for an abandoned step: it still writes to blocks that are free by now.

        On this device whatever is queued later runs later. Before such blocks go to another one, call this.
        """
        step, self._abandoned = self._abandoned, None
        if step is not None:
            with suppress(Exception):  # its requests have ended: nobody is interested
                step.wait()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.ahead is not None

    def cancel(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """End a request, or one of the answers it has begun. Its blocks are free when this returns."""
        return self._end(request_id, FinishReason.ABORT, index=index)

    def fail(self, request_id: str, message: str) -> list[TokenEvent]:
        """End a request with an error."""
        return self._end(request_id, FinishReason.ERROR, error=message)

    def _end(self, request_id: str, reason: FinishReason, *, index: int | None = None,
             error: str | None = None) -> list[TokenEvent]:
        group = self.scheduler.find(request_id)
        if group is None:
            return []
        ended = group.open_answers
        stopped = self.scheduler.cancel(request_id, reason, index)
        if index is not None:
            ended = [sequence.index for sequence in stopped]
        now = self.clock()
        return [TokenEvent(request_id, i, finish_reason=reason, error=error, time=now) for i in ended]

    def _on_layer(self, plan: StepPlan) -> OnLayer | None:
        return None if self.layer_hook is None else self.layer_hook(plan)

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[TokenEvent]:
        message = f"{type(error).__name__}: {error}"
        request_ids = dict.fromkeys(row.request.request_id for row in plan.rows if not row.sequence.finished)
        return [event for request_id in request_ids for event in self.fail(request_id, message)]

    def _fail_broken_rows(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for row, drawn in zip(plan.rows, result.rows, strict=True):
            if drawn.error is not None and not row.sequence.finished:
                events += self.fail(row.request.request_id, drawn.error)
        return events

    @staticmethod
    def _event(update: Update, now: float) -> TokenEvent:
        sequence = update.sequence
        return TokenEvent(
            sequence.request_id, sequence.index, update.token_id, logprob=update.logprob,
            top_logprobs=update.top_logprobs or None, finish_reason=update.finish_reason,
            stop_reason=update.stop_reason, time=now)

    def _record(self, plan: StepPlan, result: StepResult, end: float) -> None:
        self.num_steps += 1
        if not self.history.maxlen:  # a simulation of many workers keeps none
            return
        rows = tuple(RowRecord(row.request.request_id, row.sequence.index, row.kind, row.num_new, row.num_cached)
                     for row in plan.rows)
        self.history.append(StepRecord(
            self.num_steps - 1, end - result.duration, rows, tuple(plan.preempted), len(self.scheduler.waiting),
            self.scheduler.manager.num_free_blocks, len(plan.copies), result.duration,
            num_drafts=sum(row.num_drafts for row in plan.rows), num_accepted=sum(row.num_accepted for row in plan.rows)))


def _raise(error: Exception) -> StepResult:
    raise error
