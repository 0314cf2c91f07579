"""The cache's tensors: copies with snapshot semantics, gather and scatter, poison."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanopd.block_manager.cache import KVCache
from nanopd.config import ModelSpec

SPEC = ModelSpec("llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3, num_heads=4, num_kv_heads=2,
                 head_dim=6, max_position=64)
BLOCKS, BLOCK_SIZE = 8, 4


def make_cache(dtype=torch.float32) -> KVCache:
    cache = KVCache(SPEC, BLOCKS, BLOCK_SIZE, "cpu", dtype)
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(0)))
    return cache


class Counter(TorchDispatchMode):
    """Counts the operations that torch carries out."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_layout():
    cache = make_cache()
    assert cache.data.shape == (3, 2, BLOCKS, BLOCK_SIZE, 2, 6) and cache.data.is_contiguous()
    key, value = cache.layer(1)
    key[5, 2] = 7.0
    assert bool((cache.data[1, 0, 5, 2] == 7).all()) and value.data_ptr() == cache.data[1, 1].data_ptr()


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_per_block(dtype, size):
    assert make_cache(dtype).bytes_per_block == 3 * 2 * BLOCK_SIZE * 2 * 6 * size
    assert make_cache(dtype).bytes_per_block == SPEC.kv_bytes_per_token(size) * BLOCK_SIZE


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_copies_read_all_sources_first(data):
    destinations = data.draw(st.lists(st.integers(0, BLOCKS - 1), unique=True))
    pairs = [(data.draw(st.integers(0, BLOCKS - 1)), destination) for destination in destinations]
    cache = make_cache()
    before = cache.data.clone()
    cache.copy_blocks(pairs)
    expected = before.clone()
    for source, destination in pairs:
        expected[:, :, destination] = before[:, :, source]
    assert torch.equal(cache.data, expected)


def test_a_chain_and_a_swap():
    cache = make_cache()
    before = cache.data.clone()
    cache.copy_blocks([(0, 1), (1, 2), (6, 7), (7, 6)])
    for source, destination in ((0, 1), (1, 2), (6, 7), (7, 6)):
        assert torch.equal(cache.data[:, :, destination], before[:, :, source])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_gather_and_scatter(as_tensor):
    source, target = make_cache(), make_cache()
    target.poison(range(BLOCKS))
    ids, others = [6, 0, 3], [1, 5, 2]
    blocks = source.gather(1, torch.tensor(ids, dtype=torch.int32) if as_tensor else ids)
    assert blocks.shape == (2, 3, BLOCK_SIZE, 2, 6)
    target.scatter(2, torch.tensor(others) if as_tensor else others, blocks)
    assert torch.equal(target.data[2][:, others], source.data[1][:, ids])
    assert target.data.isfinite().sum() == blocks.numel()


def test_pack_and_unpack_some_layers():
    source, target = make_cache(), make_cache()
    target.poison(range(BLOCKS))
    packed = torch.empty(2, 2, 3, BLOCK_SIZE, 2, 6)
    source.pack(range(1, 3), [6, 0, 3], packed)
    target.unpack(range(2), [1, 5, 2], packed)
    assert torch.equal(target.data[:2, :, [1, 5, 2]], source.data[1:, :, [6, 0, 3]])
    assert target.data.isfinite().sum() == packed.numel()


def test_a_cache_of_memory_that_is_there():
    source = make_cache()
    same = KVCache.of(source.data)
    assert (same.num_blocks, same.block_size, same.num_layers, same.bytes_per_block) == (
        BLOCKS, BLOCK_SIZE, 3, source.bytes_per_block)
    same.poison([1])
    assert source.data[:, :, 1].isnan().all()


def test_gather_is_a_copy():
    cache = make_cache()
    blocks = cache.gather(0, [2])
    expected = blocks.clone()
    cache.poison([2])
    assert torch.equal(blocks, expected)


def test_poison():
    cache = make_cache()
    cache.poison([1, 4])
    assert bool(cache.data[:, :, [1, 4]].isnan().all())
    assert bool(cache.data[:, :, [0, 2, 3, 5, 6, 7]].isfinite().all())


@pytest.mark.parametrize("call", ["copy", "gather", "scatter", "poison"])
def test_a_fixed_number_of_launches(call):
    def operations(count: int) -> int:
        cache, blocks = make_cache(), torch.zeros(2, count, BLOCK_SIZE, 2, 6)
        calls = {"copy": lambda: cache.copy_blocks([(i, i + 4) for i in range(count)]),
                 "gather": lambda: cache.gather(0, range(count)), "poison": lambda: cache.poison(range(count)),
                 "scatter": lambda: cache.scatter(0, range(count), blocks)}
        with Counter() as counter:
            calls[call]()
        return counter.operations

    assert operations(1) == operations(4) <= 6


@pytest.mark.parametrize("call", [lambda cache: cache.copy_blocks([]), lambda cache: cache.gather(0, []),
                                  lambda cache: cache.poison([])])
def test_no_blocks_is_no_work(call):
    cache = make_cache()
    before = cache.data.clone()
    call(cache)
    assert torch.equal(cache.data, before)
