"""Rotary frequencies against transformers' own, and what the scalings are meant to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import ROPE
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd.config import RopeScaling
from nanopd.models.loader import load_spec
from nanopd.models.rope import RotaryEmbedding, apply_rotary, inverse_frequencies


def make_spec(scaling: dict | None = None, theta: float = 1e6, head_dim: int = 128):
    params = dict(scaling or {"rope_type": "default"})
    return replace(load_spec("qwen3-8b"), head_dim=head_dim, rope_theta=theta,
                   rope_scaling=RopeScaling(params.pop("rope_type"), params))


yarn = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": st.floats(1.0, 40.0),
     "original_max_position_embeddings": st.integers(64, 65536)},
    optional={"attention_factor": st.floats(0.5, 2.0), "mscale": st.floats(0.1, 2.0),
              "mscale_all_dim": st.floats(0.1, 2.0), "beta_fast": st.floats(8, 64), "beta_slow": st.floats(0.5, 4),
              "truncate": st.booleans()})
llama3 = st.fixed_dictionaries(
    {"rope_type": st.just("llama3"), "factor": st.floats(1.0, 40.0), "low_freq_factor": st.floats(0.5, 2.0),
     "high_freq_factor": st.floats(3.0, 8.0), "original_max_position_embeddings": st.integers(64, 65536)})
linear = st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1.0, 40.0)})


@settings(max_examples=60, deadline=None)
@given(scaling=yarn | llama3 | linear, theta=st.sampled_from([1e4, 5e5, 1e6]), head_dim=st.sampled_from([16, 64, 128]))
def test_scaled_frequencies_are_those_of_transformers(scaling, theta, head_dim):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=131072,
                         rope_parameters={"rope_theta": theta, **scaling})
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    inv_freq, factor = inverse_frequencies(make_spec(scaling, theta, head_dim))
    torch.testing.assert_close(inv_freq, expected, rtol=2e-6, atol=1e-12)
    assert factor == pytest.approx(expected_factor)


def test_frequencies_by_the_formula():
    inv_freq, factor = inverse_frequencies(make_spec())
    expected = torch.tensor([1e6 ** -(2 * i / 128) for i in range(64)])
    torch.testing.assert_close(inv_freq, expected)
    assert factor == 1.0


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_fast_rotations_stay_and_slow_ones_are_stretched(kind):
    plain, _ = inverse_frequencies(make_spec())
    scaled, _ = inverse_frequencies(make_spec(ROPE[kind]))
    factor = ROPE[kind]["factor"]
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / factor)
    assert bool((scaled <= plain * 1.000001).all() and (scaled >= plain / factor * 0.999999).all())


def test_scores_depend_on_the_distance_alone():
    rotary = RotaryEmbedding(make_spec(theta=1e4, head_dim=32))
    query, key = torch.randn(2, 1, 1, 32, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        turned = [apply_rotary(x, rotary(torch.tensor([p]), torch.float64))
                  for x, p in ((query, query_position), (key, key_position))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(109, 104), abs=1e-3)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)
    assert score(0, 0) == pytest.approx(float((query * key).sum()))
