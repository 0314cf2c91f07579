"""From logits to tokens. Every draw is a pure function of (request seed, answer, position).

A token is drawn by inverting the cumulative distribution at one uniform number, and that number comes from a
counter, not from a generator's state. So a draw does not depend on the rest of the batch, on the device, on
a preemption or on the worker where it happens.

Nothing here waits for the device: `draw` leaves the tokens there, and `Draws.collect` reads them once they have been
copied to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanopd.core import PlanRow, RowResult
from nanopd.paged_attention import cuda
from nanopd.paged_attention.host import download, upload

DRAW_BYTES = 13  # a token id, its log-probability and whether the row is broken
_MASK = (1 << 64) - 1


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1): splitmix64 over the three counters."""
    state = seed & _MASK
    for value in (index, position):
        state = _mix((state + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK)
    return (state >> 11) / (1 << 53)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass
class Draws:
    """What a step drew, on the device or on the host: D draws from L rows of logits.

    token_ids int64 [D] and logprobs float32 [D], row by row of the plan; broken bool [L]; top_ids and top_logprobs
    [L, k], the k likeliest of each row of logits, where somebody asked for them.
    """

    token_ids: Tensor
    logprobs: Tensor
    broken: Tensor
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    buffer: Tensor | None = None  # of which the first three are views, so that one copy fetches all

    @classmethod
    def in_buffer(cls, buffer: Tensor) -> Draws:
        """Views of uint8 [DRAW_BYTES * n] for n rows that draw once each."""
        n = len(buffer) // DRAW_BYTES
        token_ids, logprobs = buffer[: 8 * n].view(torch.int64), buffer[8 * n : 12 * n].view(torch.float32)
        return cls(token_ids, logprobs, buffer[12 * n :].view(torch.bool), buffer=buffer)

    def first(self, count: int) -> Draws:
        """Those of the first rows, where each row draws once."""
        return Draws(self.token_ids[:count], self.logprobs[:count], self.broken[:count], buffer=self.buffer)

    def to_host(self) -> Draws:
        """On a GPU, a copy in pinned memory: there once the stream has come so far. On a CPU, itself."""
        if self.token_ids.device.type == "cpu":
            return self
        if self.buffer is not None:
            return Draws.in_buffer(download(self.buffer)).first(len(self.token_ids))
        fields = (self.token_ids, self.logprobs, self.broken, self.top_ids, self.top_logprobs)
        return Draws(*(None if field is None else download(field) for field in fields))  # type: ignore[arg-type]

    def collect(self, rows: list[PlanRow]) -> list[RowResult]:
        """A result for each of the plan's rows, read on the host. A row whose logits held a NaN or +inf, or were all
        -inf, gets an error instead of a token made of it."""
        tokens, logprobs, broken = self.token_ids.tolist(), self.logprobs.tolist(), self.broken.tolist()
        results = []
        draw = line = 0
        for row in rows:
            lines, end = row.num_logits, draw + row.num_draws
            if any(broken[line : line + lines]):
                results.append(RowResult(error="the model's logits held NaN or infinity"))
            else:
                results.append(RowResult(tokens[draw:end], logprobs[draw:end], self._top(line, row.num_top)))
            draw, line = end, line + lines
        return results

    def _top(self, line: int, k: int) -> list[tuple[int, float]]:
        if k == 0 or self.top_ids is None or self.top_logprobs is None:
            return []
        return list(zip(self.top_ids[line, :k].tolist(), self.top_logprobs[line, :k].tolist()))


@dataclass(frozen=True)
class Line:
    """One row of logits: what may follow the row's tokens up to the `offset`-th of those it draws after."""

    row: PlanRow
    offset: int

    @property
    def position(self) -> int:
        """How many tokens of the answer come before the one drawn here."""
        row = self.row
        return row.num_cached + row.num_new - row.num_drafts + self.offset - row.sequence.prompt_len

    @property
    def too_short(self) -> bool:
        """Whether the answer must not end with the token drawn here."""
        return self.position < self.row.request.sampling.min_tokens


def sample(logits: Tensor, rows: list[PlanRow], eos_token_ids: frozenset[int]) -> list[RowResult]:
    """`draw`, and wait for the result of each row."""
    return draw(logits, rows, eos_token_ids).to_host().collect(rows)


def draw(logits: Tensor, rows: list[PlanRow], eos_token_ids: frozenset[int]) -> Draws:
    """Draw the tokens of a plan's rows.

    logits [L, vocabulary] holds, row by row, what may follow each token after which the row draws.
    """
    if is_greedy(rows) and cuda.usable(logits):
        return draw_greedily(logits)
    lines = [Line(row, offset) for row in rows for offset in range(row.num_logits)]
    slots = [(i, answer) for i, line in enumerate(lines) for answer in range(line.row.num_samples)]
    logits = logits.float()
    logprobs = torch.log_softmax(logits, dim=-1)
    adjusted = _adjust(logits, lines, eos_token_ids)
    line_of_slot = upload([i for i, _ in slots], logits.device)
    tokens = adjusted.argmax(dim=-1)[line_of_slot]
    random = [slot for slot, (i, _) in enumerate(slots) if _is_random(lines[i].row)]
    if random:
        picked = [(lines[i], answer) for i, answer in (slots[slot] for slot in random)]
        chosen = upload(random, logits.device)
        tokens[chosen] = _draw_random(adjusted[line_of_slot[chosen]], picked)
    num_top = min(max((row.num_top for row in rows if row.num_samples), default=0), logits.shape[1])
    top = logprobs.topk(num_top) if num_top else (None, None)
    return Draws(tokens, logprobs[line_of_slot, tokens], logprobs.isnan().any(dim=-1), top[1], top[0])


def draw_greedily(logits: Tensor) -> Draws:
    """The likeliest token of each row of logits, by one kernel of a GPU."""
    draws = Draws.in_buffer(torch.empty(DRAW_BYTES * len(logits), dtype=torch.uint8, device=logits.device))
    cuda.greedy_sample(logits, out=(draws.token_ids, draws.logprobs, draws.broken))
    return draws


def is_greedy(rows: list[PlanRow]) -> bool:
    """Whether all that is drawn is each row's likeliest token: one kernel does it."""
    return not any(
        _is_random(row) or row.num_top or row.request.beam is not None or row.request.sampling.repetition_penalty != 1
        or Line(row, 0).too_short
        for row in rows if row.num_samples)


def _is_random(row: PlanRow) -> bool:
    return row.request.beam is None and not row.request.sampling.greedy


def _adjust(logits: Tensor, lines: list[Line], eos_token_ids: frozenset[int]) -> Tensor:
    """Repetition penalties, and no end before min_tokens."""
    adjusted = logits
    for i, line in enumerate(lines):
        sampling, sequence = line.row.request.sampling, line.row.sequence
        if line.row.request.beam or (sampling.repetition_penalty == 1 and not line.too_short):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        if sampling.repetition_penalty != 1:
            seen = upload(sorted(set(sequence.token_ids)), logits.device)
            values = adjusted[i, seen]
            penalty = sampling.repetition_penalty
            adjusted[i, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if line.too_short:
            adjusted[i, upload(sorted(eos_token_ids | set(sampling.stop_token_ids)), logits.device)] = -torch.inf
    return adjusted


def _draw_random(logits: Tensor, slots: list[tuple[Line, int]]) -> Tensor:
    """One token for each (line, answer) slot, whose logits stand in its row of `logits`: temperature, then top-k,
    top-p and min-p, then the draw."""
    params = [line.row.request.sampling for line, _ in slots]

    def column(values: list[float]) -> Tensor:
        return upload(values, logits.device, torch.float32).unsqueeze(1)

    temperature = column([p.temperature for p in params]).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the best is 0, so that nothing overflows
    ordered, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    ordered = ordered.masked_fill(rank >= column([p.top_k or ordered.shape[1] for p in params]), -torch.inf)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # the mass of all likelier tokens
    keep = (before < column([p.top_p for p in params])) & (probs >= column([p.min_p for p in params]) * probs[:, :1])
    keep &= probs > 0  # what top-k or min_tokens has cut off
    keep[:, 0] = True
    mass = (probs * keep).cumsum(dim=-1)
    points = column([_uniform_for(line, answer) for line, answer in slots]) * mass[:, -1:]
    position = torch.searchsorted(mass, points, right=True).clamp_(max=mass.shape[1] - 1)
    position = torch.minimum(position, keep.sum(dim=-1, keepdim=True) - 1)  # rounding must not pass the last kept
    return token_ids.gather(1, position).squeeze(1)


def _uniform_for(line: Line, answer: int) -> float:
    return uniform(line.row.request.seed, line.row.sequence.index + answer, line.position)

