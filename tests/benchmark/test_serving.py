"""The engine's benchmarks, on the embedded model and the CPU: what they do, not how fast."""

from __future__ import annotations

import pytest

from nanopd import LLM
from nanopd.benchmark import ceilings, serving


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny", device="cpu", max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256,
             enable_prefix_caching=False) as llm:
        yield llm


@pytest.fixture(autouse=True)
def rate(monkeypatch):
    monkeypatch.setattr(ceilings, "matmul_tflop_s", lambda: 700.0)


def test_steady_decode_reaches_its_context_and_leaves_nothing_behind(llm):
    run = serving.steady_decode(llm.engine, batch=3, context=60, steps=10)
    assert run.context == pytest.approx(60, abs=4)
    assert run.step_ms > 0
    assert 0 < run.scheduling_us < run.step_ms * 1e3
    assert run.idle_share is None
    assert not llm.engine.has_work
    assert llm.engine.scheduler.manager.num_used_blocks == 0
    assert "schedule" not in vars(llm.engine.scheduler)


def test_decode_rows_stand_beside_their_floor(llm):
    row, = serving.decode_rows(llm, "tiny", [(2, 50)], read_gb_s=4000.0, steps=6)
    assert (row["batch"], row["context"]) == (2, 50)
    assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
    assert row["floor_ms"] == pytest.approx(max(row["weight_ms"], row["matmul_ms"]) + row["kv_ms"])


def test_prefill_rows(llm):
    row, = serving.prefill_rows(llm, "tiny", [100], repeats=2)
    assert row["tokens"] == 100
    assert row["share"] == pytest.approx(row["tflop_s"] / 700)
    assert not llm.engine.has_work


def test_serve_rows_count_every_token(llm):
    row, = serving.serve_rows(llm, "tiny", [(5, 8, 40)], output=12)
    assert row["tokens_s"] == pytest.approx(5 * 12 / row["s"])
    assert not llm.engine.has_work


def test_all_engines_get_the_same_prompts():
    lengths = serving.prompt_lengths(50, 64, 256)
    assert lengths == serving.prompt_lengths(50, 64, 256)
    assert 64 <= min(lengths) < max(lengths) <= 256


def test_a_request_that_fails_stops_the_benchmark(llm, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of order")

    monkeypatch.setattr(llm.engine.runner, "execute", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        serving.prompt_ms(llm.engine, 10)
