"""From logits to tokens. Every draw is a pure function of (request seed, answer, position).

A token is drawn by inverting the cumulative distribution at one uniform number, and that number comes from a
counter, not from a generator's state. So a draw does not depend on the rest of the batch, on the device, on
a preemption or on the worker where it happens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanopd.core import PlanRow, RowResult

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


def sample(logits: Tensor, rows: list[PlanRow], eos_token_ids: frozenset[int]) -> list[RowResult]:
    """Draw each row's tokens.

    Args:
        logits: float32 [rows, vocabulary].
        rows: those of the plan that draw, in the order of the logits.

    A row whose logits hold a NaN or +inf, or are all -inf, gets an error instead of a token made of it.
    """
    if not rows:
        return []
    logprobs = torch.log_softmax(logits, dim=-1)
    broken = logprobs.isnan().any(dim=-1).tolist()
    adjusted = _adjust(logits, rows, eos_token_ids)
    counts = [row.num_samples for row in rows]
    tokens = torch.repeat_interleave(adjusted.argmax(dim=-1), torch.tensor(counts, device=logits.device))
    slots = [(i, answer) for i, row in enumerate(rows) for answer in range(row.num_samples)]
    drawn = [slot for slot, (i, _) in enumerate(slots) if rows[i].request.beam is None and not rows[i].request.sampling.greedy]
    if drawn:
        tokens[drawn] = _draw(adjusted, rows, [slots[slot] for slot in drawn])
    chosen = logprobs[torch.tensor([i for i, _ in slots], device=logits.device), tokens].tolist()
    return _collect(rows, broken, tokens.tolist(), chosen, logprobs)


def _adjust(logits: Tensor, rows: list[PlanRow], eos_token_ids: frozenset[int]) -> Tensor:
    """Repetition penalties, and no end before min_tokens."""
    adjusted = logits
    for i, row in enumerate(rows):
        sampling, sequence = row.request.sampling, row.sequence
        too_short = sequence.num_output < sampling.min_tokens
        if row.request.beam or (sampling.repetition_penalty == 1 and not too_short):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits.device)
            values = adjusted[i, seen]
            penalty = sampling.repetition_penalty
            adjusted[i, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if too_short:
            adjusted[i, sorted(eos_token_ids | set(sampling.stop_token_ids))] = -torch.inf
    return adjusted


def _draw(logits: Tensor, rows: list[PlanRow], slots: list[tuple[int, int]]) -> Tensor:
    """One token for each (row, answer) slot: temperature, then top-k, top-p and min-p, then the draw."""
    params = [rows[i].request.sampling for i, _ in slots]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    picked = logits[torch.tensor([i for i, _ in slots], device=logits.device)]
    temperature = column([p.temperature for p in params]).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = (picked - picked.amax(dim=-1, keepdim=True)) / temperature  # the best is 0, so that nothing overflows
    ordered, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    ordered = ordered.masked_fill(rank >= column([p.top_k or ordered.shape[1] for p in params]), -torch.inf)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # the mass of all likelier tokens
    keep = (before < column([p.top_p for p in params])) & (probs >= column([p.min_p for p in params]) * probs[:, :1])
    keep &= probs > 0  # what top-k or min_tokens has cut off
    keep[:, 0] = True
    mass = (probs * keep).cumsum(dim=-1)
    points = column([_uniform_for(rows[i], answer) for i, answer in slots]) * mass[:, -1:]
    position = torch.searchsorted(mass, points, right=True).clamp_(max=mass.shape[1] - 1)
    position = torch.minimum(position, keep.sum(dim=-1, keepdim=True) - 1)  # rounding must not pass the last kept
    return token_ids.gather(1, position).squeeze(1)


def _uniform_for(row: PlanRow, answer: int) -> float:
    return uniform(row.request.seed, row.sequence.index + answer, row.sequence.num_output)


def _collect(rows: list[PlanRow], broken: list[bool], tokens: list[int], chosen: list[float],
             logprobs: Tensor) -> list[RowResult]:
    results = []
    start = 0
    for i, row in enumerate(rows):
        stop = start + row.num_samples
        if broken[i]:
            results.append(RowResult(error="the model's logits held NaN or infinity"))
        else:
            results.append(RowResult(tokens[start:stop], chosen[start:stop], _top(logprobs[i], row.num_top)))
        start = stop
    return results


def _top(logprobs: Tensor, k: int) -> list[tuple[int, float]]:
    if k == 0:
        return []
    values, token_ids = logprobs.topk(min(k, logprobs.shape[0]))
    return list(zip(token_ids.tolist(), values.tolist(), strict=True))
