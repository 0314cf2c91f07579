"""The engine on a CUDA device: the same tokens as on the CPU and as transformers, in every mode."""

from __future__ import annotations

import pytest
import torch
from checkpoints import GRID, make_checkpoint

from nanopd import LLM, BeamSearchParams, Cluster, SamplingParams
from nanopd.tiny import demo_prompts, recall_prompt

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(autouse=True)
def _exact_matmuls():
    """fp32 has to mean fp32 where tokens are compared."""
    torch.backends.cuda.matmul.allow_tf32 = False


def tokens(outputs) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def assert_all_returned(*engines) -> None:
    for engine in engines:
        engine.scheduler.manager.check()
        assert engine.scheduler.manager.num_used_blocks == 0


@pytest.mark.parametrize("options", GRID.values(), ids=GRID.keys())
def test_greedy_tokens_equal_transformers(options, tmp_path) -> None:
    model = make_checkpoint(tmp_path, **options).cuda()
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist() for length in (1, 9, 40, 77)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")  # the mask is given, or a token equal to the padding's is left out
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
    llm = LLM(str(tmp_path), device="cuda", dtype="float32", block_size=8, prefill_chunk_size=7)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False)
    assert [answers[0] for answers in tokens(outputs)] == expected
    assert_all_returned(llm.engine)


def test_gpu_equals_cpu_in_every_mode() -> None:
    prompts = [task.prompt for task in demo_prompts() if task.kind != "story"]
    sampled = SamplingParams(n=3, temperature=0.8, top_p=0.95, seed=5, max_tokens=12)
    beams = BeamSearchParams(3, max_tokens=10)
    on_cpu = LLM("tiny", device="cpu")
    on_gpu = {
        "one engine": LLM("tiny", device="cuda", dtype="float32", num_gpu_blocks_override=4096),
        "preempted": LLM("tiny", device="cuda", dtype="float32", num_gpu_blocks_override=20, max_num_seqs=16),
        "disaggregated": Cluster("tiny", "P:0 D:0", "disaggregated", dtype="float32", num_gpu_blocks_override=4096),
        "collocated": Cluster("tiny", "C:0", "collocated", dtype="float32", num_gpu_blocks_override=4096),
    }
    for name, client in on_gpu.items():
        for ask in (lambda c: c.generate(prompts, GREEDY, use_tqdm=False),
                    lambda c: c.generate(prompts, sampled, use_tqdm=False),
                    lambda c: c.beam_search(prompts, beams, use_tqdm=False)):
            assert tokens(ask(client)) == tokens(ask(on_cpu)), name
    assert on_gpu["preempted"].engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("num_tokens", [256, 1024, 3500])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recall(num_tokens, lang, dtype) -> None:
    tasks = [recall_prompt(900 + seed, num_tokens, lang) for seed in range(40)]
    for client in (LLM("tiny", device="cuda", dtype=dtype, num_gpu_blocks_override=16384),
                   Cluster("tiny", "P:0 D:0", "disaggregated", dtype=dtype, num_gpu_blocks_override=16384)):
        outputs = client.generate([task.prompt for task in tasks], GREEDY, use_tqdm=False)
        right = sum(output.outputs[0].text == task.answer for output, task in zip(outputs, tasks, strict=True))
        assert right >= 0.95 * len(tasks)


def test_the_cache_takes_its_share_of_the_memory_and_gives_it_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with Cluster("tiny", "C:0 P:0 D:0", "disaggregated", gpu_memory_utilization=0.5) as cluster:
        sizes = [worker.cache.data.nbytes for worker in cluster.workers.values()]
        assert max(sizes) < 1.5 * min(sizes)
        assert sum(sizes) <= 0.5 * torch.cuda.get_device_properties(0).total_memory
        assert cluster.generate("What is 2+3?", GREEDY, use_tqdm=False)[0].outputs[0].text == "5"
    del cluster
    assert torch.cuda.memory_allocated() - before < 2**20


def test_a_preset_with_dummy_weights_runs() -> None:
    llm = LLM("qwen3-0.6b", load_format="dummy", device="cuda", max_model_len=4096)
    outputs = llm.generate([{"prompt_token_ids": list(range(100, 400))}] * 4, GREEDY, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [GREEDY.max_tokens] * 4
    assert_all_returned(llm.engine)
