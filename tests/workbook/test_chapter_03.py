"""Chapter 03's checks tell right from wrong, and its lab says what it ran and where."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from nanopd.benchmark.results import Report
from nanopd.widgets.strings import set_language
from nanopd.workbook import race
from nanopd.workbook.check import check


@pytest.fixture(autouse=True, params=["en", "zh"])
def language(request, monkeypatch):
    monkeypatch.delenv("NANOPD_STRICT_CHECKS", raising=False)
    set_language(request.param)
    yield request.param
    set_language(None)


# ------------------------------------------------------------------------------------- 03.2, the block table


def attend(query, key_cache, value_cache, block_table, context, scale, *, padded=False, interleaved=False, mixed_up=False):
    size, length = key_cache.shape[1], context
    if padded:
        length = len(block_table) * size
    table = sorted(block_table) if mixed_up else block_table
    slots = torch.tensor([table[p // size] * size + p % size for p in range(length)])
    group = query.shape[0] // key_cache.shape[2]
    spread = (lambda x: x.repeat(1, group, 1)) if interleaved else (lambda x: x.repeat_interleave(group, 1))
    keys, values = (spread(cache.flatten(0, 1)[slots]) for cache in (key_cache, value_cache))
    return torch.einsum("hs,shd->hd", (torch.einsum("hd,shd->hs", query, keys) * scale).softmax(-1), values)


def test_attention_through_the_table():
    assert check("03.2", attend)


@pytest.mark.parametrize("fault", ["padded", "interleaved", "mixed_up"])
def test_attention_that_reads_elsewhere_is_found_out(fault):
    result = check("03.2", lambda *arguments: attend(*arguments, **{fault: True}))
    assert not result and result.hint
    if fault == "padded":
        assert "NaN" in result.failures[0].message


def test_the_scale_is_not_forgotten():
    assert not check("03.2", lambda q, k, v, table, context, scale: attend(q, k, v, table, context, 1.0))


# ----------------------------------------------------------------------------------------------- 03.4, splits


def best_splits(num_sms, batch, kv_heads, num_blocks):
    return min(range(1, num_blocks + 1), key=lambda n: -(-batch * kv_heads * n // num_sms) * -(-num_blocks // n))


def test_the_best_number_of_splits():
    assert check("03.4", best_splits)


@pytest.mark.parametrize("theirs", [
    lambda num_sms, batch, kv_heads, num_blocks: 1,
    lambda num_sms, batch, kv_heads, num_blocks: max(1, num_sms // (batch * kv_heads)),
    lambda num_sms, batch, kv_heads, num_blocks: num_blocks,
    lambda num_sms, batch, kv_heads, num_blocks: None,
], ids=["never", "one wave", "always", "nothing"])
def test_another_number_of_splits_is_told_its_cost(theirs):
    result = check("03.4", theirs)
    assert not result and "132" in result.failures[0].message


# ------------------------------------------------------------------------------------------------ 03.5, merge


def merge(outputs, lses):
    return (lses.softmax(0)[..., None] * outputs).sum(0)


def overflowing(outputs, lses):
    return (lses.exp()[..., None] * outputs).sum(0) / lses.exp().sum(0)[..., None]


def test_the_merge():
    assert check("03.5", merge)


def test_the_mean_is_no_merge():
    assert len(check("03.5", lambda outputs, lses: outputs.mean(0)).failures) == 1  # equal splits it gets right


def test_a_merge_that_overflows_gets_its_own_hint():
    result = check("03.5", overflowing)
    assert [failure.check for failure in result.failures] == ["check_large_scores_do_not_overflow"]
    assert "200" in result.hint


# ---------------------------------------------------------------------------------------------- 03.5b, in CUDA

KERNEL = """
__global__ void merge_splits(float* out, const float* outputs, const float* lses, int splits) {
    int head = blockIdx.x, d = threadIdx.x, head_dim = blockDim.x;
    float largest = -INFINITY, total = 0, sum = 0;
    for (int s = 0; s < splits; ++s) largest = fmaxf(largest, lses[head * splits + s]);
    for (int s = 0; s < splits; ++s) {
        float weight = expf(lses[head * splits + s] - largest);
        total += weight;
        sum += weight * outputs[(head * splits + s) * head_dim + d];
    }
    out[head * head_dim + d] = sum / total;
}
"""
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ["c++", "g++", "clang++"])), reason="no C++ compiler")


@needs_compiler
def test_the_kernel():
    assert check("03.5b", KERNEL)


@needs_compiler
@pytest.mark.parametrize(("right", "wrong"), [
    ("- largest", ""),
    ("total += weight", "total += 1"),
    ("(head * splits + s) * head_dim + d", "s * head_dim + d"),
    ("out[head * head_dim + d]", "out[d]"),
    ("sum += weight", "sum = weight"),
])
def test_a_wrong_kernel(right, wrong):
    result = check("03.5b", KERNEL.replace(right, wrong))
    assert not result and result.hint


@needs_compiler
def test_a_kernel_that_does_not_compile_is_told_the_compilers_words():
    result = check("03.5b", KERNEL.replace("weight;", "weigth;"))
    assert "weigth" in result.failures[0].message and "error" in result.failures[0].message


def test_the_stub_is_unfinished():
    assert check("03.5b", "__global__ void merge_splits() {\n    # YOUR CODE HERE\n    raise NotImplementedError()\n}").unfinished


def test_without_any_compiler_the_answer_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    result = check("03.5b", KERNEL)
    assert not result and "g++" in result.failures[0].message and "03.5" in result.failures[0].message


# ----------------------------------------------------------------------------------------- 03.9, the barrier

REPORT = Report("racecheck", "2026-01-01T00:00:00+00:00", "command", "abcdef0123", False, {"kind": "cuda", "name": "Some GPU"}, {},
                {}, [{"kernel": race.RACY, "wrong": "7 of 4000 rows wrong", "racecheck": "1 hazard"}])


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(race, "_runs_here", lambda: False)
    monkeypatch.setattr(race, "_recorded", lambda: REPORT)


def test_a_recorded_run_is_badged(no_gpu, capsys):
    race.run(race.RACY)
    race.racecheck(race.RACY)
    badge, wrong, _, hazard = capsys.readouterr().out.splitlines()
    assert "Some GPU, 2026-01-01, commit abcdef0" in badge and (wrong, hazard) == ("7 of 4000 rows wrong", "1 hazard")


def test_nothing_recorded_poses_as_a_run_of_another_kernel(no_gpu, monkeypatch, capsys):
    race.run(race.RACY + "// changed")
    monkeypatch.setattr(race, "_recorded", lambda: None)
    race.run(race.RACY)
    printed = capsys.readouterr().out
    assert "rows wrong" not in printed and "Some GPU" not in printed and len(printed.splitlines()) >= 2


def test_what_is_recorded_is_of_these_kernels():
    report = race._recorded()
    if report is None:
        pytest.skip("nothing recorded")
    racy, mended = report.rows
    assert (racy["kernel"], mended["kernel"]) == (race.RACY, race.MENDED), "run python -m nanopd.workbook.race again"
    assert "hazard" in racy["racecheck"] and not racy["wrong"].startswith("0 ")
    assert "0 hazards" in mended["racecheck"] and mended["wrong"].startswith("0 ")


def test_the_two_kernels_differ_by_their_barrier():
    assert race.RACY != race.MENDED and "__syncthreads" not in race.RACY
    assert [line for line in race.MENDED.splitlines() if line not in race.RACY.splitlines()] == ["    __syncthreads();"]


def test_on_a_gpu_what_runs_is_what_was_given(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(race, "_runs_here", lambda: True)
    monkeypatch.setattr(race, "_device_name", lambda: "This GPU")
    monkeypatch.setattr(race, "_examine", lambda kernel: seen.append(kernel) or {"wrong": "3 wrong", "racecheck": "checked"})
    race.run("mine")
    race.racecheck("mine")
    printed = capsys.readouterr().out
    assert seen == ["mine", "mine"] and "This GPU" in printed and "3 wrong" in printed and "checked" in printed
    assert replace(REPORT).source not in printed
