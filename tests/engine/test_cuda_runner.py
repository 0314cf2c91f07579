"""The CUDA runner's own work, on an emulated GPU: the answers are those of the plain runner, whatever the steps."""

from __future__ import annotations

import pytest
import torch
from checkpoints import make_checkpoint
from emulated_gpu import cuda_runner_for, emulate

from nanopd import LLM, BeamSearchParams, SamplingParams
from nanopd.core import Request
from nanopd.tiny import demo_prompts, recall_prompt

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture
def counts() -> dict[str, int]:
    return {}


@pytest.fixture
def on_gpu(monkeypatch, counts):
    """`LLM("tiny")` with a runner that believes it is on a GPU."""
    def make(enforce_eager: bool = False, **options) -> LLM:
        llm = LLM("tiny", device="cpu", **options)
        emulate(monkeypatch, counts)
        llm.engine.runner = cuda_runner_for(llm, enforce_eager=enforce_eager)
        return llm
    return make


def tokens(outputs) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def asked(number: int) -> list[SamplingParams]:
    """Greedy and random, with and without alternatives and penalties, ending at different steps."""
    kinds = [GREEDY, SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=15),
             SamplingParams(temperature=0, max_tokens=9, logprobs=3), SamplingParams(temperature=1, n=2, seed=5, max_tokens=8),
             SamplingParams(temperature=0, max_tokens=20, min_tokens=10), SamplingParams(temperature=0, max_tokens=1)]
    return [kinds[i % len(kinds)] for i in range(number)]


@pytest.mark.parametrize("options", [
    dict(), dict(enforce_eager=True), dict(prefill_chunk_size=24), dict(num_gpu_blocks_override=14, max_num_seqs=12),
    dict(num_speculative_tokens=4), dict(enable_prefix_caching=False, max_num_seqs=3),
], ids=["graphs", "eager", "chunks", "few blocks", "drafts", "few seats"])
def test_the_answers_are_the_plain_runners(on_gpu, counts, options) -> None:
    prompts = [task.prompt for task in demo_prompts()] + [recall_prompt(seed, 60, "en").prompt for seed in range(4)]
    plain_options = {name: value for name, value in options.items() if name != "enforce_eager"}
    plain = LLM("tiny", device="cpu", **plain_options)
    expected = tokens(plain.generate(prompts, asked(len(prompts)), use_tqdm=False))
    llm = on_gpu(**options)
    for _ in range(2):  # the second time round on a cache and on tables that have seen other sequences
        assert tokens(llm.generate(prompts, asked(len(prompts)), use_tqdm=False)) == expected
        llm.engine.scheduler.manager.check()
        assert llm.engine.scheduler.manager.num_used_blocks == 0
    assert counts["decode_attention"] and counts["prefill_attention"] and counts["linear"] and counts["greedy_sample"]
    if "num_gpu_blocks_override" in options:
        assert llm.engine.scheduler.num_preemptions > 0
    if "num_speculative_tokens" in options:
        assert llm.engine.scheduler.drafts.accepted > 0


def test_beams_copy_blocks_by_the_kernel(on_gpu, counts) -> None:
    prompts, beams = [task.prompt for task in demo_prompts()[:3]], BeamSearchParams(3, max_tokens=10)
    plain = tokens(LLM("tiny", device="cpu").beam_search(prompts, beams, use_tqdm=False))
    assert tokens(on_gpu().beam_search(prompts, beams, use_tqdm=False)) == plain
    assert counts["move_blocks"] > 0


def test_steady_decode_runs_ahead_in_graphs(on_gpu, counts) -> None:
    """While a step runs the next one is queued, and no operation is launched outside of its graph."""
    llm = on_gpu(max_num_seqs=4)
    for number in range(3):
        asked_for = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        llm.engine.add(Request(str(number), [5, 6, 7 + number], asked_for))
    llm.engine.step()
    replays = 0
    for graph in llm.engine.runner.graphs.values():
        original = graph.graph.replay

        def replay(original=original):
            nonlocal replays
            replays += 1
            original()
        graph.graph.replay = replay
    for _ in range(10):
        llm.engine.step()
        assert llm.engine.ahead is not None
    assert replays == 10


def test_no_graphs_where_attention_has_no_kernel(monkeypatch, counts, tmp_path) -> None:
    """Plain torch works out the rows' slots on the host, which a recording cannot contain."""
    make_checkpoint(tmp_path, hidden=32, heads=8, kv_heads=1, head_dim=4)
    llm = LLM(str(tmp_path), device="cpu", max_num_seqs=4)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    expected = tokens(llm.generate([prompt], GREEDY, use_tqdm=False))
    emulate(monkeypatch, counts)
    llm.engine.runner = cuda_runner_for(llm)
    assert not llm.engine.runner.graphs
    assert tokens(llm.generate([prompt], GREEDY, use_tqdm=False)) == expected
    assert counts["rope_and_store"] and "decode_attention" not in counts


def test_padding_writes_nothing(on_gpu) -> None:
    """Three rows run in a graph for four: the fourth must not touch the cache."""
    llm = on_gpu(max_num_seqs=4, num_gpu_blocks_override=64)
    cache = llm.engine.runner.cache
    cache.poison(range(64))
    llm.generate([{"prompt_token_ids": [5, 6, 7]}] * 3, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), use_tqdm=False)
    written = (~cache.data[0, 0].isnan()).any(-1).any(-1).sum().item()
    assert written == 3 * (3 + 8)


def test_a_sampled_row_leaves_its_token_for_the_step_ahead(on_gpu) -> None:
    """Greedy rows' tokens come from the graph, random rows' are drawn after it; the next step reads both."""
    prompts = [task.prompt for task in demo_prompts()[:4]]
    mixed = [GREEDY, SamplingParams(temperature=0.9, seed=1, max_tokens=12)] * 2
    expected = tokens(LLM("tiny", device="cpu").generate(prompts, mixed, use_tqdm=False))
    assert tokens(on_gpu(max_num_seqs=4).generate(prompts, mixed, use_tqdm=False)) == expected


def test_nan_reaches_only_its_own_request(on_gpu) -> None:
    llm = on_gpu(max_num_seqs=4)
    model = llm.engine.runner.model
    weight = model.embed_tokens.weight
    token = 11
    before = weight[token].clone()
    try:
        with torch.inference_mode():
            weight[token] = float("nan")
        outputs = llm.generate([{"prompt_token_ids": [5, token]}, {"prompt_token_ids": [5, 6]}], GREEDY, use_tqdm=False)
    finally:
        with torch.inference_mode():
            weight[token] = before
    assert outputs[0].error and "NaN" in outputs[0].error
