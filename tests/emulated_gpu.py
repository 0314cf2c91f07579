"""A GPU for the CUDA runner where there is none: every kernel's Python side is replaced by plain torch on the CPU.

What is real: the runner, its graphs' inputs and outputs, block tables, placeholders for tokens not drawn yet, and the
choice of kernels in `ops`, `fused`, `sampler` and `cache`. Each call is checked against the signature of the function
that it replaces. A graph is emulated by running the recorded step again and copying what it gives into the recorded
outputs, which is what a replay does.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from nanopd.engine import cuda_runner, sampler
from nanopd.engine.cuda_runner import CudaRunner, DecodeGraph
from nanopd.models.rope import apply_rotary
from nanopd.paged_attention import cuda, reference
from nanopd.paged_attention.batch import AttentionBatch

FEW_TOKENS = 8  # rows that the emulated `linear` takes


def rms_norm(x, weight, eps):
    normed = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return weight * normed.to(x.dtype)


def silu_and_mul(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def embed(token_ids, positions, last_drawn, weight, tables):
    known = torch.where(token_ids < 0, last_drawn[(-1 - token_ids).clamp(min=0)], token_ids)
    return weight[known], (tables[0][positions], tables[1][positions])


def rope_and_store(qkv, rotation, q_weight, k_weight, eps, key_cache, value_cache, slot_mapping, heads):
    kv_heads, head_dim = key_cache.shape[2:]
    query, key, value = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    if q_weight is not None:
        query, key = rms_norm(query, q_weight, eps), rms_norm(key, k_weight, eps)
    query, key = apply_rotary(query, rotation), apply_rotary(key, rotation)
    stored = slot_mapping >= 0
    reference.store_kv(key[stored], value[stored], key_cache, value_cache, slot_mapping[stored])
    return query


def greedy_sample(logits, out=None):
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    token_ids = logprobs.argmax(-1)
    found = token_ids, logprobs.gather(1, token_ids[:, None])[:, 0], logprobs.isnan().any(-1)
    if out is None:
        return found
    for target, values in zip(out, found, strict=True):
        target.copy_(values)
    return out


def move_blocks(target, target_ids, source, source_ids, max_thread_blocks=0):
    axis = target.dim() - 4
    moved = source if source_ids is None else source.index_select(axis, source_ids)
    ids = torch.arange(moved.shape[axis]) if target_ids is None else target_ids
    target.index_copy_(axis, ids, moved)


def plan_decode(contexts, key_cache, heads):
    return contexts.clone()


def decode_attention(out, query, key_cache, value_cache, block_tables, contexts, plan, scale):
    assert torch.equal(plan, contexts), "the plan is another step's"
    out[contexts == 0] = 0
    rows = [row for row, context in enumerate(contexts.tolist()) if context]
    if rows:
        batch = AttentionBatch(torch.empty(0), block_tables[rows], [1] * len(rows), contexts[rows].tolist())
        out[rows] = reference.paged_attention(query[rows], key_cache, value_cache, batch, scale)


def prefill_attention(out, query, key_cache, value_cache, block_tables, query_starts, contexts, max_query_len, scale):
    lengths = query_starts.diff().tolist()
    assert max(lengths) == max_query_len
    first, end = query_starts[0].item(), query_starts[-1].item()
    batch = AttentionBatch(torch.empty(0), block_tables, lengths, contexts.tolist())
    out[first:end] = reference.paged_attention(query[first:end], key_cache, value_cache, batch, scale)


def linear(x, weight, bias=None, *, norm_weight=None, eps=0.0, residual=None, silu=False):
    assert len(x) <= FEW_TOKENS
    y = F.linear(x if norm_weight is None else rms_norm(x, norm_weight, eps), weight, bias)
    y = silu_and_mul(y) if silu else y
    return y if residual is None else residual.add_(y)


KERNELS = (rms_norm, silu_and_mul, embed, rope_and_store, greedy_sample, move_blocks, plan_decode, decode_attention,
           prefill_attention, linear)


class Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Replay:
    """A recorded step: what it returned is overwritten at each replay."""

    def __init__(self, step) -> None:
        self.step = step
        self.logits, self.draws = step()

    @torch.inference_mode()
    def replay(self) -> None:
        logits, draws = self.step()
        self.logits.copy_(logits)
        self.draws.buffer.copy_(draws.buffer)


def record(step, library, pool) -> DecodeGraph:
    with torch.inference_mode():
        graph = Replay(step)
    return DecodeGraph(graph, library, graph.logits, graph.draws)


def emulate(monkeypatch, counts: dict[str, int]) -> None:
    """Replace what needs a GPU. `counts` gets the number of calls of each kernel."""
    def checked(kernel):
        signature = inspect.signature(getattr(cuda, kernel.__name__))

        def call(*args, **kwargs):
            signature.bind(*args, **kwargs)
            counts[kernel.__name__] = counts.get(kernel.__name__, 0) + 1
            return kernel(*args, **kwargs)
        return call

    for kernel in KERNELS:
        monkeypatch.setattr(cuda, kernel.__name__, checked(kernel))
    monkeypatch.setattr(cuda, "usable", lambda x: True)
    monkeypatch.setattr(cuda, "linear_supports", lambda x, weight, silu=False: len(x) <= FEW_TOKENS)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(DecodeGraph, "record", staticmethod(record))
    monkeypatch.setattr(cuda_runner, "pinned_bytes", lambda size: torch.zeros(size, dtype=torch.uint8))
    to_host = sampler.Draws.to_host

    def copied(draws):  # to pinned memory, on a GPU: the next step overwrites the original
        fields = (draws.token_ids, draws.logprobs, draws.broken, draws.top_ids, draws.top_logprobs)
        return to_host(sampler.Draws(*(None if field is None else field.clone() for field in fields)))

    monkeypatch.setattr(sampler.Draws, "to_host", copied)


def cuda_runner_for(llm, **options) -> CudaRunner:
    """The runner that a GPU would have, around a CPU engine's model and cache."""
    old = llm.engine.runner
    return CudaRunner(old.model, old.cache, tuple(old.eos_token_ids), max_num_seqs=llm.engine.scheduler.config.max_num_seqs,
                      max_len=llm.engine.scheduler.config.max_model_len, **options)
