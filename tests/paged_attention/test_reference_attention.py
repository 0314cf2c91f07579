"""The reference attention against the formula written out in float64, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd.paged_attention.ops import AttentionBatch, paged_attention, store_kv


class Scene:
    """Random rows in a cache that is NaN wherever no token of theirs lies.

    rows: (new tokens, tokens already cached) each. `store` puts the new tokens' K and V through `store_kv`.
    """

    def __init__(self, rows, *, block_size=4, kv_heads=2, group=2, head_dim=8, dtype=torch.float32, seed=0, spare=3):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.rows, self.head_dim = rows, head_dim
        counts = [-(-(new + cached) // block_size) for new, cached in rows]
        num_blocks = sum(counts) + spare
        order = torch.randperm(num_blocks, generator=generator).tolist()
        self.caches = torch.full((2, num_blocks, block_size, kv_heads, head_dim), float("nan"), dtype=dtype)
        self.contexts, keys, values, slots, tables = [], [], [], [], []
        for (new, cached), count in zip(rows, counts):
            table, order = order[:count], order[count:]
            context = random(2, new + cached, kv_heads, head_dim)
            row_slots = [table[p // block_size] * block_size + p % block_size for p in range(new + cached)]
            self.caches.flatten(1, 2)[:, row_slots[:cached]] = context[:, :cached]
            self.contexts.append(context)
            keys.append(context[0, cached:])
            values.append(context[1, cached:])
            slots += row_slots[cached:]
            tables.append(table + [0] * (max(counts) - count))
        total = sum(new for new, _ in rows)
        self.query = random(total, kv_heads * group, head_dim)
        self.key, self.value = torch.cat(keys), torch.cat(values)
        self.batch = AttentionBatch(torch.tensor(slots), torch.tensor(tables, dtype=torch.int32),
                                    [new for new, _ in rows], [new + cached for new, cached in rows])

    def attend(self, scale: float) -> torch.Tensor:
        store_kv(self.key, self.value, *self.caches, self.batch.slot_mapping)
        return paged_attention(self.query, *self.caches, self.batch, scale)

    def oracle(self, scale: float) -> torch.Tensor:
        """softmax(q k / sqrt(d)) v for one query head at a time, in float64."""
        output, token = torch.empty(self.query.shape, dtype=torch.float64), 0
        group = self.query.shape[1] // self.key.shape[1]
        for (new, cached), context in zip(self.rows, self.contexts):
            for position in range(cached, cached + new):
                for head in range(self.query.shape[1]):
                    keys, values = context[:, : position + 1, head // group].double()
                    weights = (keys @ self.query[token, head].double() * scale).softmax(0)
                    output[token, head] = weights @ values
                token += 1
        return output

    def check(self, rtol=1e-5, atol=1e-5, scale=0.35) -> None:
        output = self.attend(scale)
        assert output.dtype == self.query.dtype and output.shape == self.query.shape
        torch.testing.assert_close(output.double(), self.oracle(scale), rtol=rtol, atol=atol)


PREFILL, CHUNK, DECODE, VERIFY = (9, 0), (5, 7), (1, 10), (3, 6)


@pytest.mark.parametrize("rows", [
    [PREFILL], [CHUNK], [DECODE], [VERIFY], [(1, 0)], [(1, 3), (1, 4), (1, 5), (1, 0)],
    [DECODE, PREFILL, (1, 2), CHUNK, VERIFY, (3, 0)], [PREFILL, PREFILL, CHUNK],
], ids=str)
def test_rows(rows):
    Scene(rows).check()


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 64])
def test_block_sizes(block_size):
    Scene([DECODE, PREFILL, CHUNK, (1, 31), (2, 14)], block_size=block_size).check()


@pytest.mark.parametrize("kv_heads, group", [(1, 1), (3, 1), (1, 2), (2, 4), (1, 7), (2, 8), (1, 16)])
def test_heads_share_kv_heads_in_groups(kv_heads, group):
    Scene([DECODE, PREFILL, CHUNK], kv_heads=kv_heads, group=group).check()


@pytest.mark.parametrize("head_dim", [1, 6, 64, 128])
def test_head_sizes(head_dim):
    Scene([DECODE, PREFILL, CHUNK], head_dim=head_dim).check()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)])
def test_dtypes(dtype, tolerance):
    Scene([DECODE, PREFILL, CHUNK], dtype=dtype).check(rtol=tolerance, atol=tolerance)


def test_long_context():
    Scene([(1, 700), (40, 600), (1, 3)], block_size=16).check()


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=6),
       block_size=st.integers(1, 9), kv_heads=st.integers(1, 3), group=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_any_mixture(rows, block_size, kv_heads, group, seed):
    Scene(rows, block_size=block_size, kv_heads=kv_heads, group=group, seed=seed, spare=seed % 3).check()


def test_scale_is_applied():
    scene = Scene([PREFILL])
    for scale in (0.01, 1.0, 3.0):
        torch.testing.assert_close(scene.attend(scale).double(), scene.oracle(scale), rtol=1e-5, atol=1e-5)


def test_inputs_are_left_as_they_are():
    scene = Scene([DECODE, PREFILL, CHUNK])
    store_kv(scene.key, scene.value, *scene.caches, scene.batch.slot_mapping)
    query, caches = scene.query.clone(), scene.caches.clone()
    paged_attention(scene.query, *scene.caches, scene.batch, 0.3)
    assert torch.equal(scene.query, query)
    torch.testing.assert_close(scene.caches, caches, rtol=0, atol=0, equal_nan=True)


def test_store_touches_its_slots_alone():
    caches = torch.full((2, 5, 4, 2, 3), float("nan"))
    key, value = torch.randn(2, 3, 2, 3)
    slots = torch.tensor([19, 0, 6])
    store_kv(key, value, *caches, slots)
    flat = caches.flatten(1, 2)
    assert torch.equal(flat[0, slots], key) and torch.equal(flat[1, slots], value)
    others = [slot for slot in range(20) if slot not in slots]
    assert bool(flat[:, others].isnan().all())


def test_store_takes_parts_of_a_fused_projection():
    """Keys and values reach it as strided views."""
    caches = torch.zeros(2, 2, 4, 2, 3)
    key, value = torch.randn(3, 18).unflatten(1, (-1, 3)).split([4, 2], dim=1)
    store_kv(key[:, :2], value, *caches, torch.tensor([1, 2, 7]))
    assert torch.equal(caches[0].flatten(0, 1)[[1, 2, 7]], key[:, :2])


def test_a_cache_that_is_not_contiguous_is_refused():
    caches = torch.zeros(2, 4, 2, 2, 3).transpose(1, 2)
    with pytest.raises(RuntimeError, match="view"):
        store_kv(torch.ones(1, 2, 3), torch.ones(1, 2, 3), *caches, torch.tensor([0]))


def test_decodes_share_one_call(monkeypatch):
    """A Python loop over rows would cost more than the attention itself."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    Scene([(1, length) for length in range(16)] + [PREFILL]).check()
    assert len(calls) == 2
