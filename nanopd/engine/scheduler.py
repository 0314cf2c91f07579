"""The scheduler: which tokens of which sequences run in the next step. Pure Python, no torch.

Each step spends a budget of tokens: first one token for every sequence that decodes, then chunks of the
prompts already begun, then new requests, oldest first each time. A prompt's blocks are set aside when it is
admitted; a decode that finds no free block preempts the youngest request, which gives up its blocks, waits
and is recomputed later. The oldest request is never preempted for another, and none is let in that could not
run alone, so every request gets to its end.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import count

from nanopd.block_manager.manager import BlockSpaceManager, Lease
from nanopd.block_manager.pool import NoFreeBlocks
from nanopd.config import SchedulerConfig
from nanopd.core import FinishReason, Phase, PlanRow, RowResult, Sequence, SequenceGroup, StepPlan, StepResult
from nanopd.engine import beam


@dataclass
class Update:
    """One token drawn for one sequence, and how it ended the sequence if it did."""

    sequence: Sequence
    token_id: int | None
    logprob: float = 0.0
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


@dataclass(order=True)
class _Entry:
    """A group in line, by age."""

    ticket: int
    group: SequenceGroup = field(compare=False)


class Scheduler:
    """Keeps the groups that wait, run, or have handed their KV cache on and hold it until it has travelled."""

    def __init__(self, config: SchedulerConfig, manager: BlockSpaceManager, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.config = config
        self.manager = manager
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_len = min(config.max_model_len, manager.num_blocks * manager.block_size)
        self.waiting: list[_Entry] = []
        self.running: list[_Entry] = []
        self.handed_off: dict[str, SequenceGroup] = {}
        self.beams: dict[str, beam.BeamSearch] = {}
        self.num_preemptions = 0
        self._tickets = count()

    # ------------------------------------------------------------------------------------------- coming in

    def add(self, group: SequenceGroup) -> None:
        """Queue a fresh request. Whether it can be served at all is for `Limits.check` to say beforehand."""
        self._begin_beams(group)
        self.waiting.append(_Entry(next(self._tickets), group))

    def adopt(self, group: SequenceGroup, lease: Lease) -> None:
        """Take over a request whose prompt was computed elsewhere: its KV is in the lease's blocks.

        Each sequence of the group has its first token. Of those that go on, the first takes the lease and the others
        fork from it; those that ended with that token count as answers a beam search has found.
        """
        leader, *others = group.live
        search = self._begin_beams(group)
        for sequence in group.sequences if search else ():
            if sequence.finished:
                search.resume(sequence)
        self.manager.adopt(leader, lease)
        for sequence in others:
            self._share_prompt(leader, sequence)
        for sequence in group.live:
            sequence.move_to(Phase.DECODE)
        self.running.append(_Entry(next(self._tickets), group))

    def _begin_beams(self, group: SequenceGroup) -> beam.BeamSearch | None:
        params = group.request.beam
        if params is None:
            return None
        search = beam.BeamSearch(group, params, self.manager, self.eos_token_ids, self.max_len)
        self.beams[group.request_id] = search
        return search

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_seats_taken(self) -> int:
        """Sequences that the running groups hold or will hold once their prompts are read."""
        return sum(self._seats(entry.group) for entry in self.running)

    @staticmethod
    def _seats(group: SequenceGroup) -> int:
        return group.request.num_answers if group.is_whole or group.request.beam else len(group.live)

    def find(self, request_id: str) -> SequenceGroup | None:
        for entry in (*self.waiting, *self.running):
            if entry.group.request_id == request_id:
                return entry.group
        return self.handed_off.get(request_id)

    # -------------------------------------------------------------------------------------------- planning

    def schedule(self) -> StepPlan:
        """The next step's plan. Blocks are taken and copies noted here; nothing is computed."""
        plan = StepPlan()
        self._plan_running(plan, decodes=True)
        self._plan_running(plan, decodes=False)
        if not plan.preempted:
            self._admit(plan)
        return plan

    def _plan_running(self, plan: StepPlan, *, decodes: bool) -> None:
        for entry in list(self.running):
            for sequence in entry.group.live:
                if entry not in self.running:
                    break  # preempted to make room for an elder
                num_new = self._num_to_run(entry.group, sequence, plan)
                if num_new and (sequence.num_remaining == 1) == decodes:
                    self._plan_row(plan, entry, sequence, num_new)

    def _num_to_run(self, group: SequenceGroup, sequence: Sequence, plan: StepPlan) -> int:
        """How many tokens of the sequence fit into what is left of the step's budget."""
        if not self.manager.has_table(sequence):
            return 0  # a sibling that waits until the leader has recomputed their prompt
        if self._ends_with_awaited(group, sequence):
            return 0
        wanted = sequence.num_remaining
        if any(not self.manager.has_table(sibling) for sibling in group.live):
            wanted = max(sequence.prompt_len, sequence.num_computed) - sequence.num_computed
        chunk = self.config.prefill_chunk_size or wanted
        return min(wanted, chunk, self.config.max_num_batched_tokens - plan.num_tokens)

    def _plan_row(self, plan: StepPlan, entry: _Entry, sequence: Sequence, num_new: int) -> None:
        while True:
            try:
                copies = self.manager.append_slot(sequence, num_new)
                break
            except NoFreeBlocks:
                victim = self.running[-1]
                self._preempt(victim, plan)
                if victim is entry:
                    return
        row = PlanRow(sequence, entry.group.request, num_new, sequence.num_computed,
                      self.manager.block_table(sequence), copies)
        if sequence.num_computed + num_new == len(sequence):
            self._ask_for_draws(row)
        plan.rows.append(row)

    def _ask_for_draws(self, row: PlanRow) -> None:
        request = row.request
        if request.beam:
            row.num_samples = 1
            row.num_top = beam.num_candidates(request.beam.beam_width, len(self.eos_token_ids))
        else:
            row.num_samples = 1 if row.sequence.num_output else request.sampling.n
            row.num_top = request.sampling.logprobs or 0

    def _preempt(self, entry: _Entry, plan: StepPlan) -> None:
        """Send a running group back to wait: its blocks go, its tokens stay, and it will be recomputed."""
        group = entry.group
        plan.rows = [row for row in plan.rows if row.request is not group.request]
        plan.preempted.append(group.request_id)
        if group.request.beam:
            self.beams[group.request_id].drop_candidates()
        for sequence in group.live:
            self.manager.free(sequence)
            sequence.forget_awaited()
            sequence.num_computed = 0
            sequence.move_to(Phase.WAITING)
        self.running.remove(entry)
        insort(self.waiting, entry)
        self.num_preemptions += 1

    def withdraw(self, plan: StepPlan) -> None:
        """The plan was not carried out, nor were its copies: those it served wait and are recomputed."""
        served = {row.request.request_id for row in plan.rows}
        for entry in [entry for entry in self.running if entry.group.request_id in served]:
            self._preempt(entry, plan)

    def _admit(self, plan: StepPlan) -> None:
        """Let waiting groups in, oldest first; the first that does not fit holds the others back."""
        while self.waiting and plan.num_tokens < self.config.max_num_batched_tokens:
            entry = self.waiting[0]
            leader = entry.group.live[0]
            if self.num_seats_taken + self._seats(entry.group) > self.config.max_num_seqs:
                return
            if not self.manager.can_allocate(leader):
                return
            self.manager.allocate(leader)
            leader.move_to(Phase.PREFILL)
            insort(self.running, self.waiting.pop(0))
            self._share_recomputed_prompt(entry.group)
            self._plan_row(plan, entry, leader, self._num_to_run(entry.group, leader, plan))
            if plan.preempted:
                return

    # --------------------------------------------------------------------------------------- running ahead

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The plan of the step after `plan`, which runs and whose tokens are not known yet.

        Every sequence counts as one token longer, and that token's place is held by a number below zero. None where
        the next step depends on more than the tokens' number: beams, answers about to fork, a penalty for repetition,
        a prompt about to be handed on, or so few free blocks that somebody would be preempted.
        """
        if not self._may_run_ahead(plan):
            return None
        draws = count()
        for row in plan.rows:
            draw = next(draws) if row.num_samples else None
            if row.sequence.finished:
                continue  # it ended in the step before, or was cancelled: what it draws is for nobody
            row.sequence.num_computed += row.num_new
            if draw is not None:
                row.sequence.await_token(draw)
                row.sequence.move_to(Phase.DECODE)
        plan.run_ahead = True
        return self.schedule()

    def _may_run_ahead(self, plan: StepPlan) -> bool:
        live = [sequence for entry in self.running for sequence in entry.group.live]
        return (
            all(row.num_samples <= 1 for row in plan.rows)
            and all(self._is_plain(entry.group) for entry in self.running)
            and self.manager.num_free_blocks >= len(live)  # one block each is the most a decode takes
        )

    def _is_plain(self, group: SequenceGroup) -> bool:
        """Whether all that a step changes in the group is known beforehand, but for the tokens themselves."""
        request = group.request
        return (request.beam is None and request.sampling.repetition_penalty == 1 and not group.handoff
                and (request.num_answers == 1 or all(sequence.phase is Phase.DECODE for sequence in group.live)))

    def _ends_with_awaited(self, group: SequenceGroup, sequence: Sequence) -> bool:
        """Whether the token that is being drawn is the sequence's last, whichever it is."""
        full = sequence.num_output == group.request.max_tokens or len(sequence) >= self.max_len
        return full and sequence.awaits_token

    # ------------------------------------------------------------------------------------------ committing

    def commit(self, plan: StepPlan, result: StepResult) -> list[Update]:
        """Take in what the step computed: cache contents, drawn tokens, forks and ends."""
        groups = {entry.group.request_id: entry.group for entry in self.running}
        updates: list[Update] = []
        for row, drawn in zip(plan.rows, result.rows, strict=True):
            group = groups.get(row.request.request_id)
            if group is None or row.sequence.finished:
                continue  # cancelled while the step ran
            if not plan.run_ahead:
                row.sequence.num_computed += row.num_new
            self.manager.commit(row.sequence)
            updates += self._take_draws(group, row, drawn)
        for group in groups.values():
            updates += self._settle(group)
        self.running = [entry for entry in self.running if self._still_runs(entry.group)]
        return updates

    def _take_draws(self, group: SequenceGroup, row: PlanRow, drawn: RowResult) -> list[Update]:
        if row.num_samples == 0:
            return []
        if group.request.beam:
            self.beams[group.request_id].collect(row.sequence, drawn.top_logprobs)
            return []
        answers = [row.sequence] + [self._fork_answer(group, row.sequence, i) for i in range(1, row.num_samples)]
        updates = []
        for sequence, token_id, logprob in zip(answers, drawn.token_ids, drawn.logprobs, strict=True):
            sequence.append_token(token_id, logprob)
            stop_reason = self._check_stop(group, sequence)
            updates.append(Update(sequence, token_id, logprob, drawn.top_logprobs, sequence.finish_reason, stop_reason))
        return updates

    def _fork_answer(self, group: SequenceGroup, parent: Sequence, index: int) -> Sequence:
        child = parent.fork(index)
        self.manager.fork(parent, child)
        group.sequences.append(child)
        return child

    def _check_stop(self, group: SequenceGroup, sequence: Sequence) -> int | None:
        """End the sequence where its last token says so. Returns the stop token that ended it, if one did."""
        sampling = group.request.sampling
        token = sequence.token_ids[-1]
        is_eos = token in self.eos_token_ids and not sampling.ignore_eos
        if (is_eos or token in sampling.stop_token_ids) and sequence.num_output > sampling.min_tokens:
            self.finish(sequence, FinishReason.STOP)
            return None if is_eos else token
        if sequence.num_output == sampling.max_tokens or len(sequence) >= self.max_len:
            self.finish(sequence, FinishReason.LENGTH)
        return None

    def _settle(self, group: SequenceGroup) -> list[Update]:
        """After a step: share a recomputed prompt, choose among beams, move on to the next phase."""
        self._share_recomputed_prompt(group)
        updates = []
        if group.request.beam and group.live and all(sequence.num_remaining == 0 for sequence in group.live):
            updates = self._advance_beams(group)
        for sequence in group.live:
            if group.handoff and sequence.num_output:
                sequence.move_to(Phase.TRANSFER)
            elif sequence.num_output and sequence.num_remaining <= 1:
                sequence.move_to(Phase.DECODE)
        return updates

    def _advance_beams(self, group: SequenceGroup) -> list[Update]:
        search = self.beams[group.request_id]
        search.advance()
        return [
            Update(answer, token_id, logprob, finish_reason=answer.finish_reason if is_last else None)
            for answer in search.answers()
            for token_id, logprob, is_last in zip(
                answer.output_token_ids, answer.logprobs, [False] * (answer.num_output - 1) + [True], strict=True)
        ]

    def _share_recomputed_prompt(self, group: SequenceGroup) -> None:
        """A preempted group recomputes its prompt once, in its first live sequence; here the others share it."""
        leader = group.live[0] if group.live else None
        if leader is None or leader.num_computed < leader.prompt_len:
            return
        for sibling in group.live[1:]:
            if not self.manager.has_table(sibling):
                self._share_prompt(leader, sibling)
                sibling.move_to(Phase.PREFILL)

    def _share_prompt(self, leader: Sequence, sibling: Sequence) -> None:
        self.manager.fork(leader, sibling, num_tokens=leader.prompt_len)
        sibling.num_computed = leader.prompt_len

    def _still_runs(self, group: SequenceGroup) -> bool:
        if group.finished:
            self.beams.pop(group.request_id, None)
            return False
        if any(sequence.phase is Phase.TRANSFER for sequence in group.live):
            self.handed_off[group.request_id] = group
            return False
        return True

    # ----------------------------------------------------------------------------------------------- ending

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End one sequence and let go of its blocks. After an error nobody else may build on what is in them."""
        if reason is FinishReason.ERROR:
            self.manager.forget(sequence)
        self.manager.free(sequence)
        sequence.forget_awaited()
        sequence.finish(reason)

    def cancel(self, request_id: str, reason: FinishReason, index: int | None = None) -> list[Sequence]:
        """End a request, or one of the answers it has begun. Returns the sequences that this ended.

        A beam search has no answers until it is over, so it ends as a whole or not at all.
        """
        group = self.find(request_id)
        if group is None or (index is not None and (group.is_whole or group.request.beam)):
            return []
        ended = [sequence for sequence in group.live if index is None or sequence.index == index]
        for sequence in ended:
            self.finish(sequence, reason)
        if group.finished:
            self._forget(group)
        elif not any(self.manager.has_table(sequence) for sequence in group.live):
            self._requeue(group)  # its leader went while the others waited for the prompt
        return ended

    def _forget(self, group: SequenceGroup) -> None:
        self.waiting = [entry for entry in self.waiting if entry.group is not group]
        self.running = [entry for entry in self.running if entry.group is not group]
        self.handed_off.pop(group.request_id, None)
        self.beams.pop(group.request_id, None)

    def _requeue(self, group: SequenceGroup) -> None:
        for entry in [entry for entry in self.running if entry.group is group]:
            self.running.remove(entry)
            insort(self.waiting, entry)

    def first_tokens(self, request_id: str) -> list[Sequence]:
        """What a handed-off request has drawn: a sequence with one token for each answer, or each beam and what
        the beam search has found."""
        found = [answer for _, answer in self.beams[request_id].found] if request_id in self.beams else []
        return self.handed_off[request_id].sequences + found

    def release_handed_off(self, request_id: str) -> None:
        """The KV cache of a handed-off request has travelled: its blocks here may go."""
        self.beams.pop(request_id, None)
        group = self.handed_off.pop(request_id, None)
        for sequence in group.live if group else ():
            self.finish(sequence, FinishReason.STOP)
