from __future__ import annotations

import pytest
import torch

from nanopd.benchmark import attention, peers
from nanopd.benchmark.environment import CannotMeasure
from nanopd.benchmark.timing import ROTATED_BYTES, num_sets


def row(batch, context, kernel, us, share=0.5):
    return {"op": "decode_attention", "batch": batch, "context": context, "kernel": kernel, "us": us, "share": share}


def test_decode_summary_takes_flashinfer_s_faster_path():
    slow, fast = attention.FLASHINFER
    rows = [row(1, 512, attention.OURS, 10.0), row(1, 512, slow, 40.0), row(1, 512, fast, 20.0),
            row(64, 4096, attention.OURS, 10.0, 0.9), row(64, 4096, slow, 5.0), row(64, 4096, fast, 8.0)]
    summary = attention.decode_summary(rows)
    assert summary["times_flashinfer"] == {"geometric_mean": pytest.approx(1.0), "worst": 0.5, "worst_cell": "64x4096"}
    assert summary["share_from_32x4096_on"] == {"least": 0.9, "mean": 0.9}


def test_decode_summary_without_peers_says_nothing_of_them():
    assert attention.decode_summary([row(1, 512, attention.OURS, 10.0)]) == {}


def test_prefill_summary():
    rows = [{"new": 2048, "prefix": 0, "kernel": attention.ENGINE, "us": 100.0},
            {"new": 2048, "prefix": 0, "kernel": "cudnn contiguous", "us": 80.0}]
    assert attention.prefill_summary(rows) == {"prefill_times_cudnn": {"2048 after 0": 0.8}}


def test_small_cells_rotate_through_more_than_the_cache_holds():
    assert num_sets(ROTATED_BYTES) == 1
    assert num_sets(ROTATED_BYTES // 4) == 4
    assert num_sets(1) == 128


def test_a_cell_s_sets_don_t_overlap():
    pool = attention.Pool(attention.Shape(heads=4, kv_heads=2, head_dim=32), 1024, "cpu", torch.float32)
    cell = attention.DecodeCell(pool, batch=2, context=100)
    starts = {key.data_ptr() for key, _ in cell.caches}
    assert len(starts) == len(cell.caches) == 4  # 64 blocks in all, 14 for each
    assert sorted(cell.table.flatten().tolist()) == list(range(14))
    assert cell.bytes == 2 * 2 * 100 * 2 * 32 * 4


def test_a_kernel_that_disagrees_is_not_timed_further():
    out = torch.ones(4)
    assert attention._agreeing("naive", out, None) is out
    attention._agreeing("naive", out * 1.001, out)
    for wrong in (out * 1.1, torch.full((4,), torch.nan)):
        with pytest.raises(RuntimeError, match="naive disagrees"):
            attention._agreeing("naive", wrong, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_kernels_it_says_so():
    with pytest.raises(CannotMeasure, match="CUDA kernels"):
        attention.decode_us("split_kv", 1, 128)


def test_unknown_kernels_are_named():
    pool = attention.Pool(attention.Shape(heads=4, kv_heads=2, head_dim=32), 64, "cpu", torch.float32)
    with pytest.raises(ValueError, match="there are split_kv, naive"):
        attention.DecodeCell(pool, 1, 32).calls("quick", torch.empty(1, 4, 32))


def test_flashinfer_is_optional(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert not peers.has_flashinfer()
