"""Every CUDA kernel against float64 over random shapes, and what the operators refuse.

Outputs start as NaN, and so does every slot of the cache that no token lies in: what a kernel forgets to write, or
reads though it must not, shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanopd.paged_attention import cuda

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
FEW = settings(max_examples=60, deadline=None, derandomize=True, print_blob=True)
MANY = settings(FEW, max_examples=250)
NAN = float("nan")

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)
block_sizes = st.sampled_from([8, 16, 24, 32, 64, 128, 256])
head_dims = st.sampled_from([32, 64, 128, 64, 128, 256]) | st.integers(1, 32).map(lambda n: 8 * n)


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    from nanopd.paged_attention.build import load_kernels

    assert load_kernels()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, NAN, device="cuda", dtype=dtype)


def ints(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cuda")


def permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).cuda()


def assert_close(actual: Tensor, expected: Tensor, roundings: float = 2.0) -> None:
    """Within so many roundings of each element, or of a typical one where it is small."""
    assert not actual.isnan().any(), "an output was left NaN"
    unit = EPSILON[actual.dtype]
    typical = expected.double().square().mean().sqrt().item() if expected.numel() else 0.0
    error = (actual.double() - expected.double()).abs() / (expected.double().abs() + typical + 1e-30)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= roundings * unit, f"off by {worst / unit:.1f} roundings"


# ----------------------------------------------------------------------------------------------- layers and sampling


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@MANY
@given(rows=st.integers(1, 300), size=st.integers(1, 520) | st.integers(1, 512).map(lambda n: 16 * n), dtype=dtypes, seed=seeds)
@example(rows=1, size=4096, dtype=torch.bfloat16, seed=0)
@example(rows=700, size=8192, dtype=torch.float32, seed=0)
@example(rows=2, size=8191, dtype=torch.float16, seed=0)
def test_rms_norm(rows, size, dtype, seed) -> None:
    x, weight = normal(rows, size, dtype=dtype, seed=seed, scale=3), normal(size, dtype=dtype, seed=seed + 1)
    out = poisoned(rows, size, dtype=dtype)
    torch.ops.nanopd.rms_norm(out, x, weight, 1e-6)
    assert_close(out, normed(x, weight, 1e-6))
    assert torch.equal(cuda.rms_norm(x, weight, 1e-6), out)


@FEW
@given(rows=st.integers(1, 300), size=st.integers(1, 300) | st.integers(1, 800).map(lambda n: 16 * n), dtype=dtypes, seed=seeds)
def test_silu_and_mul(rows, size, dtype, seed) -> None:
    gate_up = normal(rows, 2 * size, dtype=dtype, seed=seed, scale=4)
    out = poisoned(rows, size, dtype=dtype)
    torch.ops.nanopd.silu_and_mul(out, gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@MANY
@given(tokens=st.integers(1, 150), kv_heads=st.integers(1, 5), group=st.integers(1, 5), dtype=dtypes, seed=seeds, norm=st.booleans(),
       head_dim=head_dims | st.sampled_from([2, 10, 24, 34, 96, 250]), block_size=st.integers(1, 40), skip=st.booleans())
@example(tokens=1, kv_heads=8, group=4, dtype=torch.bfloat16, seed=0, norm=True, head_dim=128, block_size=16, skip=False)
@example(tokens=5000, kv_heads=8, group=4, dtype=torch.bfloat16, seed=0, norm=True, head_dim=128, block_size=16, skip=True)
def test_rope_and_store(tokens, kv_heads, group, dtype, seed, norm, head_dim, block_size, skip) -> None:
    heads = kv_heads * group
    qkv = normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=seed)
    angles = normal(tokens, head_dim // 2, seed=seed + 1, scale=100).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = [normal(head_dim, dtype=dtype, seed=seed + 2 + i) for i in range(2)] if norm else [None, None]
    num_blocks = -(-tokens // block_size) + 2
    key_cache, value_cache = (poisoned(num_blocks, block_size, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    slots = permutation(num_blocks * block_size, seed)[:tokens]
    if skip:
        slots[::3] = -1
    before = qkv.clone()

    query = cuda.rope_and_store(qkv, (cos, sin), *weights, 1e-6, key_cache, value_cache, slots, heads)

    q, k, v = before.view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.double() if weight is None else normed(x, weight, 1e-6)
        first, second = x.chunk(2, dim=-1)
        return x * cos.double()[:, None] + torch.cat((-second, first), -1) * sin.double()[:, None]

    assert_close(query, turned(q, weights[0]), 6)
    stored = slots >= 0
    for cached, expected in ((key_cache, turned(k, weights[1])), (value_cache, v)):
        flat = cached.flatten(0, 1)
        assert_close(flat[slots[stored]], expected[stored], 6)
        untouched = torch.ones(len(flat), dtype=torch.bool, device="cuda")
        untouched[slots[stored]] = False
        assert flat[untouched].isnan().all()


@FEW
@given(tokens=st.integers(1, 40), hidden=st.integers(1, 600), head_dim=st.sampled_from([8, 10, 64, 128]), dtype=dtypes, seed=seeds)
def test_embed(tokens, hidden, head_dim, dtype, seed) -> None:
    weight, tables = normal(50, hidden, dtype=dtype, seed=seed), [normal(99, head_dim, dtype=dtype, seed=seed + i) for i in (1, 2)]
    generator = torch.Generator().manual_seed(seed)
    last_drawn = torch.randint(0, 50, (7,), generator=generator).cuda()
    token_ids = torch.randint(-7, 50, (tokens,), generator=generator).cuda()
    positions = torch.randint(0, 99, (tokens,), generator=generator).cuda()
    out, (cos, sin) = cuda.embed(token_ids, positions, last_drawn, weight, (tables[0], tables[1]))
    known = torch.where(token_ids < 0, last_drawn[(-1 - token_ids).clamp(min=0)], token_ids)
    assert torch.equal(out, weight[known])
    assert torch.equal(cos, tables[0][positions]) and torch.equal(sin, tables[1][positions])


@FEW
@given(rows=st.integers(1, 70), vocab=st.integers(1, 5000) | st.sampled_from([32000, 128256, 151936]), dtype=dtypes, seed=seeds)
@example(rows=1, vocab=151936, dtype=torch.bfloat16, seed=0)
@example(rows=256, vocab=151936, dtype=torch.float32, seed=0)
def test_greedy_sample(rows, vocab, dtype, seed) -> None:
    logits = normal(rows, vocab, dtype=dtype, seed=seed, scale=5)
    outputs = (torch.full((rows,), -9, device="cuda"), poisoned(rows, dtype=torch.float32),
               torch.ones(rows, device="cuda", dtype=torch.bool))
    torch.ops.nanopd.greedy_sample(*outputs, logits)
    token_ids, logprobs, broken = outputs
    best = logits.max(dim=-1, keepdim=True).values
    first = torch.where(logits == best, torch.arange(vocab, device="cuda"), vocab).min(dim=-1).values
    assert torch.equal(token_ids, first)
    torch.testing.assert_close(logprobs.double(), torch.log_softmax(logits.double(), -1).max(-1).values, atol=2e-5, rtol=1e-5)
    assert not broken.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 4096, 151936])
def test_greedy_sample_knows_broken_rows(dtype, vocab) -> None:
    logits = normal(7, vocab, dtype=dtype)
    logits[1, vocab // 2] = NAN
    logits[2, vocab - 1] = float("inf")
    logits[3] = -float("inf")
    logits[4] = NAN
    logits[5, : vocab - 1] = -float("inf")  # one token is possible
    logits[6] = -float("inf")
    logits[6, vocab - 1] = NAN
    token_ids, logprobs, broken = cuda.greedy_sample(logits)
    assert broken.tolist() == [False, True, True, True, True, False, True]
    assert token_ids[5] == vocab - 1 and logprobs[5] == 0
    assert ((token_ids >= 0) & (token_ids < vocab)).all()


# ------------------------------------------------------------------------------------------------------ moving blocks


@FEW
@given(planes=st.lists(st.integers(1, 3), max_size=2), blocks=st.integers(1, 40), block_size=st.integers(1, 33),
       kv_heads=st.integers(1, 5), head_dim=st.sampled_from([1, 8, 64, 128]), dtype=dtypes, seed=seeds,
       with_ids=st.tuples(st.booleans(), st.booleans()))
def test_move_blocks(planes, blocks, block_size, kv_heads, head_dim, dtype, seed, with_ids) -> None:
    shape = block_size, kv_heads, head_dim
    source, target = normal(*planes, blocks, *shape, dtype=dtype, seed=seed), poisoned(*planes, blocks + 3, *shape, dtype=dtype)
    target_ids = permutation(blocks + 3, seed)[:blocks] if with_ids[0] else None
    source_ids = permutation(blocks, seed + 1) if with_ids[1] else None
    cuda.move_blocks(target, target_ids, source, source_ids)
    everything = slice(0, blocks)
    assert torch.equal(target[..., everything if target_ids is None else target_ids, :, :, :],
                       source[..., everything if source_ids is None else source_ids, :, :, :])
    assert target.isnan().sum() == 3 * source.numel() // blocks


@pytest.mark.parametrize("max_thread_blocks", [1, 3, 10**6])
def test_move_blocks_on_a_few_thread_blocks(max_thread_blocks) -> None:
    source = normal(2, 50, 16, 2, 64)
    target = poisoned(2, 60, 16, 2, 64, dtype=source.dtype)
    source_ids, target_ids = permutation(50, 1)[:40], permutation(60, 2)[:40]
    cuda.move_blocks(target, target_ids, source, source_ids, max_thread_blocks)
    assert torch.equal(target[:, target_ids], source[:, source_ids])
    assert target.isnan().sum() == 20 * target[:, 0].numel()


def test_move_blocks_within_one_cache() -> None:
    cache = normal(4, 2, 50, 16, 2, 64)
    ids = permutation(50, 1)
    cuda.move_blocks(cache, ids[:20], cache, ids[20:40])
    assert torch.equal(cache[:, :, ids[:20]], cache[:, :, ids[20:40]])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_move_blocks_between_two_gpus() -> None:
    source, target = normal(2, 30, 16, 2, 64), torch.zeros(2, 40, 16, 2, 64, device="cuda:1")
    for where in ("cuda:0", "cuda:1"):
        source_ids, target_ids = (permutation(count, 2)[:25].to(where) for count in (30, 40))
        target.fill_(NAN)
        cuda.move_blocks(target, target_ids, source, source_ids)
        torch.cuda.synchronize(where)
        assert torch.equal(target[:, target_ids.to("cuda:1")].cpu(), source[:, source_ids.to("cuda:0")].cpu())


# ---------------------------------------------------------------------------------------------------------- attention


@dataclass
class AttentionCase:
    """Rows of (new tokens, context) in a cache of scattered blocks, NaN wherever no token lies."""

    rows: list[tuple[int, int]]
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    strided: bool = True  # the query is a part of the fused projections
    width: int | None = None  # of the block tables
    query: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.heads = self.kv_heads * self.group
        self.num_tokens = sum(new for new, _ in self.rows)
        self.scale = self.head_dim**-0.5
        blocks_of = [-(-context // self.block_size) for _, context in self.rows]
        width = self.width or max(1, *blocks_of)
        free = permutation(sum(blocks_of) + 3, self.seed)
        self.num_blocks = len(free)
        self.block_tables = torch.randint(self.num_blocks, (len(self.rows), width), generator=torch.Generator().manual_seed(self.seed),
                                          dtype=torch.int32).cuda()  # padded with any block
        shape = self.num_blocks, self.block_size, self.kv_heads, self.head_dim
        self.key_cache, self.value_cache = (poisoned(*shape, dtype=self.dtype) for _ in range(2))
        self.tokens_of: list[tuple[Tensor, Tensor]] = []
        for row, (blocks, (_, context)) in enumerate(zip(blocks_of, self.rows)):
            table, free = free[:blocks], free[blocks:]
            self.block_tables[row, :blocks] = table
            slots = (table[:, None] * self.block_size + torch.arange(self.block_size, device="cuda")).flatten()[:context]
            key, value = (normal(context, self.kv_heads, self.head_dim, dtype=self.dtype, seed=self.seed + 2 * row + i)
                          for i in (1, 2))
            self.key_cache.flatten(0, 1)[slots], self.value_cache.flatten(0, 1)[slots] = key, value
            self.tokens_of.append((key, value))
        extra = 2 * self.kv_heads if self.strided else 0
        fused = normal(self.num_tokens, self.heads + extra, self.head_dim, dtype=self.dtype, seed=self.seed, scale=2)
        self.query = fused[:, : self.heads]
        self.contexts = ints([context for _, context in self.rows])
        self.query_starts = torch.tensor([0, *(new for new, _ in self.rows)]).cumsum(0).int().cuda()
        self.cache = self.key_cache, self.value_cache

    def out(self) -> Tensor:
        return poisoned(self.num_tokens, self.heads, self.head_dim, dtype=self.dtype)

    def expected(self) -> Tensor:
        parts = []
        for (new, context), (key, value), query in zip(self.rows, self.tokens_of, self.query.split([n for n, _ in self.rows])):
            if context == 0:
                parts.append(torch.zeros_like(query, dtype=torch.float64))
                continue
            key, value = (x.double().repeat_interleave(self.group, dim=1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query.double(), key) * self.scale
            visible = torch.arange(context, device="cuda") <= torch.arange(context - new, context, device="cuda")[:, None]
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, value))
        return torch.cat(parts)

    def naive(self) -> Tensor:
        out = self.out()
        cuda.naive_attention(out, self.query, *self.cache, self.block_tables, self.query_starts, self.contexts, self.scale)
        return out

    def prefill(self) -> Tensor:
        out = self.out()
        cuda.prefill_attention(out, self.query, *self.cache, self.block_tables, self.query_starts, self.contexts,
                               max(new for new, _ in self.rows), self.scale)
        return out

    def decode(self) -> Tensor:
        out = self.out()
        plan = cuda.plan_decode(self.contexts, self.key_cache, self.heads)
        cuda.decode_attention(out, self.query, *self.cache, self.block_tables, self.contexts, plan, self.scale)
        return out


def assert_attention(actual: Tensor, case: AttentionCase) -> None:
    # below float32 the weights are rounded before they meet the values; in float32 it is sums of thousands that count
    assert_close(actual, case.expected(), 4 if case.dtype != torch.float32 else 200)


contexts = st.integers(1, 40) | st.integers(1, 700) | st.sampled_from([15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 2048, 3000])
shapes = dict(kv_heads=st.integers(1, 4), group=st.integers(1, 9), head_dim=head_dims, block_size=block_sizes, dtype=dtypes,
              seed=seeds, strided=st.booleans())


@MANY
@given(contexts=st.lists(contexts | st.just(0), min_size=1, max_size=20), shape=st.fixed_dictionaries(shapes))
@example(contexts=[1], shape={})
@example(contexts=[0, 0], shape={})
@example(contexts=[5000] * 3, shape=dict(kv_heads=8, head_dim=128))
def test_decode_attention(contexts, shape) -> None:
    case = AttentionCase([(1, context) for context in contexts], **shape)
    assert_attention(case.decode(), case)


@MANY
@given(rows=st.lists(st.tuples(st.integers(1, 5) | st.integers(1, 150) | st.sampled_from([64, 128]), st.just(0) | contexts),
                     min_size=1, max_size=6), shape=st.fixed_dictionaries(shapes))
@example(rows=[(1, 0)], shape={})
@example(rows=[(512, 1500), (1, 900), (64, 0)], shape=dict(kv_heads=8, head_dim=128))
def test_prefill_attention(rows, shape) -> None:
    """Rows of (new tokens, tokens cached before)."""
    case = AttentionCase([(new, new + cached) for new, cached in rows], **shape)
    assert_attention(case.prefill(), case)


@FEW
@given(rows=st.lists(st.tuples(st.integers(1, 20), st.just(0) | contexts), min_size=1, max_size=6), shape=st.fixed_dictionaries(shapes))
def test_naive_attention(rows, shape) -> None:
    case = AttentionCase([(new, new + cached) for new, cached in rows], **shape)
    assert_attention(case.naive(), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_over_a_long_context(dtype) -> None:
    case = AttentionCase([(1, 140_000), (1, 3)], kv_heads=1, group=2, dtype=dtype)
    assert_attention(case.decode(), case)
    case = AttentionCase([(3, 140_000), (70, 71)], kv_heads=1, group=2, dtype=dtype)
    assert_attention(case.prefill(), case)


def test_offsets_beyond_two_to_the_31() -> None:
    """A cache of 2^32 elements, of which the last block is used."""
    num_blocks, block_size, kv_heads, head_dim = 2**17, 16, 16, 128
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    case = AttentionCase([(1, 11)], kv_heads=kv_heads, group=1, head_dim=head_dim)
    large = [torch.empty(num_blocks, block_size, kv_heads, head_dim, dtype=case.dtype, device="cuda") for _ in range(2)]
    for cache, small in zip(large, case.cache):
        cache[-1] = small[case.block_tables[0, 0]]
    case.cache, case.key_cache, case.block_tables = tuple(large), large[0], ints([[num_blocks - 1]])
    for kernel in (case.decode, case.prefill, case.naive):
        assert_attention(kernel(), case)


def test_a_graph_replays_with_other_lengths() -> None:
    """What a step does, recorded with one set of contexts, slots and tables and replayed with others."""
    rows, width, kv_heads, heads, head_dim, block_size = 6, 20, 2, 8, 64, 16
    caches = [torch.empty(rows * width, block_size, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    static = dict(qkv=normal(rows, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16), contexts=ints([1] * rows),
                  slots=ints([-1] * rows, torch.int64), tables=ints([[0] * width] * rows))
    rotation = tuple(normal(rows, head_dim, dtype=torch.bfloat16, seed=i) for i in (1, 2))
    out = torch.empty(rows, heads, head_dim, dtype=torch.bfloat16, device="cuda")

    def step() -> None:
        query = cuda.rope_and_store(static["qkv"], rotation, None, None, 0.0, *caches, static["slots"], heads)
        plan = cuda.plan_decode(static["contexts"], caches[0], heads)
        for _ in range(2):  # layers share the plan
            cuda.decode_attention(out, query, *caches, static["tables"], static["contexts"], plan, head_dim**-0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(8):
        lengths = torch.randint(0, width * block_size + 1, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
        lengths[seed % rows] = [0, 1, 16, 17, width * block_size][seed % 5]
        case = AttentionCase([(1, length) for length in lengths], kv_heads, heads // kv_heads, head_dim, block_size, seed=seed, width=width)
        for cache, small in zip(caches, case.cache):
            cache.fill_(NAN)[: case.num_blocks] = small
        fused = normal(rows, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16, seed=seed)
        static["tables"].copy_(case.block_tables)
        static["contexts"].copy_(case.contexts)
        static["slots"].fill_(-1)
        static["qkv"].copy_(fused)
        out.fill_(NAN)
        graph.replay()
        case.query = static["qkv"].view(rows, -1, head_dim)[:, :heads]  # turned in place
        assert_attention(out, case)


# ------------------------------------------------------------------------------------------------------------- linear


def check_linear(x: Tensor, weight: Tensor, seed: int, bias: bool, norm: bool, residual: bool, silu: bool) -> None:
    tokens, (out_features, in_features), dtype = len(x), weight.shape, x.dtype
    if norm:  # no two tokens have the same root mean square
        x = x * torch.arange(1, tokens + 1, device="cuda", dtype=dtype)[:, None]
    columns = out_features // 2 if silu else out_features
    biases = normal(out_features, dtype=dtype, seed=seed + 2) if bias else None
    norms = normal(in_features, dtype=dtype, seed=seed + 3) if norm else None
    added = normal(tokens, columns, dtype=dtype, seed=seed + 4) if residual else None
    ones = torch.ones_like(x[0])
    expected = ((normed(x, ones, 1e-6).to(dtype) * norms) if norm else x).double()  # rounded as rms_norm rounds
    expected = expected @ weight.double().T + (biases.double() if bias else 0)
    if silu:
        gate, up = expected.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
    expected = expected + added.double() if residual else expected
    for _ in range(2):
        target = added.clone() if residual else None
        out = cuda.linear(x, weight, biases, norm_weight=norms, eps=1e-6, residual=target, silu=silu)
        assert_close(out, expected, 4)
        assert target is None or out is target


@MANY
@given(tokens=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17]), in_features=st.sampled_from([64, 192, 256, 1000, 1536, 4096, 4160]),
       out_features=st.sampled_from([64, 192, 1536, 4096, 6144]), dtype=st.sampled_from(DTYPES[1:]), seed=seeds,
       bias=st.booleans(), norm=st.booleans(), residual=st.booleans(), silu=st.booleans())
@example(1, 4096, 24576, torch.bfloat16, 0, False, True, False, True)
@example(1, 12288, 4096, torch.bfloat16, 0, False, False, True, False)
def test_linear(tokens, in_features, out_features, dtype, seed, bias, norm, residual, silu) -> None:
    x = normal(tokens, in_features, dtype=dtype, seed=seed)
    weight = normal(out_features, in_features, dtype=dtype, seed=seed + 1, scale=in_features**-0.5)
    if cuda.linear_supports(x, weight, silu):
        check_linear(x, weight, seed, bias, norm, residual, silu)


@pytest.mark.parametrize("in_features", [1024, 4096, 5120, 12288])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
def test_linear_with_every_neighbour(tokens, in_features) -> None:
    """Several tiles for each thread block, the last of them cut off."""
    x = normal(tokens, in_features, dtype=torch.bfloat16)
    weight = normal(4104, in_features, dtype=torch.bfloat16, seed=1, scale=in_features**-0.5)
    for bias, norm, residual, silu in product([False, True], repeat=4):
        check_linear(x, weight, 5, bias, norm, residual, silu)


def test_linear_serves_one_token_of_the_usual_models() -> None:
    for in_features, out_features, silu in [(4096, 6144, False), (4096, 4096, False), (4096, 24576, True), (12288, 4096, False)]:
        assert cuda.linear_supports(normal(1, in_features, dtype=torch.bfloat16),
                                    torch.empty(out_features, in_features, dtype=torch.bfloat16, device="cuda"), silu)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_operators_name_what_is_wrong() -> None:
    case = AttentionCase([(1, 20), (1, 7)])
    plan = cuda.plan_decode(case.contexts, case.key_cache, case.heads)
    good = dict(out=case.out(), query=case.query, key_cache=case.key_cache, value_cache=case.value_cache,
                block_tables=case.block_tables, contexts=case.contexts, plan=plan, scale=0.1)
    wrong = {
        "out must have the shape": dict(out=case.out()[:, :-1]),
        "out must be contiguous": dict(out=case.out().transpose(0, 1).contiguous().transpose(0, 1)),
        "query must be bfloat16, but is float32": dict(query=case.query.float()),
        "query must be on a CUDA device": dict(query=case.query.cpu()),
        "query must be contiguous in all but": dict(query=case.query.transpose(1, 2).contiguous().transpose(1, 2)),
        "query has 7 heads": dict(query=case.query[:, :7], out=case.out()[:, :7].contiguous()),
        "key_cache must have 4 dimensions": dict(key_cache=case.key_cache[0]),
        "key_cache must be float32, float16 or bfloat16": dict(key_cache=case.key_cache.double()),
        "value_cache must have the shape": dict(value_cache=case.value_cache[1:]),
        "block_tables must be int32, but is int64": dict(block_tables=case.block_tables.long()),
        "block_tables must have the shape": dict(block_tables=case.block_tables[:1]),
        "context_lens must be int32": dict(contexts=case.contexts.float()),
        "query has 2 tokens, but context_lens 1": dict(contexts=case.contexts[:1], block_tables=case.block_tables[:1]),
        "plan must have at least": dict(plan=plan[:1]),
        "plan must be on a CUDA device": dict(plan=plan.cpu()),
    }
    for message, changes in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            cuda.decode_attention(**{**good, **changes})
    x = normal(3, 8)
    for message, call in {
        "weight must have the shape": lambda: cuda.rms_norm(x, x[0, :4], 1e-6),
        "x must have 2 dimensions": lambda: cuda.rms_norm(x[0], x[0], 1e-6),
        "even number of columns": lambda: cuda.silu_and_mul(x[:, :7].contiguous()),
        "logits must be contiguous": lambda: cuda.greedy_sample(x.T),
        "logits must be float32, float16 or bfloat16": lambda: cuda.greedy_sample(x.long()),
        "max_thread_blocks must be positive, or 0": lambda: cuda.move_blocks(case.key_cache, None, case.value_cache, None, -1),
        "target_ids must be int64": lambda: cuda.move_blocks(case.key_cache, ints([1]), case.value_cache, ints([2]).long()),
        "source has 1 planes": lambda: cuda.move_blocks(case.key_cache, None, case.value_cache[:, :4].contiguous(), None),
        "slot_mapping must have the shape": lambda: cuda.rope_and_store(
            normal(2, 12 * 64, dtype=case.dtype), (normal(2, 64, dtype=case.dtype),) * 2, None, None, 0.0, *case.cache,
            ints([1], torch.int64), 8),
        "num_rows must be positive": lambda: torch.ops.nanopd.decode_plan_bytes(-1),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_debug_switch_checks_what_lies_on_the_device(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "DEBUG", True)
    case = AttentionCase([(2, 20), (1, 7)])
    assert_attention(case.prefill(), case)
    case.block_tables[0, 1] = case.num_blocks
    with pytest.raises(ValueError, match=f"block_tables must lie in 0 to {case.num_blocks - 1}, but {case.num_blocks}"):
        case.prefill()
    case.contexts[0] = 1000
    with pytest.raises(ValueError, match="contexts must lie in 0 to"):
        case.prefill()
    with pytest.raises(ValueError, match="target_ids must lie in"):
        cuda.move_blocks(case.key_cache, ints([-1], torch.int64), case.value_cache, ints([0], torch.int64))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus() -> None:
    """Operators run where their tensors are, and refuse those of two GPUs."""
    x = normal(3, 64)
    there = x.to("cuda:1")
    assert torch.equal(cuda.rms_norm(there, there[0], 1e-6).cpu(), cuda.rms_norm(x, x[0], 1e-6).cpu())
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="weight is on cuda:0, but x on cuda:1"):
        cuda.rms_norm(there, x[0], 1e-6)
