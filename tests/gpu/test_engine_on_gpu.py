"""The engine on a CUDA device: the same tokens as on the CPU and as transformers, in every mode."""

from __future__ import annotations

import pytest
import torch
from checkpoints import GRID, make_checkpoint

from nanopd import LLM, BeamSearchParams, Cluster, SamplingParams
from nanopd.block_manager.cache import KVCache
from nanopd.models.loader import load_model
from nanopd.paged_attention.ops import AttentionBatch
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    prompts = [recall_prompt(seed, 200, "en").prompt for seed in range(4)]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    first, second = (tokens(LLM("tiny", device=device, dtype="float32").generate(prompts, greedy, use_tqdm=False))
                     for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert first == second


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_graphs_change_nothing(dtype) -> None:
    """Batches that grow and shrink through many graph sizes, rows of padding included; with and without stop tokens.

    Graphs choose other library kernels than steps outside of them, which round differently in 16 bits. Up to its end an
    answer is certain enough for that to change nothing; where it has to go on, tokens are nearly as likely as others.
    """
    prompts = [recall_prompt(seed, 100 + 40 * seed, "en").prompt for seed in range(11)]
    options = dict(device="cuda", dtype=dtype, num_gpu_blocks_override=2048, max_num_seqs=12)
    asked = [SamplingParams(temperature=0, max_tokens=3 + 5 * i, ignore_eos=i % 2 == 0, logprobs=2 if i == 4 else None)
             if i % 3 else SamplingParams(temperature=0.7, top_p=0.9, seed=i, max_tokens=20) for i in range(11)]
    answers = []
    for enforce_eager in (False, True):
        llm = LLM("tiny", enforce_eager=enforce_eager, **options)
        assert bool(llm.engine.runner.graphs) is not enforce_eager
        answers.append(tokens(llm.generate(prompts, asked, use_tqdm=False)))
        assert_all_returned(llm.engine)
    ends = set() if dtype == "float32" else set(llm.engine.runner.eos_token_ids)
    with_graphs, eagerly = ([[_up_to(ends, ids) for ids in output] for output in outputs] for outputs in answers)
    assert with_graphs == eagerly


def _up_to(ends: set[int], ids: list[int]) -> list[int]:
    """Up to the first of `ends`, and with it."""
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_change_nothing(dtype) -> None:
    prompts = [task.prompt for task in demo_prompts() if task.kind != "story"] * 2
    prompts += [recall_prompt(seed, 400, "zh").prompt for seed in range(6)]
    plain = LLM("tiny", device="cuda", dtype=dtype, num_gpu_blocks_override=2048)
    drafting = LLM("tiny", device="cuda", dtype=dtype, num_gpu_blocks_override=2048, num_speculative_tokens=5)
    asked = SamplingParams(temperature=0, max_tokens=40)
    assert tokens(drafting.generate(prompts, asked, use_tqdm=False)) == tokens(plain.generate(prompts, asked, use_tqdm=False))
    assert drafting.engine.scheduler.drafts.accepted > 0
    assert_all_returned(plain.engine, drafting.engine)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("num_tokens", [1, 7, 40, 130])
def test_bf16_logits_are_as_near_as_transformers(family, num_tokens, tmp_path) -> None:
    """Both round; neither may be much further from float32 than the other. 1 and 7 go through the fused projections."""
    reference = make_checkpoint(tmp_path, family, hidden=256, head_dim=64).cuda()
    ids = torch.randint(0, reference.config.vocab_size, (1, num_tokens), device="cuda")
    with torch.inference_mode():
        exact = reference(ids).logits[0].float()
        theirs = reference.bfloat16()(ids).logits[0].float()
    ours = _logits(load_model(tmp_path, device="cuda", dtype="bfloat16"), ids[0])

    def error(logits: torch.Tensor) -> float:
        return ((logits - exact).norm() / exact.norm()).item()

    assert error(ours) < 1.5 * error(theirs) + 1e-3


def _logits(decoder, ids: torch.Tensor) -> torch.Tensor:
    """Of a prompt read in one step, after each token, in a cache whose other slots are NaN."""
    cache, n = KVCache(decoder.spec, 12, 16, "cuda", torch.bfloat16), len(ids)
    cache.poison(range(12))
    table, positions = torch.randperm(12, device="cuda"), torch.arange(n, device="cuda")
    slots = table[positions // 16] * 16 + positions % 16
    batch = AttentionBatch(slots, table[None].int(), [n], [n], contexts=torch.tensor([n], dtype=torch.int32, device="cuda"),
                           starts=torch.tensor([0, n], dtype=torch.int32, device="cuda"))
    with torch.inference_mode():
        return decoder.logits(decoder(ids, positions, cache, batch)).float()


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
