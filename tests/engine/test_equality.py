"""The engine against transformers: the same tokens whatever the schedule, the cache and the workers do."""

from __future__ import annotations

import random

import pytest
import torch
from checkpoints import GRID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanopd import LLM, Cluster, SamplingParams
from nanopd.core import RequestOutput

LENGTHS = (1, 5, 16, 33, 90)  # one block is 16 or 4; the yarn and llama3 checkpoints change their ways after 64


def greedy(num_tokens: int = 10) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def ids(prompt: list[int]) -> dict:
    return {"prompt_token_ids": prompt}


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    assert all(output.error is None for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


def preemptions(client: LLM | Cluster) -> int:
    engines = [client.engine] if isinstance(client, LLM) else [worker.engine for worker in client.workers.values()]
    return sum(engine.scheduler.num_preemptions for engine in engines)


def run_and_compare(client: LLM | Cluster, checkpoint, prompts: list[list[int]], num_tokens: int = 10) -> None:
    outputs = client.generate([ids(prompt) for prompt in prompts], greedy(num_tokens), use_tqdm=False)
    assert tokens(outputs) == [checkpoint.greedy(prompt, num_tokens) for prompt in prompts]


# --------------------------------------------------------------- every model, a few ways of running it


@pytest.mark.parametrize("name", GRID)
def test_every_checkpoint_agrees_with_transformers(name, checkpoint, make_llm, make_cluster):
    model = checkpoint(name)
    prompts = [model.prompt(length) for length in LENGTHS]
    run_and_compare(make_llm(model), model, prompts)
    mixed = make_llm(model, prefill_chunk_size=7, max_num_batched_tokens=12, max_num_seqs=12, block_size=4)
    run_and_compare(mixed, model, prompts)
    run_and_compare(make_cluster(model, prefill_chunk_size=16), model, prompts)


# --------------------------------------------------------------- one model, every way of running it


@pytest.fixture(scope="module")
def qwen(checkpoint):
    return checkpoint("qwen3-gqa4-bias")


@pytest.fixture(scope="module")
def prompts(qwen) -> list[list[int]]:
    return [qwen.prompt(length) for length in (*LENGTHS, 48, 64)]


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("chunk", [None, 1, 7, 16, 64])
def test_chunks_do_not_show(chunk, block_size, qwen, prompts, make_llm):
    llm = make_llm(qwen, prefill_chunk_size=chunk, block_size=block_size, num_gpu_blocks_override=600)
    run_and_compare(llm, qwen, prompts)
    longest = max(row.num_new for record in llm.engine.history for row in record.rows if row.kind == "prefill")
    assert longest == (chunk or 90)


@pytest.mark.parametrize("budget", [1, 3, 8, 24])
def test_prefill_chunks_share_steps_with_decodes(budget, qwen, prompts, make_llm):
    llm = make_llm(qwen, max_num_batched_tokens=budget, max_num_seqs=min(budget, 4))
    run_and_compare(llm, qwen, prompts)
    assert all(sum(row.num_new for row in record.rows) <= budget for record in llm.engine.history)
    kinds = [{row.kind for row in record.rows} for record in llm.engine.history]
    assert ({"prefill", "decode"} in kinds) == (budget > 1)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5])
def test_no_more_sequences_than_allowed_run_together(max_num_seqs, qwen, prompts, make_llm):
    llm = make_llm(qwen, max_num_seqs=max_num_seqs)
    run_and_compare(llm, qwen, prompts)
    assert max(len(record.rows) for record in llm.engine.history) == max_num_seqs


@pytest.mark.parametrize("chunk", [None, 7])
def test_prefix_hits(chunk, qwen, make_llm):
    """The same prompts twice; prompts with a common beginning, one after another and together."""
    llm = make_llm(qwen, block_size=8, prefill_chunk_size=chunk)
    stem = qwen.random_prompt(32)
    family = [stem, stem + qwen.random_prompt(1, 1), stem + qwen.random_prompt(9, 2), stem[:20] + qwen.random_prompt(20, 3)]
    run_and_compare(llm, qwen, family[:1])
    assert llm.engine.scheduler.manager.counters.hits == 0
    run_and_compare(llm, qwen, family[:1])
    assert llm.engine.scheduler.manager.counters.hits == 3  # not the fourth: its last token has to be run
    run_and_compare(llm, qwen, family)
    assert llm.engine.scheduler.manager.counters.hits == 3 + 3 + 4 + 4 + 2
    answer = qwen.greedy(stem)
    run_and_compare(llm, qwen, [stem + answer + qwen.random_prompt(3, 4)])  # a second turn finds the answer cached
    assert llm.engine.scheduler.manager.counters.hits == 16 + 5


def test_without_prefix_caching_nothing_is_found(qwen, prompts, make_llm):
    llm = make_llm(qwen, enable_prefix_caching=False)
    run_and_compare(llm, qwen, prompts * 2)
    assert llm.engine.scheduler.manager.counters.hits == 0


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_preempted_sequences(chunk, caching, qwen, make_llm):
    prompts = [qwen.prompt(length, 30) for length in (12, 9, 14, 11, 10)]
    llm = make_llm(qwen, block_size=4, num_gpu_blocks_override=18, prefill_chunk_size=chunk, enable_prefix_caching=caching)
    run_and_compare(llm, qwen, prompts, 30)
    assert llm.engine.scheduler.num_preemptions > 0


TOPOLOGIES = ["P:cpu D:cpu", "P:cpu P:cpu D:cpu D:cpu", "C:cpu", "C:cpu C:cpu"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7, "block_size": 4}, {"prefill_chunk_size": 1},
                                     {"enable_prefix_caching": False}], ids=str)
def test_workers(topology, options, qwen, prompts, make_cluster):
    cluster = make_cluster(qwen, topology, **options)
    run_and_compare(cluster, qwen, prompts)
    streams = []
    for prompt in prompts[::-1]:
        streams.append(cluster.submit(ids(prompt), greedy()))
        cluster.step()
    assert tokens([stream.result() for stream in streams]) == [qwen.greedy(prompt) for prompt in prompts[::-1]]
    paths = [cluster.timeline(str(i)).path for i in range(2 * len(prompts))]
    roles = {"".join(worker_id[0] for worker_id in path) for path in paths}
    assert roles == ({"C"} if "C" in topology else {"PD"})
    assert {worker_id for path in paths for worker_id in path} == set(cluster.workers)  # none was left out


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_workers_with_too_few_blocks(topology, qwen, make_cluster):
    prompts = [qwen.prompt(length, 30) for length in (12, 9, 14, 11, 10, 13, 15, 8)]
    cluster = make_cluster(qwen, topology, block_size=4, num_gpu_blocks_override=16)
    run_and_compare(cluster, qwen, prompts, 30)
    assert preemptions(cluster) > 0


# --------------------------------------------------------------- several answers, drawn at random

SAMPLED = [SamplingParams(n=n, temperature=1.5, top_k=top_k, top_p=0.95, seed=seed, max_tokens=16, logprobs=2)
           for n, top_k, seed in [(4, 0, 1), (1, 20, 2), (3, 0, 3), (2, 50, 4)]]


def answers(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    assert all(output.error is None for output in outputs)
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def sampled(qwen):
    """Prompts and their answers from an LLM with room for all."""
    prompts = [ids(qwen.random_prompt(length)) for length in (10, 17, 8, 21)]
    outputs = LLM(qwen.path, device="cpu", num_gpu_blocks_override=256).generate(prompts, SAMPLED, use_tqdm=False)
    return prompts, outputs


def test_sampled_answers_differ(sampled):
    for answer_tokens in answers(sampled[1]):
        assert len(set(map(tuple, answer_tokens))) == len(answer_tokens)


def test_reported_logprobs_are_those_of_transformers(sampled, qwen):
    """Each answer's tokens, forced through transformers."""
    for output in sampled[1]:
        for answer in output.outputs:
            expected = qwen.logprobs(output.prompt_token_ids, answer.token_ids)
            of_tokens = expected[range(16), answer.token_ids]
            got = torch.tensor([entry[token] for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)])
            torch.testing.assert_close(got, of_tokens, atol=1e-3, rtol=0)
            assert answer.cumulative_logprob == pytest.approx(of_tokens.sum().item(), abs=1e-2)
            for entry, row in zip(answer.logprobs, expected, strict=True):
                top = row.topk(2)
                assert set(top.indices.tolist()) <= set(entry) and len(entry) <= 3
                for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                    assert entry[token] == pytest.approx(value, abs=1e-3)


TIGHT = dict(block_size=4, num_gpu_blocks_override=27)  # one request of n=4 may need 26


@pytest.mark.parametrize("options", [
    {"prefill_chunk_size": 1}, {"prefill_chunk_size": 7, "block_size": 4}, {"max_num_batched_tokens": 8, "max_num_seqs": 4},
    {"block_size": 1, "num_gpu_blocks_override": 300}, {"enable_prefix_caching": False},
    TIGHT, {**TIGHT, "enable_prefix_caching": False}, {**TIGHT, "prefill_chunk_size": 3},
    {**TIGHT, "max_num_batched_tokens": 8, "max_num_seqs": 8},
], ids=str)
def test_forked_answers_do_not_depend_on_the_schedule(options, sampled, qwen, make_llm):
    prompts, expected = sampled
    llm = make_llm(qwen, **options)
    assert answers(llm.generate(prompts, SAMPLED, use_tqdm=False)) == answers(expected)
    assert (preemptions(llm) > 0) == (options.get("num_gpu_blocks_override") == 27)
    assert llm.engine.scheduler.manager.counters.forks >= 3 + 2 + 1
    reversed_outputs = llm.generate(prompts[::-1], SAMPLED[::-1], use_tqdm=False)
    assert answers(reversed_outputs) == answers(expected)[::-1]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("options", [{}, TIGHT, {**TIGHT, "prefill_chunk_size": 3}], ids=str)
def test_forked_answers_do_not_depend_on_the_workers(topology, options, sampled, qwen, make_cluster):
    prompts, expected = sampled
    cluster = make_cluster(qwen, topology, **options)
    assert answers(cluster.generate(prompts, SAMPLED, use_tqdm=False)) == answers(expected)


def test_forked_answers_share_the_prompt(qwen, make_llm):
    llm = make_llm(qwen, block_size=4)
    stream = llm.submit(ids(qwen.random_prompt(40)), SamplingParams(n=8, seed=0, max_tokens=20))
    llm.step()
    assert llm.engine.scheduler.manager.num_used_blocks == 10
    llm.step()
    assert llm.engine.scheduler.manager.num_used_blocks == 10 + 8
    stream.close()


# --------------------------------------------------------------- any schedule at all


@pytest.fixture(scope="module")
def pool(qwen):
    """Requests and what an LLM with room answers to each: greedy ones as transformers, sampled ones by their seed."""
    stem = qwen.random_prompt(12, 7)
    prompts = [qwen.random_prompt(3, 8), stem, stem + qwen.random_prompt(5, 9), qwen.random_prompt(23, 10)]
    params = [SamplingParams(n=n, temperature=1.2, seed=n, max_tokens=12, ignore_eos=True) for n in (1, 2, 3)]
    requests = [(ids(prompt), p) for prompt in prompts for p in params]
    llm = LLM(qwen.path, device="cpu", num_gpu_blocks_override=256, enable_prefix_caching=False)
    return [(prompt, p, answers(llm.generate([prompt], p, use_tqdm=False))[0]) for prompt, p in requests]


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), block_size=st.sampled_from([1, 3, 4, 8]), slack=st.integers(0, 6),
       chunk=st.sampled_from([None, 1, 3, 8]), budget=st.integers(3, 40), caching=st.booleans(),
       watermark=st.sampled_from([0.0, 0.01, 0.3]), disaggregated=st.booleans())
def test_any_schedule(seed, block_size, slack, chunk, budget, caching, watermark, disaggregated, qwen, pool, clean):
    """Requests arrive and are cancelled at random; between any two steps the books balance and free blocks are NaN."""
    choose = random.Random(seed)
    blocks = (23 + 3 * 12) // block_size + 4 + slack  # the largest request, and little more
    options = dict(block_size=block_size, num_gpu_blocks_override=blocks, prefill_chunk_size=chunk, max_num_seqs=3,
                   max_num_batched_tokens=budget, enable_prefix_caching=caching, watermark=watermark)
    client = Cluster(qwen.path, **options) if disaggregated else LLM(qwen.path, device="cpu", **options)
    engines = [client.engine] if isinstance(client, LLM) else [worker.engine for worker in client.workers.values()]
    waiting = choose.choices(pool, k=8)
    streams, cancelled = [], set()
    while waiting or client.has_work:
        while waiting and choose.random() < 0.3:
            prompt, params, expected = waiting.pop()
            streams.append((client.submit(prompt, params), expected))
        if streams and choose.random() < 0.02:
            stream = choose.choice(streams)[0]
            cancelled.add(stream.request_id)
            stream.close()
        client.step()
        for engine in engines:
            engine.scheduler.manager.check()
            blank = engine.scheduler.manager.pool._blank
            if blank:
                engine.runner.cache.poison(blank)
    for stream, expected in streams:
        output = stream.result()
        got = [answer.token_ids for answer in output.outputs]
        assert output.error is None
        if stream.request_id in cancelled:
            assert all(answer == whole[: len(answer)] for answer, whole in zip(got, expected, strict=True))
        else:
            assert got == expected
    clean(client)


# --------------------------------------------------------------- other precisions


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_half_precision_is_as_exact_as_transformers(name, dtype, checkpoint, make_llm):
    """Against the same model in float32, the error is of the size of that which transformers makes."""
    from transformers import AutoModelForCausalLM

    model = checkpoint(name)
    half = AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, dtype)).eval()
    llm = make_llm(model, dtype=dtype, prefill_chunk_size=7)
    assert llm.engine.runner.cache.data.dtype == getattr(torch, dtype)
    prompts = [model.random_prompt(length) for length in (5, 33, 90)]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=64)
    ours, theirs = [], []
    for output in llm.generate([ids(prompt) for prompt in prompts], params, use_tqdm=False):
        answer = output.outputs[0]
        with torch.no_grad():
            logits = half(torch.tensor([output.prompt_token_ids + answer.token_ids])).logits[0]
        exact = model.logprobs(output.prompt_token_ids, answer.token_ids)
        of_half = logits[len(output.prompt_token_ids) - 1 : -1].float().log_softmax(-1)
        for position, entry in enumerate(answer.logprobs):
            top = list(entry)
            ours.append(torch.tensor([entry[token] for token in top]) - exact[position, top])
            theirs.append(of_half[position, top] - exact[position, top])
    our_error, their_error = torch.cat(ours).square().mean().sqrt(), torch.cat(theirs).square().mean().sqrt()
    assert our_error < 1.3 * their_error
    assert our_error > their_error / 10  # it was in half precision


def test_trained_model_in_bfloat16_agrees_with_transformers(make_llm):
    """The embedded model, whose activations are those of a trained one: every log-probability is close."""
    from transformers import AutoModelForCausalLM

    from nanopd.tiny import WEIGHTS_DIR, demo_prompts

    theirs = AutoModelForCausalLM.from_pretrained(WEIGHTS_DIR, dtype=torch.bfloat16).eval()
    llm = make_llm("tiny", dtype="bfloat16", prefill_chunk_size=16)
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=3)
    for output in llm.generate([task.prompt for task in demo_prompts()], params, use_tqdm=False):
        answer = output.outputs[0]
        with torch.no_grad():
            logits = theirs(torch.tensor([output.prompt_token_ids + answer.token_ids])).logits[0]
        expected = logits[len(output.prompt_token_ids) - 1 : -1].float().log_softmax(-1)
        got = torch.tensor([entry[token] for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)])
        torch.testing.assert_close(got, expected[range(len(got)), answer.token_ids], atol=0.15, rtol=0)
