"""Runners carry out plans. The scheduler never learns which one it feeds."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from nanopd.block_manager.cache import KVCache
from nanopd.core import StepPlan, StepResult
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
            logits = self.model.logits(hidden[drawing_tokens(plan)])
            results = sample(logits, plan.rows, self.eos_token_ids)
        return StepResult(results, time.perf_counter() - start)


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> tuple[Tensor, Tensor, AttentionBatch]:
    """The plan as tensors: token ids and positions, int64 [T] each, and what attention has to know."""
    width = max(len(row.block_table) for row in plan.rows)
    tables = [row.block_table + [0] * (width - len(row.block_table)) for row in plan.rows]
    batch = AttentionBatch(
        slot_mapping=torch.tensor(slots(plan, block_size), dtype=torch.int64, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        query_lens=[row.num_new for row in plan.rows],
        context_lens=[row.num_cached + row.num_new for row in plan.rows],
    )
    token_ids = [token for row in plan.rows for token in row.token_ids]
    return torch.tensor(token_ids, device=device), torch.tensor(positions(plan), device=device), batch


def positions(plan: StepPlan) -> list[int]:
    """Of each new token, in its sequence."""
    return [position for row in plan.rows for position in range(row.num_cached, row.num_cached + row.num_new)]


def slots(plan: StepPlan, block_size: int) -> list[int]:
    """Where each new token's K and V go: block * block_size + offset in the block."""
    return [row.block_table[p // block_size] * block_size + p % block_size
            for row in plan.rows for p in range(row.num_cached, row.num_cached + row.num_new)]


def drawing_tokens(plan: StepPlan) -> list[int]:
    """Where in the step's tokens those stand after which a token is drawn."""
    found, end = [], 0
    for row in plan.rows:
        end += row.num_new
        found += range(end - row.num_logits, end)
    return found
