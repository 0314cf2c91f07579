"""The scheduler: which tokens of which sequences run in the next step. Pure Python, no torch.

Each step spends a budget of tokens: first one token for every sequence that decodes, then chunks of the
prompts already begun, then new requests, oldest first each time. A prompt's blocks are set aside when it is
admitted; a decode that finds no free block preempts the youngest request, which gives up its blocks, waits
and is recomputed later. The oldest request is never preempted for another, and none is let in that could not
run alone, so every request gets to its end.

With a proposer, what a step leaves of its budget and of the free blocks goes to drafts: guesses of the next tokens,
which the model confirms or not in the same step. They live in a fork of their sequence, so a wrong one leaves no trace,
and since every draw is a function of its seed, answer and position, the right ones are those that would have been drawn.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import count

from nanopd.block_manager.manager import BlockSpaceManager, Lease
from nanopd.block_manager.pool import NoFreeBlocks
from nanopd.config import SchedulerConfig
from nanopd.core import (
    FinishReason,
    Phase,
    PlanRow,
    Request,
    RowResult,
    Sequence,
    SequenceGroup,
    StepPlan,
    StepResult,
)
from nanopd.engine import beam
from nanopd.engine.speculative import DraftCounters, Proposer

DECODE, PREFILL = Phase.DECODE, Phase.PREFILL  # looked up for every sequence in every step, and an enum is slow at it


@dataclass(slots=True)
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
    """A group in line, by age, and what does not change about it."""

    ticket: int
    group: SequenceGroup = field(compare=False)
    num_firsts: int = field(compare=False)  # answers that are drawn after the prompt
    num_top: int = field(compare=False)  # alternatives to report for each token
    is_plain: bool = field(compare=False)  # see `Scheduler._is_plain`


class Scheduler:
    """Keeps the groups that wait, run, or have handed their KV cache on and hold it until it has travelled."""

    def __init__(self, config: SchedulerConfig, manager: BlockSpaceManager, eos_token_ids: tuple[int, ...] = (),
                 proposer: Proposer | None = None) -> None:
        self.config = config
        self.manager = manager
        self.eos_token_ids = frozenset(eos_token_ids)
        self.proposer = proposer
        self.drafts = DraftCounters()
        self.max_len = min(config.max_model_len, manager.num_blocks * manager.block_size)
        self.waiting: list[_Entry] = []
        self.running: list[_Entry] = []
        self.handed_off: dict[str, SequenceGroup] = {}
        self.beams: dict[str, beam.BeamSearch] = {}
        self.num_preemptions = 0
        self.num_seats_promised = 0  # to requests whose prompts are computed elsewhere: nobody else is let in on them
        self._groups: dict[str, SequenceGroup] = {}  # all that are served
        self._tickets = count()
        self._forks: dict[int, tuple[Sequence, Sequence]] = {}  # that draft in this step: by id, (sequence, its fork)
        self._budget = 0  # tokens that the step being planned has room for

    # ------------------------------------------------------------------------------------------- coming in

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Whether it can be served at all is for `Limits.check` to say beforehand.

        Of answers that were begun elsewhere the tokens are here and not their KV: as after a preemption.
        """
        self._begin_beams(group)
        self.waiting.append(self._take_in(group))

    def adopt(self, group: SequenceGroup, lease: Lease) -> None:
        """Take over a request whose prompt was computed elsewhere: its KV is in the lease's blocks.

        Each sequence of the group has at least its first token. Of those that go on, the first takes the lease and the
        others fork from it; those that ended with that token count as answers a beam search has found. Tokens after
        the first, which a worker that is gone had written, are recomputed.
        """
        entry = self._take_in(group)
        leader, *others = group.live
        search = self._begin_beams(group)
        for sequence in group.sequences if search else ():
            if sequence.finished:
                search.resume(sequence)
        self.manager.adopt(leader, lease)
        for sequence in others:
            self._share_prompt(leader, sequence)
        for sequence in group.live:
            sequence.move_to(DECODE if sequence.num_remaining == 1 else PREFILL)
        self.running.append(entry)

    def _take_in(self, group: SequenceGroup) -> _Entry:
        """Note what a group is, and how long its answers may get."""
        request, ticket = group.request, next(self._tickets)
        self._groups[group.request_id] = group
        for sequence in group.sequences:
            sequence.max_len = min(sequence.prompt_len + (request.max_tokens or self.max_len), self.max_len)
        if request.beam:
            return _Entry(ticket, group, 1, beam.num_candidates(request.beam.beam_width, len(self.eos_token_ids)), False)
        return _Entry(ticket, group, request.sampling.n, request.sampling.logprobs or 0, self._is_plain(group))

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
    def num_seats_wanted(self) -> int:
        """By all groups here, and those promised."""
        return self.num_seats_taken + self.num_seats_promised + sum(self._seats(entry.group) for entry in self.waiting)

    @property
    def lacks_blocks(self) -> bool:
        """Whether the first in line, if there is one, has to wait for blocks."""
        return bool(self.waiting) and not self.manager.can_allocate(self.waiting[0].group.live[0])

    @property
    def num_seats_taken(self) -> int:
        """Sequences that the running groups hold or will hold once their prompts are read."""
        return sum(self._seats(entry.group) for entry in self.running)

    @staticmethod
    def _seats(group: SequenceGroup) -> int:
        return group.request.num_answers if group.is_whole or group.request.beam else len(group.live)

    def find(self, request_id: str) -> SequenceGroup | None:
        return self._groups.get(request_id)

    # -------------------------------------------------------------------------------------------- planning

    def schedule(self) -> StepPlan:
        """The next step's plan. Blocks are taken and copies noted here; nothing is computed."""
        plan = StepPlan()
        self._budget = self.config.max_num_batched_tokens
        self._plan_running(plan)
        if self.waiting and not plan.preempted:
            self._admit(plan)
        if self.proposer is not None:
            self._add_drafts(plan, self.proposer)
        return plan

    def _plan_running(self, plan: StepPlan) -> None:
        """Every sequence that writes, then chunks of those that read. Who is preempted meanwhile does neither."""
        reading = []
        for entry in self.running.copy():
            for sequence in entry.group.sequences:
                if sequence.phase is DECODE:
                    tokens = sequence.token_ids
                    waits = len(tokens) == sequence.num_computed  # a beam, for the others
                    ends = tokens[-1] < 0 and len(tokens) >= sequence.max_len  # with the token being drawn
                    if self._budget and not waits and not ends:
                        self._plan_row(plan, entry, sequence, 1)
                elif sequence.phase is PREFILL:
                    reading.append((entry, sequence))
        for entry, sequence in reading:
            num_new = self._chunk_size(entry.group, sequence)
            if num_new and sequence.phase is PREFILL:
                self._plan_row(plan, entry, sequence, num_new)

    def _chunk_size(self, group: SequenceGroup, sequence: Sequence) -> int:
        """How many tokens of the sequence fit into what is left of the step's budget."""
        wanted = sequence.num_remaining
        if any(not self.manager.has_table(sibling) for sibling in group.live):
            wanted = sequence.prompt_len - sequence.num_computed  # they wait to share the prompt, and it alone
        return min(wanted, self.config.prefill_chunk_size or wanted, self._budget)

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
        num_cached = sequence.num_computed
        row = PlanRow(sequence, entry.group.request, num_new, num_cached, self.manager.live_table(sequence), copies)
        if num_cached + num_new == len(sequence.token_ids):
            row.num_samples = 1 if entry.num_firsts == 1 or sequence.num_output else entry.num_firsts
            row.num_top = entry.num_top
        plan.rows.append(row)
        self._budget -= num_new

    def _preempt(self, entry: _Entry, plan: StepPlan) -> None:
        """Send a running group back to wait: its blocks go, its tokens stay, and it will be recomputed."""
        group = entry.group
        self._budget += sum(row.num_new for row in plan.rows if row.request is group.request)
        plan.rows = [row for row in plan.rows if row.request is not group.request]
        plan.preempted.append(group.request_id)
        if group.request.beam:
            self.beams[group.request_id].drop_candidates()
        for sequence in group.live:
            self._drop_fork(sequence)
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
        seats = self.config.max_num_seqs - self.num_seats_taken - self.num_seats_promised
        while self.waiting and self._budget:
            entry = self.waiting[0]
            leader = entry.group.live[0]
            seats -= self._seats(entry.group)
            if seats < 0 or not self.manager.can_allocate(leader):
                return
            self.manager.allocate(leader)
            leader.move_to(PREFILL)
            insort(self.running, self.waiting.pop(0))
            self._share_recomputed_prompt(entry.group)
            self._plan_row(plan, entry, leader, self._chunk_size(entry.group, leader))
            if plan.preempted:
                return

    # ----------------------------------------------------------------------------------------------- drafts

    def _add_drafts(self, plan: StepPlan, proposer: Proposer) -> None:
        """Guesses take what is left, so nobody waits or is preempted for one."""
        for row in plan.rows:
            if row.sequence.phase is not DECODE or row.copies or not self._may_draft(row.request):
                continue
            room = self._room_for_drafts(row)
            drafts = proposer.propose(row.sequence, room) if room > 0 else []
            if drafts:
                self._draft(row, drafts)
        if self._forks:
            plan.rows.sort(key=lambda row: row.num_new > 1)  # kernels take the rows of one token together, from the front

    @staticmethod
    def _may_draft(request: Request) -> bool:
        """With a penalty for repetition a draw depends on the guesses before it; beams, and requests for alternatives,
        need more than the tokens drawn."""
        return request.beam is None and request.sampling.repetition_penalty == 1 and not request.sampling.logprobs

    def _room_for_drafts(self, row: PlanRow) -> int:
        """How many guesses may follow the row's token. A token is drawn after the last of them, which has to fit too."""
        size, length = self.manager.block_size, row.num_cached + 1
        blocks = row.num_cached // size + self.manager.num_free_blocks
        return min(self._budget, blocks * size - length, row.sequence.max_len - length - 1)

    def _draft(self, row: PlanRow, drafts: list[int]) -> None:
        """Have the row run a fork of its sequence that ends with the drafts."""
        sequence = row.sequence
        fork = sequence.fork(sequence.index)
        row.copies = self.manager.draft(sequence, fork, 1 + len(drafts))
        fork.token_ids += drafts
        row.sequence, row.block_table = fork, self.manager.live_table(fork)
        row.num_new, row.num_drafts = 1 + len(drafts), len(drafts)
        self._budget -= len(drafts)
        self._forks[fork.seq_id] = sequence, fork

    def _verify(self, row: PlanRow, drawn: RowResult) -> list[Update]:
        """The drafts that were drawn as well, and the token after them, as if each had come in a step of its own."""
        sequence, fork = self._forks.pop(row.sequence.seq_id)
        drafts = fork.token_ids[-row.num_drafts :]
        row.num_accepted = next((i for i, draft in enumerate(drafts) if draft != drawn.token_ids[i]), len(drafts))
        self.drafts.proposed += row.num_drafts
        self.drafts.accepted += row.num_accepted
        self.manager.accept(sequence, fork, row.num_cached + 1 + row.num_accepted)
        updates: list[Update] = []
        while len(updates) <= row.num_accepted and not sequence.finished:
            sequence.num_computed += 1
            self.manager.commit(sequence)
            updates.append(self._take(row, sequence, drawn, len(updates)))
        return updates

    def _drop_fork(self, sequence: Sequence) -> None:
        """The step in which it drafts counts no more."""
        for owner, fork in list(self._forks.values()):
            if owner is sequence:
                del self._forks[fork.seq_id]
                self.manager.free(fork)
                fork.finish(FinishReason.ABORT)

    # --------------------------------------------------------------------------------------- running ahead

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The plan of the step after `plan`, which runs and whose tokens are not known yet.

        Every sequence counts as one token longer, and that token's place is held by a number below zero. None where
        the next step depends on more than the tokens' number: beams, answers about to fork, a penalty for repetition,
        a prompt about to be handed on, or so few free blocks that somebody would be preempted. Nor with drafts, which
        follow from the last token: a step that confirms several is worth more than one that begins a little earlier.
        """
        if not self._may_run_ahead():
            return None
        draw = 0
        for row in plan.rows:
            sequence = row.sequence
            if sequence.phase is DECODE or sequence.phase is PREFILL:  # else it has ended: what it draws is for nobody
                sequence.num_computed += row.num_new
                if row.num_samples:
                    sequence.await_token(draw)
                    if sequence.phase is not DECODE:
                        sequence.move_to(DECODE)
            draw += row.num_samples
        plan.run_ahead = True
        return self.schedule()

    def _may_run_ahead(self) -> bool:
        most_blocks = 0  # that the next step takes: one for each sequence that writes
        for entry in self.running:
            sequences = entry.group.sequences
            if not entry.is_plain or (entry.num_firsts > 1 and any(one.phase is PREFILL for one in sequences)):
                return False
            most_blocks += len(sequences)
        return most_blocks <= self.manager.num_free_blocks

    def _is_plain(self, group: SequenceGroup) -> bool:
        """Whether all that a step changes in the group, once its answers write, is known but for the tokens."""
        request = group.request
        may_draft = self.proposer is not None and self._may_draft(request)
        return request.beam is None and request.sampling.repetition_penalty == 1 and not group.handoff and not may_draft

    # ------------------------------------------------------------------------------------------ committing

    def commit(self, plan: StepPlan, result: StepResult) -> list[Update]:
        """Take in what the step computed: cache contents, drawn tokens, forks and ends."""
        updates: list[Update] = []
        changed: dict[str, SequenceGroup] = {}  # those in which more may change than a token at a sequence's end
        for row, drawn in zip(plan.rows, result.rows, strict=True):
            sequence, request = row.sequence, row.request
            if sequence.phase is not DECODE:
                if sequence.phase is not PREFILL:
                    continue  # cancelled while the step ran
                changed[request.request_id] = self._groups[request.request_id]
            if row.num_drafts:
                updates += self._verify(row, drawn)
                continue
            if not plan.run_ahead:
                sequence.num_computed += row.num_new
            self.manager.commit(sequence)
            if request.beam:
                changed[request.request_id] = self._groups[request.request_id]
                self.beams[request.request_id].collect(sequence, drawn.top_logprobs)
            elif row.num_samples == 1:
                updates.append(self._take(row, sequence, drawn, 0))
            elif row.num_samples:
                updates += self._take_first_tokens(row, drawn)
        for group in changed.values():
            updates += self._settle(group)
        if changed or any(update.finish_reason for update in updates):
            self.running = [entry for entry in self.running if self._still_runs(entry.group)]
        return updates

    def _take_first_tokens(self, row: PlanRow, drawn: RowResult) -> list[Update]:
        """Of several answers, which were one sequence until now."""
        answers = [row.sequence] + [self._fork_answer(row.sequence, i) for i in range(1, row.num_samples)]
        return [self._take(row, answer, drawn, i) for i, answer in enumerate(answers)]

    def _take(self, row: PlanRow, sequence: Sequence, drawn: RowResult, draw: int) -> Update:
        """Add one of the tokens that a row drew to its sequence, which may end with it."""
        token_id, logprob = drawn.token_ids[draw], drawn.logprobs[draw]
        sequence.append_token(token_id, logprob)
        update = Update(sequence, token_id, logprob, drawn.top_logprobs)
        sampling = row.request.sampling
        is_eos = token_id in self.eos_token_ids and not sampling.ignore_eos
        if (is_eos or token_id in sampling.stop_token_ids) and sequence.num_output > sampling.min_tokens:
            update.stop_reason = None if is_eos else token_id
            update.finish_reason = FinishReason.STOP
        elif len(sequence.token_ids) >= sequence.max_len:
            update.finish_reason = FinishReason.LENGTH
        if update.finish_reason:
            self.finish(sequence, update.finish_reason)
        return update

    def _fork_answer(self, parent: Sequence, index: int) -> Sequence:
        child = parent.fork(index)
        self.manager.fork(parent, child)
        self._groups[parent.request_id].sequences.append(child)
        return child

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
            self._forget(group)
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
        if self.proposer is not None:
            self.proposer.forget(sequence)
        self._drop_fork(sequence)
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
            self.waiting = [entry for entry in self.waiting if entry.group is not group]
            self.running = [entry for entry in self.running if entry.group is not group]
        elif not any(self.manager.has_table(sequence) for sequence in group.live):
            self._requeue(group)  # its leader went while the others waited for the prompt
        return ended

    def _forget(self, group: SequenceGroup) -> None:
        del self._groups[group.request_id]
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
        group = self.handed_off.get(request_id)
        if group is not None:
            for sequence in group.live:
                self.finish(sequence, FinishReason.STOP)
            self._forget(group)
