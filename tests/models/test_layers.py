"""The layers' arithmetic in bfloat16, bit for bit: a cast out of place would drown in a whole model's rounding."""

from __future__ import annotations

import pytest
import torch

from nanopd.models.fused import rms_norm
from nanopd.models.parameters import FusedLinear, RMSNorm
from nanopd.models.rope import apply_rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_hugging_faces_to_the_bit(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs, ours = LlamaRMSNorm(64, eps=1e-5).to(dtype), RMSNorm(64, 1e-5, dtype=dtype)
    weight = random(64, dtype=dtype)
    theirs.weight.data.copy_(weight)
    ours.weight.copy_(weight)
    x = random(50, 64, dtype=dtype)
    assert torch.equal(rms_norm(x, ours), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_hugging_faces_to_the_bit(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = random(50, 4, 16, dtype=dtype), random(50, 2, 16, dtype=dtype)
    rotation = random(50, 16, dtype=dtype), random(50, 16, dtype=dtype)
    theirs = apply_rotary_pos_emb(query, key, *rotation)  # its heads axis is axis 1 too
    assert torch.equal(apply_rotary(query, rotation), theirs[0])
    assert torch.equal(apply_rotary(key, rotation), theirs[1])


@pytest.mark.parametrize("bias", [False, True])
def test_fused_projection_gives_each_part_in_order(bias):
    fused = FusedLinear(8, {"first": 6, "second": 2, "third": 3}, bias, dtype=torch.float32)
    fused.weight.copy_(random(11, 8, dtype=torch.float32))
    if bias:
        fused.bias.copy_(random(11, dtype=torch.float32))
    start = 0
    for weight, size in zip(fused.split(fused.weight, dim=0), (6, 2, 3)):
        assert torch.equal(weight, fused.weight[start : start + size])
        start += size
    assert [view.shape[0] for view in fused.split(fused.weight, dim=0)] == [6, 2, 3]
