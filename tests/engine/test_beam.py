"""Beam search against transformers', whatever the schedule and the cache do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from nanopd import BeamSearchParams, FinishReason, InvalidRequest, SamplingParams

LENGTHS = (3, 16, 21, 7, 1)


def ids(prompt: list[int]) -> dict:
    return {"prompt_token_ids": prompt}


@pytest.fixture(scope="module")
def plain(checkpoint):
    return checkpoint("llama")


@pytest.fixture(scope="module")
def ending(checkpoint, plain):
    """The same weights, with three EOS tokens, each one that the model likes to write to some prompt."""
    eos = []
    for length in LENGTHS:
        answers = reference(plain, plain.random_prompt(length), 4, 1.0, 12, None)
        counts = Counter(token for answer, _ in answers for token in answer[3:] if token not in eos)
        eos.append(counts.most_common(1)[0][0])
    return checkpoint("llama", eos=tuple(eos))


def eos_of(model) -> list[int]:
    return list(model.model.config.eos_token_id)


def reference(model, prompt: list[int], width: int, penalty: float, max_tokens: int, eos) -> list[tuple[list[int], float]]:
    """transformers' answers with their scores, best first."""
    if width == 1:  # transformers calls it greedy search and reports no score
        (answer, logprobs) = greedy_reference(model, prompt, max_tokens, eos)
        return [(answer, sum(logprobs) / len(answer) ** penalty)]
    out = model.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, num_beams=width,
        num_return_sequences=width, length_penalty=penalty, max_new_tokens=max_tokens, early_stopping=False,
        eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    answers = []
    for sequence, indices, score in zip(out.sequences, out.beam_indices, out.sequences_scores.tolist(), strict=True):
        length = int((indices >= 0).sum())
        answers.append((sequence[len(prompt) : len(prompt) + length].tolist(), score))
    return answers


def greedy_reference(model, prompt: list[int], max_tokens: int, eos) -> tuple[list[int], list[float]]:
    answer = model.greedy(prompt, max_tokens)
    end = next((i for i, token in enumerate(answer) if token in (eos or ())), max_tokens - 1)
    answer = answer[: end + 1]
    return answer, model.logprobs(prompt, answer)[range(len(answer)), answer].tolist()


def check_answers(output, expected, params: BeamSearchParams, eos) -> None:
    assert output.error is None
    assert [answer.token_ids for answer in output.outputs] == [tokens for tokens, _ in expected]
    assert [answer.index for answer in output.outputs] == list(range(params.beam_width))
    for answer, (tokens, score) in zip(output.outputs, expected, strict=True):
        assert answer.cumulative_logprob / len(tokens) ** params.length_penalty == pytest.approx(score, abs=1e-3)
        ends_itself = tokens[-1] in eos and not params.ignore_eos
        assert answer.finish_reason is (FinishReason.STOP if ends_itself else FinishReason.LENGTH)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_agrees_with_transformers(width, penalty, ending, make_llm):
    eos = eos_of(ending)
    llm = make_llm(ending, block_size=4)
    prompts = [ending.random_prompt(length) for length in LENGTHS]
    params = BeamSearchParams(width, max_tokens=12, length_penalty=penalty)
    expected = [reference(ending, prompt, width, penalty, 12, eos) for prompt in prompts]
    lengths = [len(tokens) for answers in expected for tokens, _ in answers]
    assert min(lengths) < 12 or penalty == 2  # some answers end by themselves, unless long ones are favoured
    outputs = llm.beam_search([ids(prompt) for prompt in prompts], params, use_tqdm=False)
    for output, answers in zip(outputs, expected, strict=True):
        check_answers(output, answers, params, eos)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_agrees_where_every_third_token_is_an_end(width, penalty, checkpoint, make_llm):
    """Answers of all lengths, also of one token; a beam offers more ends than there are beams."""
    model = checkpoint("llama", eos=tuple(range(0, 128, 3)))
    llm = make_llm(model, block_size=4)
    prompts = [model.random_prompt(length) for length in LENGTHS]
    params = BeamSearchParams(width, max_tokens=8, length_penalty=penalty)
    outputs = llm.beam_search([ids(prompt) for prompt in prompts], params, use_tqdm=False)
    expected = [reference(model, prompt, width, penalty, 8, eos_of(model)) for prompt in prompts]
    assert penalty == 2 or len({len(tokens) for answers in expected for tokens, _ in answers}) > 2
    for output, answers in zip(outputs, expected, strict=True):
        check_answers(output, answers, params, eos_of(model))


@pytest.mark.parametrize("width", [1, 4])
def test_ignore_eos(width, plain, ending, make_llm):
    llm = make_llm(ending)
    prompt = ending.random_prompt(16)
    params = BeamSearchParams(width, max_tokens=12, ignore_eos=True)
    expected = reference(plain, prompt, width, 1.0, 12, None)
    (output,) = llm.beam_search(ids(prompt), params, use_tqdm=False)
    assert [answer.token_ids for answer in output.outputs] == [tokens for tokens, _ in expected]
    assert {answer.finish_reason for answer in output.outputs} == {FinishReason.LENGTH}


@pytest.mark.parametrize("options", [
    {"prefill_chunk_size": 1}, {"prefill_chunk_size": 7, "max_num_batched_tokens": 8, "max_num_seqs": 8},
    {"enable_prefix_caching": False}, {"block_size": 1}, {"max_num_batched_tokens": 4, "max_num_seqs": 4},
], ids=str)
def test_schedule_does_not_show(options, ending, make_llm):
    eos = eos_of(ending)
    llm = make_llm(ending, **{"block_size": 4, **options})
    params = BeamSearchParams(4, max_tokens=12)
    prompts = [ending.random_prompt(length) for length in LENGTHS]
    outputs = llm.beam_search([ids(prompt) for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        check_answers(output, reference(ending, prompt, 4, 1.0, 12, eos), params, eos)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [20, 512])
def test_preempted_beams(budget, caching, ending, make_llm):
    """Blocks for one search and a little: the younger ones give way, again and again, in mid-search."""
    eos = eos_of(ending)
    llm = make_llm(ending, block_size=2, num_gpu_blocks_override=33, enable_prefix_caching=caching,
                   max_num_batched_tokens=budget, max_num_seqs=20)
    params = BeamSearchParams(4, max_tokens=12)
    prompts = [ending.random_prompt(length) for length in (5, 9, 4, 8, 6)]
    outputs = llm.beam_search([ids(prompt) for prompt in prompts], params, use_tqdm=False)
    assert llm.engine.scheduler.num_preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        check_answers(output, reference(ending, prompt, 4, 1.0, 12, eos), params, eos)


@pytest.mark.parametrize("budget", [7, 9, 64])
def test_beams_preempted_by_elder_requests(budget, ending, plain, make_llm):
    """Also while some beams of the search have run in this round and others have not."""
    eos = eos_of(ending)
    for blocks in range(34, 49, 2):
        llm = make_llm(ending, block_size=2, num_gpu_blocks_override=blocks, max_num_batched_tokens=budget, max_num_seqs=7)
        prompts = [plain.prompt(length, 30) for length in (20, 14, 17)]
        streams = [llm.submit(ids(prompt), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)) for prompt in prompts]
        params = BeamSearchParams(4, max_tokens=12)
        prompt = ending.random_prompt(7)
        (output,) = llm.beam_search(ids(prompt), params, use_tqdm=False)
        assert llm.engine.scheduler.num_preemptions > 0
        check_answers(output, reference(ending, prompt, 4, 1.0, 12, eos), params, eos)
        assert [stream.result().outputs[0].token_ids for stream in streams] == [plain.greedy(p, 30) for p in prompts]


def test_beams_beside_other_requests(ending, plain, make_llm):
    """Greedy and sampled requests in the same batch neither disturb nor are disturbed."""
    eos = eos_of(ending)
    llm = make_llm(ending, block_size=4)
    prompt, other = ending.random_prompt(16), plain.prompt(9)
    sampling = SamplingParams(n=3, temperature=1, seed=5, max_tokens=12)
    alone = llm.generate(ids(other), sampling, use_tqdm=False)[0]
    greedy = llm.submit(ids(other), SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    sampled = llm.submit(ids(other), sampling)
    params = BeamSearchParams(4, max_tokens=12)
    (output,) = llm.beam_search(ids(prompt), params, use_tqdm=False)
    check_answers(output, reference(ending, prompt, 4, 1.0, 12, eos), params, eos)
    assert greedy.result().outputs[0].token_ids == plain.greedy(other)
    assert [a.token_ids for a in sampled.result().outputs] == [a.token_ids for a in alone.outputs]


def test_context_limit_ends_beams(plain, make_llm):
    llm = make_llm(plain, max_model_len=20)
    prompt = plain.random_prompt(16)
    (output,) = llm.beam_search(ids(prompt), BeamSearchParams(3, max_tokens=50), use_tqdm=False)
    assert [answer.token_ids for answer in output.outputs] == [t for t, _ in reference(plain, prompt, 3, 1.0, 4, None)]


def test_cancelled_in_mid_search(ending, make_llm, clean):
    llm = make_llm(ending, block_size=4)
    prompt = ending.random_prompt(16)
    request = llm._make_request(ids(prompt), SamplingParams(temperature=0), BeamSearchParams(4, max_tokens=30, ignore_eos=True))
    stream = llm._submit(request)
    for _ in range(6):
        llm.step()
    assert llm.engine.scheduler.manager.num_used_blocks > 0
    stream.close()
    clean(llm)
    assert {answer.finish_reason for answer in stream.result().outputs} == {FinishReason.ABORT}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}, {"num_gpu_blocks_override": 45, "max_num_seqs": 20}], ids=str)
@pytest.mark.parametrize("topology", ["C:cpu C:cpu", "P:cpu D:cpu"])
def test_in_a_cluster(topology, options, ending, make_cluster):
    eos = eos_of(ending)
    cluster = make_cluster(ending, topology, **{"block_size": 2, **options})
    params = BeamSearchParams(4, max_tokens=12)
    prompts = [ending.random_prompt(length) for length in LENGTHS]
    outputs = cluster.beam_search([ids(prompt) for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        check_answers(output, reference(ending, prompt, 4, 1.0, 12, eos), params, eos)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("max_tokens", [1, 2, 8])
def test_answers_found_at_the_first_token(max_tokens, checkpoint, make_cluster):
    """On the prefill worker, before the search moves on."""
    model = checkpoint("llama", eos=tuple(range(0, 128, 3)))
    cluster = make_cluster(model, block_size=4)
    params = BeamSearchParams(4, max_tokens=max_tokens, length_penalty=0.0)
    prompts = [model.random_prompt(length) for length in LENGTHS]
    outputs = cluster.beam_search([ids(prompt) for prompt in prompts], params, use_tqdm=False)
    assert any(len(answer.token_ids) == 1 for output in outputs for answer in output.outputs)
    for prompt, output in zip(prompts, outputs, strict=True):
        check_answers(output, reference(model, prompt, 4, 0.0, max_tokens, eos_of(model)), params, eos_of(model))


@pytest.mark.parametrize("bad, word", [
    (dict(beam_width=0, max_tokens=4), "beam_width"), (dict(beam_width=65, max_tokens=4), "beam_width"),
    (dict(beam_width=2, max_tokens=0), "max_tokens"), (dict(beam_width=2, max_tokens=4, length_penalty="x"), "length_penalty"),
    (dict(beam_width=2, max_tokens=4, length_penalty=1000.0), "length_penalty"),
    (dict(beam_width=2, max_tokens=4, length_penalty=float("nan")), "length_penalty"),
])
def test_bad_settings(bad, word):
    with pytest.raises(InvalidRequest, match=word):
        BeamSearchParams(**bad)


def test_too_wide_for_the_engine(plain, make_llm, clean):
    llm = make_llm(plain, max_num_seqs=4, num_gpu_blocks_override=10, block_size=4)
    with pytest.raises(InvalidRequest, match="5 answers.*4 sequences"):
        llm.beam_search(ids([1, 2, 3]), BeamSearchParams(5, max_tokens=4))
    with pytest.raises(InvalidRequest, match="16 blocks; the KV cache has 10"):
        llm.beam_search(ids([1, 2, 3]), BeamSearchParams(4, max_tokens=13))
    clean(llm)
