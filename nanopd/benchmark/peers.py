"""Other engines' kernels on the same inputs, for comparison. Optional: None where they are not installed."""

from __future__ import annotations

import os
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from nanopd.benchmark.timing import Call

WORKSPACE_BYTES = 2**27  # what FlashInfer recommends


def has_flashinfer() -> bool:
    return find_spec("flashinfer") is not None


def flashinfer_decode(out: Tensor, query: Tensor, caches: list[tuple[Tensor, Tensor]], table: Tensor, context: int,
                      tensor_cores: bool) -> list[Call]:
    """One call for each cache: decode attention of [rows, heads, head_dim], planned for CUDA graphs."""
    _prepare()
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    rows, blocks = table.shape
    block_size, kv_heads = caches[0][0].shape[1:3]
    starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * blocks
    last = torch.full((rows,), (context - 1) % block_size + 1, device="cuda", dtype=torch.int32)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "NHD", use_cuda_graph=True, use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=table.flatten().clone(), paged_kv_last_page_len_buffer=last.clone())
    wrapper.plan(starts, table.flatten(), last, query.shape[1], kv_heads, query.shape[2], block_size,
                 q_data_type=query.dtype, kv_data_type=query.dtype)
    return [partial(wrapper.run, query, cache, out=out) for cache in caches]


def cudnn_prefill(query: Tensor, key: Tensor, value: Tensor) -> Call:
    """cuDNN's attention of new tokens over contiguous keys and values [tokens, heads, head_dim].

    Behind a prefix it takes two calls, one over the prefix and a causal one, whose merge is not counted.
    """
    query, key, value = (tensor.transpose(0, 1)[None].contiguous() for tensor in (query, key, value))
    prefix = key.shape[2] - query.shape[2]
    parts = [(key[:, :, :prefix], value[:, :, :prefix], False)] if prefix else []
    parts.append((key[:, :, prefix:], value[:, :, prefix:], True))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention  # takes fewer KV heads than query heads

    def call() -> None:
        for keys, values, causal in parts:
            attend(query, keys, values, None, False, 0.0, causal)

    return call


def _prepare() -> None:
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if major >= 9 else ''}")


@cache
def _workspace() -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)
