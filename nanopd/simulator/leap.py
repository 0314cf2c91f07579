"""Many steps at once, where nothing is decided: nobody comes, ends or is sent back to wait, and every sequence writes on."""

from __future__ import annotations

from bisect import bisect_right

from nanopd.core import Phase, PlanRow, TokenEvent
from nanopd.engine.engine import Engine
from nanopd.engine.scheduler import Scheduler
from nanopd.simulator.cost_runner import TOKEN, CostRunner

LONGEST = 64  # steps; a message cuts a leap short, and the costs of what is cut were reckoned for nothing


class Leap:
    """The next `num_steps` steps of an engine: their times are known, and nothing of them has been carried out.

    It may still be cut short. `land` carries out what is left: afterwards all is as after as many single steps.
    """

    def __init__(self, engine: Engine, start: float, num_steps: int) -> None:
        self._engine = engine
        self._rows = [PlanRow(sequence, entry.group.request, 1, sequence.num_computed, [], num_samples=1)
                      for entry in engine.scheduler.running for sequence in entry.group.sequences]
        self._start = start
        self._ends = self._reckon(start, num_steps)

    @property
    def end(self) -> float:
        return self._ends[-1]

    def cut(self, now: float) -> None:
        """Let the step that runs at `now` be the last."""
        del self._ends[bisect_right(self._ends, now) + 1 :]

    def land(self) -> list[TokenEvent]:
        """Carry it out. Returns the tokens drawn, each with the time of its step."""
        num_steps, manager = len(self._ends), self._engine.scheduler.manager
        for row in self._rows:
            sequence = row.sequence
            manager.append_slot(sequence, num_steps)
            sequence.token_ids += [TOKEN] * num_steps
            sequence.logprobs += [0.0] * num_steps
            sequence.num_computed += num_steps
            manager.commit(sequence)
        self._engine.num_steps += num_steps
        self._engine.runner.busy += self.end - self._start
        return [TokenEvent(row.sequence.request_id, row.sequence.index, TOKEN, time=end)
                for end in self._ends for row in self._rows]

    def _reckon(self, now: float, num_steps: int) -> list[float]:
        """When each step ends."""
        runner: CostRunner = self._engine.runner
        rows, step_seconds, ends = self._rows, runner.costs.step_seconds, []
        for _ in range(num_steps):
            now += step_seconds(rows)
            ends.append(now)
            for row in rows:
                row.num_cached += 1
        return ends


def steps_alike(scheduler: Scheduler) -> int:
    """How many steps lie ahead, LONGEST at most, in which nothing is decided. 0 where the next one decides something."""
    sequences = [sequence for entry in scheduler.running for sequence in entry.group.sequences]
    if not sequences or any(sequence.phase is not Phase.DECODE for sequence in sequences):
        return 0
    if scheduler.waiting and len(sequences) < scheduler.config.max_num_seqs:
        return 0  # one may be let in
    num_steps = min(LONGEST, min(sequence.max_len - len(sequence) for sequence in sequences) - 1)
    manager = scheduler.manager
    while num_steps > 0 and sum(manager.blocks_to_append(sequence, num_steps) for sequence in sequences) > manager.num_free_blocks:
        num_steps //= 2
    return num_steps
