"""Beam search over forked sequences: which beams live on, which are answers. Pure Python, no torch.

The rule is transformers': rank the continuations of all beams together, take as answers those among the best
`beam_width` that end, go on with the best `beam_width` that don't, and stop when no beam can still beat the
worst answer kept.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.core import BeamSearchParams, FinishReason, Sequence, SequenceGroup


def num_candidates(beam_width: int, num_eos: int) -> int:
    """How many continuations to look at so that `beam_width` remain even if every beam offers each EOS."""
    return max(2, 1 + num_eos) * beam_width


class Candidate(NamedTuple):
    """One beam continued by one token."""

    total: float  # cumulative log-probability with the token
    parent: Sequence
    token_id: int
    logprob: float


class BeamSearch:
    """The state of one request's search: candidates of the current step and the answers found so far."""

    def __init__(self, group: SequenceGroup, params: BeamSearchParams, manager: BlockSpaceManager,
                 eos_token_ids: frozenset[int], max_len: int) -> None:
        self.group = group
        self.params = params
        self.manager = manager
        self.eos_token_ids = eos_token_ids
        self.max_len = max_len  # tokens a sequence may have
        self.candidates: list[Candidate] = []
        self.found: list[tuple[float, Sequence]] = []  # (score, answer), best first

    def collect(self, beam: Sequence, top: list[tuple[int, float]]) -> None:
        """Note a beam's likeliest next tokens as (token id, logprob)."""
        so_far = beam.cumulative_logprob
        self.candidates += [Candidate(so_far + logprob, beam, token, logprob) for token, logprob in top]

    def drop_candidates(self) -> None:
        """The group was preempted: its beams will be run again."""
        self.candidates.clear()

    def advance(self) -> None:
        """All beams have offered their candidates: choose. Ends the group's sequences when the search is over."""
        width = self.params.beam_width
        ranked = heapq.nlargest(num_candidates(width, len(self.eos_token_ids)), self.candidates,
                                key=lambda candidate: candidate.total)
        self.candidates.clear()
        survivors = []
        for rank, candidate in enumerate(ranked):
            reason = self._end_of(candidate)
            if reason is None:
                survivors.append(candidate)
            elif rank < width:
                answer = candidate.parent.fork(0)
                answer.append_token(candidate.token_id, candidate.logprob)
                answer.finish(reason)
                self._keep(answer)
        if survivors and self._can_improve(survivors[0]):
            self._continue_with(survivors[:width])
        else:
            for beam in self.group.live:
                self._drop(beam)

    def resume(self, answer: Sequence) -> None:
        """An answer that was found on the worker where the search began."""
        self._keep(answer)

    def answers(self) -> list[Sequence]:
        """The answers, best first, once the search is over; none before."""
        if not self.group.finished:
            return []
        for index, (_, answer) in enumerate(self.found):
            answer.index = index
        return [answer for _, answer in self.found]

    def _end_of(self, candidate: Candidate) -> FinishReason | None:
        if candidate.token_id in self.eos_token_ids and not self.params.ignore_eos:
            return FinishReason.STOP
        full = candidate.parent.num_output + 1 >= self.params.max_tokens
        return FinishReason.LENGTH if full or len(candidate.parent) + 1 >= self.max_len else None

    def _score(self, total: float, length: int) -> float:
        return total / length**self.params.length_penalty

    def _keep(self, answer: Sequence) -> None:
        self.found.append((self._score(answer.cumulative_logprob, answer.num_output), answer))
        self.found.sort(key=lambda scored: -scored[0])
        del self.found[self.params.beam_width :]

    def _can_improve(self, best: Candidate) -> bool:
        if len(self.found) < self.params.beam_width:
            return True
        return self._score(best.total, best.parent.num_output + 1) > self.found[-1][0]

    def _continue_with(self, survivors: list[Candidate]) -> None:
        """Each survivor gets its own sequence: its parent's first takes the parent itself, the others fork."""
        parents = {candidate.parent.seq_id for candidate in survivors}
        for beam in self.group.live:
            if beam.seq_id not in parents:
                self._drop(beam)
        taken: set[int] = set()
        beams = []
        for candidate in survivors:
            beam = candidate.parent
            if beam.seq_id in taken:
                beam = beam.fork(0)
                self.manager.fork(candidate.parent, beam)
            taken.add(beam.seq_id)
            beams.append(beam)
        for index, (beam, candidate) in enumerate(zip(beams, survivors, strict=True)):
            beam.append_token(candidate.token_id, candidate.logprob)  # only now: a fork copies its parent's tokens
            beam.index = index  # its rank, for the batch timeline
        self.group.sequences = beams

    def _drop(self, beam: Sequence) -> None:
        self.manager.free(beam)
        beam.finish(FinishReason.STOP)
