"""Real models for tests of whole pipelines: a tiny checkpoint, its dense reference, and the checks."""

from __future__ import annotations

from functools import cache

import torch
from checkpoints import make_checkpoint
from workers.fake_cluster import assert_cluster_is_empty

from nanopd.cluster import Cluster
from nanopd.core import FinishReason, PlanRow, Request, SamplingParams, Sequence
from nanopd.engine.sampler import sample
from nanopd.llm import LLM

NUM_LAYERS = 3
BLOCK_SIZE = 4
OPTIONS = dict(num_gpu_blocks_override=48, block_size=BLOCK_SIZE, max_num_seqs=6, max_num_batched_tokens=24, max_model_len=64)


class Reference:
    """Hugging Face's model on the whole context at every token: no cache, no batch, no chunks."""

    def __init__(self, path, eos=None):
        self.path = str(path)
        self.model = make_checkpoint(path, "qwen3", layers=NUM_LAYERS, hidden=32, heads=4, kv_heads=2, head_dim=8, vocab=64,
                                     max_position=64, eos=eos)
        self.eos = frozenset(() if eos is None else (eos,))
        self.answer = cache(self.answer)

    def answer(self, prompt, sampling, index=0):
        """(token ids, finish reason) of one answer. `prompt` is a tuple; `sampling.seed` is set unless greedy."""
        request = Request("", list(prompt), sampling, seed=sampling.seed or 0)
        sequence = Sequence(prompt, index=index)
        while True:
            row = PlanRow(sequence, request, 1, len(sequence) - 1, [], num_samples=1)
            with torch.inference_mode():
                logits = self.model(torch.tensor([sequence.token_ids])).logits[:, -1].float()
            token = sample(logits, [row], self.eos)[0].token_ids[0]
            sequence.append_token(token)
            if (token in self.eos and not sampling.ignore_eos) or token in sampling.stop_token_ids:
                return sequence.output_token_ids, FinishReason.STOP
            if sequence.num_output == sampling.max_tokens or len(sequence) == OPTIONS["max_model_len"]:
                return sequence.output_token_ids, FinishReason.LENGTH

    def cluster(self, mode="disaggregated", topology=None, **options):
        topology = topology or {"disaggregated": "P:cpu D:cpu", "collocated": "C:cpu"}[mode]
        return Cluster(self.path, topology, mode, **{**OPTIONS, **options})

    def llm(self, **options):
        return LLM(self.path, device="cpu", **{**OPTIONS, **options})


def greedy(max_tokens=8, **options):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def sampled(n=3, max_tokens=8, seed=5, **options):
    return SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens, seed=seed, **options)


def prompt(length, start=1):
    """Token ids that depend on both arguments."""
    return tuple((start * 7 + 5 * i * i + i) % 63 + 1 for i in range(length))


def ids(*prompts):
    return [{"prompt_token_ids": list(token_ids)} for token_ids in prompts]


# A little of everything: shorter and longer than a block, a chunk and a batch; equal beginnings; several answers,
# which share a last block that is full (8) or not (9, 13).
MIX = [(prompt(3), greedy()), (prompt(9), sampled()), (prompt(30), greedy()), (prompt(30) + prompt(5, 3), greedy(12)),
       (prompt(13, 2), sampled(seed=11)), (prompt(8, 4), sampled(2)), (prompt(1, 5), greedy(1)), (prompt(26, 6), greedy(20))]


def assert_tokens_equal_reference(outputs, asked, reference):
    """Every answer that was not broken off has the dense model's tokens, and its reason to end."""
    assert len(outputs) == len(asked)
    for output, (token_ids, sampling) in zip(outputs, asked, strict=True):
        assert output.error is None and len(output.outputs) == sampling.n
        for answer in output.outputs:
            expected = reference.answer(token_ids, sampling, answer.index)
            assert (answer.token_ids, answer.finish_reason) == expected, f"answer {answer.index} to {token_ids}"


def serve_mix(client, asked=MIX):
    return client.generate(ids(*(token_ids for token_ids, _ in asked)), [sampling for _, sampling in asked], use_tqdm=False)


def settle(cluster, max_steps=500):
    """Step until no worker has work or mail."""
    for _ in range(max_steps):
        if not cluster.has_work and cluster._executor.idle:
            return
        cluster.step()
    raise AssertionError(f"not done after {max_steps} steps")


def assert_nothing_leaked(cluster):
    """All requests have ended: no block, lease, transfer or load is left, on any worker."""
    settle(cluster)
    assert_cluster_is_empty(cluster._central, cluster.workers)
