"""Many steps at once, where nothing is decided: nobody comes, ends or is sent back to wait, and every sequence writes on."""

from __future__ import annotations

from bisect import bisect_right

from nanopd.core import Phase, Sequence, StepPlan, TokenEvent
from nanopd.cost_model.analytical import StepWork
from nanopd.engine.engine import Engine
from nanopd.simulator.cost_runner import TOKEN, CostRunner, LaunchingCostRunner

LONGEST = 64  # steps; a message cuts a leap short, and the costs of what is cut were reckoned for nothing


class Leap:
    """The next `num_steps` steps of an engine: their times are known, and nothing of them has been carried out.

    It may still be cut short. `land` carries out what is left: afterwards all is as after as many single steps. So where the
    engine had begun the first of them ahead, it then has the one after the last.
    """

    def __init__(self, engine: Engine, now: float, num_steps: int) -> None:
        self._engine = engine
        self._runner: CostRunner = engine.runner
        self._sequences = [sequence for entry in engine.scheduler.running for sequence in entry.group.sequences]
        self._counted = now  # until then the runner has counted itself busy
        self._ends = self._reckon(now, num_steps)

    @property
    def end(self) -> float:
        return self._ends[-1]

    def cut(self, now: float) -> None:
        """Let the step that runs at `now` be the last."""
        del self._ends[bisect_right(self._ends, now) + 1 :]

    def land(self) -> list[TokenEvent]:
        """Carry it out. Returns the tokens drawn, each with the time of its step."""
        engine, num_steps = self._engine, len(self._ends)
        manager, ahead = engine.scheduler.manager, engine.ahead
        for sequence in self._sequences:
            manager.append_slot(sequence, num_steps + (ahead is not None))
            sequence.token_ids += [TOKEN] * num_steps
            sequence.logprobs += [0.0] * num_steps
            sequence.num_computed += num_steps
            manager.commit(sequence)
        engine.num_steps += num_steps
        self._runner.busy += self.end - self._counted
        if ahead is not None:
            for row in ahead.plan.rows:
                row.num_cached += num_steps
            self._runner.free = self.end
            ahead.wait = self._runner.launch(ahead.plan)
        return [TokenEvent(sequence.request_id, sequence.index, TOKEN, time=end)
                for end in self._ends for sequence in self._sequences]

    def _reckon(self, now: float, num_steps: int) -> list[float]:
        """When each step ends."""
        step_seconds, ends, decodes = self._runner.costs.step_seconds, [], len(self._sequences)
        context_tokens = sum(sequence.num_computed for sequence in self._sequences)
        for _ in range(num_steps):
            context_tokens += decodes
            if self._engine.ahead is not None and not ends:
                now = self._counted = max(now, self._runner.free)
            else:
                now += step_seconds(StepWork(decodes=decodes, context_tokens=context_tokens))
            ends.append(now)
        return ends


def steps_alike(engine: Engine) -> int:
    """How many steps lie ahead, LONGEST at most, in which nothing is decided. 0 where the next one decides something."""
    scheduler, ahead = engine.scheduler, engine.ahead
    sequences = [sequence for entry in scheduler.running for sequence in entry.group.sequences]
    if not sequences or any(sequence.phase is not Phase.DECODE for sequence in sequences):
        return 0
    is_seat_free = len(sequences) < scheduler.config.max_num_seqs
    if scheduler.waiting and is_seat_free and scheduler.manager.can_allocate(scheduler.waiting[0].group.live[0]):
        return 0  # it is let in; one that finds no blocks won't find any before somebody ends
    if isinstance(engine.runner, LaunchingCostRunner) and (ahead is None or not _runs_just(ahead.plan, sequences)):
        return 0  # it is about to begin the next step ahead, or somebody joins or leaves with that
    last_len = engine.runner.last_len
    return _until_blocks_run_out(engine, sequences, min(last_len(one) - len(one) for one in sequences) - 1)


def _runs_just(plan: StepPlan, sequences: list[Sequence]) -> bool:
    """A step begun ahead may hold a row of an answer that has ended meanwhile."""
    return len(plan.rows) == len(sequences) and all(row.sequence.phase is Phase.DECODE for row in plan.rows)


def _until_blocks_run_out(engine: Engine, sequences: list[Sequence], most: int) -> int:
    """A lower bound of the steps that find blocks. Another step is begun ahead only where each sequence could take a block."""
    manager, ahead = engine.scheduler.manager, engine.ahead is not None
    num_steps, free = min(LONGEST, most), manager.num_free_blocks - (len(sequences) if ahead else 0)
    while num_steps > 0 and sum(manager.blocks_to_append(one, num_steps + ahead) for one in sequences) > free:
        num_steps //= 2
    return num_steps
