"""Runners carry out plans. The scheduler never learns which one it feeds."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from nanopd.block_manager.cache import KVCache
from nanopd.core import RowResult, StepPlan, StepResult
from nanopd.engine.engine import OnLayer
from nanopd.engine.sampler import sample
from nanopd.models.decoder import Decoder
from nanopd.paged_attention.ops import AttentionBatch


class ModelRunner:
    """Runs plans through the model in plain torch, on any device: the reference for every other runner."""

    def __init__(self, model: Decoder, cache: KVCache, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.model = model
        self.cache = cache
        self.eos_token_ids = frozenset(eos_token_ids)

    def execute(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        start = time.perf_counter()
        with torch.inference_mode():
            self.cache.copy_blocks(plan.copies)
            token_ids, positions, batch = build_batch(plan, self.cache.block_size, self.cache.data.device)
            hidden = self.model(token_ids, positions, self.cache, batch, on_layer)
            drawing = [row for row in plan.rows if row.num_samples]
            results = [RowResult() for _ in plan.rows]
            if drawing:
                logits = self.model.logits(hidden[last_tokens(plan)])
                drawn = iter(sample(logits, drawing, self.eos_token_ids))
                results = [next(drawn) if row.num_samples else RowResult() for row in plan.rows]
        return StepResult(results, time.perf_counter() - start)


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> tuple[Tensor, Tensor, AttentionBatch]:
    """The plan as tensors: token ids and positions, int64 [T] each, and what attention has to know."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for row in plan.rows:
        row_positions = range(row.num_cached, row.num_cached + row.num_new)
        token_ids += row.token_ids
        positions += row_positions
        slots += [row.block_table[p // block_size] * block_size + p % block_size for p in row_positions]
    width = max(len(row.block_table) for row in plan.rows)
    tables = [row.block_table + [0] * (width - len(row.block_table)) for row in plan.rows]
    batch = AttentionBatch(
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        query_lens=[row.num_new for row in plan.rows],
        context_lens=[row.num_cached + row.num_new for row in plan.rows],
    )
    return torch.tensor(token_ids, device=device), torch.tensor(positions, device=device), batch


def last_tokens(plan: StepPlan) -> list[int]:
    """Where in the step's tokens the last one of each drawing row stands."""
    ends, end = [], 0
    for row in plan.rows:
        end += row.num_new
        if row.num_samples:
            ends.append(end - 1)
    return ends
