"""Against figures worked out by hand for Qwen3-8B."""

from __future__ import annotations

import pytest

from nanopd.benchmark import floors
from nanopd.models.spec import load_spec


@pytest.fixture(scope="module")
def spec():
    return load_spec("qwen3-8b")


def test_weights(spec):
    layer = 4096 * 6144 + 4096 * 4096 + 4096 * 24576 + 12288 * 4096
    assert floors.linear_weights(spec) == 36 * layer
    assert floors.head_weights(spec) == 4096 * 151936
    assert 2 * (floors.linear_weights(spec) + floors.head_weights(spec)) == pytest.approx(15.14e9, rel=1e-3)


@pytest.mark.parametrize("batch, context, ms", [(1, 512, 3.5), (16, 1024, 4.1), (64, 1024, 5.7), (256, 1024, 13.9)])
def test_decode_floor(spec, batch, context, ms):
    assert floors.decode_floor_ms(spec, batch, context, 4340, 784)["floor_ms"] == pytest.approx(ms, abs=0.06)


def test_the_longer_of_reading_and_multiplying_counts(spec):
    few, many = (floors.decode_floor_ms(spec, batch, 1, 4340, 784) for batch in (1, 512))
    assert few["weight_ms"] > few["matmul_ms"]
    assert many["floor_ms"] == many["matmul_ms"] + many["kv_ms"]


@pytest.mark.parametrize("tokens, ms", [(512, 9.2), (2048, 38), (8192, 170)])
def test_prefill(spec, tokens, ms):
    assert floors.prefill_flops(spec, tokens) / 784e9 == pytest.approx(ms, rel=0.03)


def test_attention_counts_what_is_seen():
    assert floors.attention_flops(heads=2, head_dim=8, num_new=3) == 4 * 2 * 8 * (1 + 2 + 3)
    assert floors.attention_flops(heads=2, head_dim=8, num_new=3, num_before=5) == 4 * 2 * 8 * (6 + 7 + 8)
