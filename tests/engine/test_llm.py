"""The public face: generate, chat, stream and submit; interrupts, errors and bad input."""

from __future__ import annotations

import itertools
import os
import signal
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest
import torch

import nanopd
from nanopd import LLM, BeamSearchParams, Cluster, ConfigError, FinishReason, InvalidRequest, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
TEXTS = ["What is 47+35?", "请记住这些密码", "Sort these numbers: 72, 97, 8, 32."]


def text_of(output) -> str:
    return output.outputs[0].text


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


@pytest.fixture
def tiny(make_llm) -> LLM:
    return make_llm("tiny")


@pytest.fixture
def model(checkpoint):
    return checkpoint("qwen3")


@pytest.fixture
def prompts(model) -> list[dict]:
    return [{"prompt_token_ids": model.prompt(length)} for length in (5, 12, 20, 9)]


def expected_of(model, prompts) -> list[list[list[int]]]:
    return [[model.greedy(prompt["prompt_token_ids"])[:8]] for prompt in prompts]


# ------------------------------------------------------------------------------------- generate


def test_outputs_come_in_the_prompts_order(tiny):
    """Whatever the order in which they end."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = tiny.generate(TEXTS, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == TEXTS
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 5]
    assert [output.prompt_token_ids for output in outputs] == [tiny.tokenizer.encode(text) for text in TEXTS]
    assert all(output.finished and output.error is None for output in outputs)


def test_the_three_ways_to_write_a_prompt(tiny):
    token_ids = tiny.tokenizer.encode(TEXTS[0])
    ways = [TEXTS[0], {"prompt": TEXTS[0]}, {"prompt_token_ids": token_ids}, {"prompt": "shown", "prompt_token_ids": token_ids},
            {"prompt_token_ids": tuple(token_ids)}]
    outputs = tiny.generate(ways, GREEDY, use_tqdm=False)
    assert len({text_of(output) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == [TEXTS[0], TEXTS[0], None, "shown", None]
    for way in ways:
        (alone,) = tiny.generate(way, GREEDY, use_tqdm=False)
        assert text_of(alone) == text_of(outputs[0])


def test_no_prompts_no_outputs(tiny):
    assert tiny.generate([], GREEDY, use_tqdm=False) == []


def test_default_params_are_sampled_and_short(tiny):
    (output,) = tiny.generate("hello", use_tqdm=False)
    assert len(output.outputs) == 1 and len(output.outputs[0].token_ids) <= 16


def test_params_must_be_as_many_as_prompts(tiny, clean):
    with pytest.raises(InvalidRequest, match="3 prompts came with 2 sampling params"):
        tiny.generate(TEXTS, [GREEDY, GREEDY])
    clean(tiny)


def test_caller_may_keep_his_list(tiny):
    token_ids = [5, 6, 7]
    prompt = {"prompt_token_ids": token_ids}
    (output,) = tiny.generate([prompt], GREEDY, use_tqdm=False)
    assert token_ids == [5, 6, 7] and prompt == {"prompt_token_ids": [5, 6, 7]} and output.prompt_token_ids == [5, 6, 7]


def test_one_bad_prompt_starts_none(tiny, clean):
    with pytest.raises(InvalidRequest, match="empty"):
        tiny.generate(["good", "", "good"], GREEDY)
    clean(tiny)
    assert tiny.engine.num_steps == 0


def test_progress_bar(tiny, capsys):
    tiny.generate(TEXTS, GREEDY)
    err = capsys.readouterr().err
    assert "Processed prompts: 100%" in err and "3/3" in err and "toks/s" in err
    tiny.generate(TEXTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_metrics(tiny):
    outputs = tiny.generate(TEXTS, GREEDY, use_tqdm=False)
    for output in outputs:
        metrics = output.metrics
        assert metrics.arrival_time < metrics.first_token_time < metrics.finish_time
        assert metrics.ttft == metrics.first_token_time - metrics.arrival_time
        assert metrics.tpot(8) == pytest.approx((metrics.finish_time - metrics.first_token_time) / 7)
        assert metrics.tpot(1) is None
    (one,) = tiny.generate("hello", SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert one.metrics.first_token_time == one.metrics.finish_time


def test_request_ids_are_never_used_twice(tiny):
    outputs = tiny.generate(TEXTS, GREEDY, use_tqdm=False) + tiny.generate(TEXTS, GREEDY, use_tqdm=False)
    assert len({output.request_id for output in outputs}) == 6


def test_public_names():
    assert nanopd.LLM is LLM and nanopd.Cluster is Cluster
    assert set(nanopd.__all__) <= set(dir(nanopd))


# ------------------------------------------------------------------------------------- chat


def test_chat_is_generate_with_the_template(tiny):
    conversations = [[{"role": "user", "content": text}] for text in TEXTS]
    outputs = tiny.chat(conversations, GREEDY, use_tqdm=False)
    for conversation, output in zip(conversations, outputs, strict=True):
        expected = tiny.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert output.prompt == expected
        assert output.prompt_token_ids == tiny.tokenizer.encode(expected, add_special_tokens=False)
    (alone,) = tiny.chat(conversations[1], GREEDY, use_tqdm=False)
    assert text_of(alone) == text_of(outputs[1])


def test_chat_without_messages_or_template(tiny, model, make_llm):
    with pytest.raises(InvalidRequest, match="messages is empty"):
        tiny.chat([], GREEDY)
    with pytest.raises(InvalidRequest, match="no chat template"):
        make_llm(model).chat([{"role": "user", "content": "x"}], GREEDY)


# ------------------------------------------------------------------------------------- submit, stream


@pytest.fixture(params=["llm", "C:cpu", "P:cpu D:cpu"])
def client(request, model, make_llm, make_cluster):
    options = dict(block_size=4, prefill_chunk_size=8)
    return make_llm(model, **options) if request.param == "llm" else make_cluster(model, request.param, **options)


def test_streams_give_the_events_of_their_request(client, model, prompts):
    streams = [client.submit(prompt, GREEDY) for prompt in prompts]
    assert client.has_work and not any(stream.finished for stream in streams)
    for stream, (expected,) in zip(streams, expected_of(model, prompts), strict=True):
        events = list(stream)
        assert [event.token_id for event in events] == expected
        assert {event.request_id for event in events} == {stream.request_id}
        assert [event.finish_reason for event in events] == [None] * 7 + [FinishReason.LENGTH]
        assert stream.finished and stream.result().outputs[0].token_ids == expected
        assert list(stream) == []
    assert not client.has_work


def test_stream_of_several_answers_misses_none(client, prompts):
    """Also where several end in one step."""
    params = SamplingParams(n=3, seed=1, temperature=1.5, max_tokens=6, ignore_eos=True)
    stream = client.submit(prompts[0], params)
    events = list(stream)
    for answer in stream.result().outputs:
        assert [event.token_id for event in events if event.index == answer.index] == answer.token_ids
    assert sum(event.finish_reason is not None for event in events) == 3


def test_result_needs_no_iteration(client, model, prompts):
    streams = [client.submit(prompt, GREEDY) for prompt in prompts]
    assert tokens_of([stream.result() for stream in streams[::-1]]) == expected_of(model, prompts)[::-1]


def test_leaving_a_stream_early_cancels_and_frees(client, model, prompts, clean):
    for left_after in range(1, 6):
        for count, event in enumerate(client.stream(prompts[2], GREEDY), start=1):
            assert event.token_id == expected_of(model, prompts)[2][0][count - 1]
            if count == left_after:
                break
        clean(client)


def test_streams_cancelled_at_any_step_leave_the_others_alone(client, model, prompts, clean):
    sampled = SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True)
    for step in range(8):
        kept, cancelled, forked = (client.submit(prompt, p) for prompt, p in zip(prompts, [GREEDY, GREEDY, sampled], strict=False))
        for _ in range(step):
            client.step()
        cancelled.close()
        client.cancel(forked.request_id)
        client.cancel("no such request")
        assert tokens_of([kept.result()]) == expected_of(model, prompts)[:1]
        assert {a.finish_reason for s in (cancelled, forked) for a in s.result().outputs} <= {FinishReason.ABORT, FinishReason.LENGTH}
        assert cancelled.result().outputs[0].token_ids == expected_of(model, prompts)[1][0][: len(cancelled.result().outputs[0].token_ids)]
        clean(client)


def test_closing_twice_or_after_the_end_does_nothing(client, prompts, clean):
    stream = client.submit(prompts[0], GREEDY)
    output = stream.result()
    stream.close()
    stream.close()
    assert stream.result() is output and output.outputs[0].finish_reason is FinishReason.LENGTH
    clean(client)


def test_generate_beside_open_streams(client, model, prompts):
    """generate() drives them along; their events wait for whoever asks."""
    stream = client.submit(prompts[0], GREEDY)
    assert tokens_of(client.generate(prompts[1:], GREEDY, use_tqdm=False)) == expected_of(model, prompts)[1:]
    assert [event.token_id for event in stream] == expected_of(model, prompts)[0][0]


# ------------------------------------------------------------------------------------- interrupts, errors


class Raising:
    """Stands in for a runner: raises instead of its `step`-th execute (from 0), before or after doing it."""

    def __init__(self, runner, step: int, error: BaseException, after: bool = False) -> None:
        self.inner, self.model, self.cache = runner, runner.model, runner.cache
        self.step, self.error, self.after = step, error, after
        self.calls = 0

    def execute(self, plan, on_layer=None):
        self.calls += 1
        if self.calls - 1 != self.step:
            return self.inner.execute(plan, on_layer)
        if self.after:
            self.inner.execute(plan, on_layer)
        raise self.error


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(8))
def test_interrupted_generate_leaves_nothing_behind(step, after, model, prompts, make_llm, clean):
    llm = make_llm(model, block_size=4, prefill_chunk_size=8)
    runner = llm.engine.runner
    llm.engine.runner = Raising(runner, step, KeyboardInterrupt(), after)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    clean(llm)
    llm.engine.runner = runner
    assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected_of(model, prompts)


@pytest.mark.parametrize("call", [5, 15])
@pytest.mark.parametrize("method", ["allocate", "append_slot", "fork", "free", "commit"])
@pytest.mark.parametrize("kind", ["llm", "cluster"])
def test_ctrl_c_while_something_is_noted_down(kind, method, call, model, prompts, make_llm, make_cluster, clean):
    """A signal, as it comes from a terminal, within the planning of a step or the taking in of its result."""
    client = (make_llm if kind == "llm" else make_cluster)(model, block_size=4, prefill_chunk_size=8, max_num_seqs=4)
    engines = [client.engine] if kind == "llm" else [worker.engine for worker in client.workers.values()]
    countdown = itertools.count(call, -1)
    with ExitStack() as patches:
        for manager in (engine.scheduler.manager for engine in engines):
            patches.enter_context(patch.object(manager, method, _interrupted(getattr(manager, method), countdown)))
        with pytest.raises(KeyboardInterrupt):
            while True:
                client.generate(prompts, SamplingParams(n=3, seed=3, temperature=1.5, max_tokens=9, ignore_eos=True), use_tqdm=False)
    clean(client)
    assert tokens_of(client.generate(prompts, GREEDY, use_tqdm=False)) == expected_of(model, prompts)


def _interrupted(method, countdown):
    def call(*arguments, **options):
        if next(countdown) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return method(*arguments, **options)
    return call


@pytest.mark.parametrize("step", range(8))
def test_interrupted_streams_go_on_rightly(step, model, prompts, make_llm):
    """A step that was planned but not run must not lose the copies that forked answers wait for."""
    llm = make_llm(model, block_size=4, prefill_chunk_size=8)
    params = SamplingParams(n=3, seed=3, temperature=1.5, max_tokens=8, ignore_eos=True)
    expected = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    llm.engine.scheduler.manager.reset_prefix_cache()
    llm.engine.runner.cache.poison(range(256))
    streams = [llm.submit(prompt, params) for prompt in prompts]
    llm.engine.runner = Raising(llm.engine.runner, step, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        for stream in streams:
            stream.result()
    assert tokens_of([stream.result() for stream in streams]) == expected


@pytest.mark.parametrize("worker_id, step", [*(("P0", step) for step in range(3)), *(("D0", step) for step in range(6))])
def test_interrupted_cluster_leaves_nothing_behind(worker_id, step, model, prompts, make_cluster, clean):
    cluster = make_cluster(model, block_size=4, prefill_chunk_size=8)
    engine = cluster.workers[worker_id].engine
    runner = engine.runner
    engine.runner = Raising(runner, step, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        cluster.generate(prompts, GREEDY, use_tqdm=False)
    engine.runner = runner
    clean(cluster)
    assert tokens_of(cluster.generate(prompts, GREEDY, use_tqdm=False)) == expected_of(model, prompts)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(8))
def test_broken_step_fails_its_requests_only(step, after, model, prompts, make_llm, clean):
    llm = make_llm(model, block_size=4, prefill_chunk_size=8, max_num_seqs=4)
    params = SamplingParams(n=2, seed=3, temperature=1.5, max_tokens=4, ignore_eos=True)
    expected = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    llm.engine.scheduler.manager.reset_prefix_cache()
    llm.engine.history.clear()
    llm.engine.runner = runner = Raising(llm.engine.runner, step, RuntimeError("out of luck"), after)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert runner.calls > step
    failed = [output for output in outputs if output.error]
    assert 1 <= len(failed) <= 2  # max_num_seqs lets two run at a time
    for output, tokens in zip(outputs, expected, strict=True):
        if output.error:
            assert output.error == "RuntimeError: out of luck"
            assert {answer.finish_reason for answer in output.outputs} == {FinishReason.ERROR}
            assert all(got == whole[: len(got)] for got, whole in zip(tokens_of([output])[0], tokens, strict=True))
        else:
            assert tokens_of([output]) == [tokens]
    clean(llm)
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected


@pytest.mark.parametrize("worker_id, step", [*(("P0", step) for step in range(3)), *(("D0", step) for step in range(5))])
def test_broken_step_in_a_cluster(worker_id, step, model, prompts, make_cluster, clean):
    cluster = make_cluster(model, block_size=4, prefill_chunk_size=8)
    params = SamplingParams(n=2, seed=3, temperature=1.5, max_tokens=6, ignore_eos=True)
    expected = tokens_of(cluster.generate(prompts, params, use_tqdm=False))
    for worker in cluster.workers.values():
        worker.manager.reset_prefix_cache()
    engine = cluster.workers[worker_id].engine
    engine.runner = Raising(engine.runner, step, RuntimeError("out of luck"))
    outputs = cluster.generate(prompts, params, use_tqdm=False)
    assert any(output.error for output in outputs)
    for output, tokens in zip(outputs, expected, strict=True):
        if output.error:
            assert output.error == "RuntimeError: out of luck"
            assert {answer.finish_reason for answer in output.outputs} == {FinishReason.ERROR}
        else:
            assert tokens_of([output]) == [tokens]
    clean(cluster)
    assert tokens_of(cluster.generate(prompts, params, use_tqdm=False)) == expected


# ------------------------------------------------------------------------------------- bad input

BAD_PROMPTS = [
    ("", "prompt is empty.*at least one token"),
    ({"prompt_token_ids": []}, "prompt is empty"),
    ({"prompt_token_ids": [1] * 64}, "64 tokens; the context holds 64"),
    ({"prompt_token_ids": [1] * 500}, "500 tokens; the context holds 64.*max_model_len"),
    ({"prompt_token_ids": [1, 1664]}, "token id 1664 is out of range.*0 to 1663"),
    ({"prompt_token_ids": [-1]}, "token id -1 is out of range"),
    ({"prompt_token_ids": [1, True]}, "token id True is not an integer"),
    ({"prompt_token_ids": [1.5]}, "token id 1.5 is not an integer"),
    ({"prompt_token_ids": [1.0]}, "token id 1.0 is not an integer"),
    ({"prompt_token_ids": ["a"]}, "token id 'a' is not an integer"),
    ({"prompt_token_ids": [[1, 2]]}, r"token id \[1, 2\] is not an integer"),
    ({"prompt_token_ids": [None]}, "token id None is not an integer"),
    ({"prompt_token_ids": "abc"}, "prompt_token_ids must be a list of integers, got str"),
    ({"prompt_token_ids": None}, "prompt_token_ids must be a list of integers, got NoneType"),
    ({"prompt_token_ids": 7}, "prompt_token_ids must be a list of integers, got int"),
    ({"prompt_token_ids": torch.tensor([1])}, "prompt_token_ids must be a list of integers, got Tensor"),
    ({"prompt_token_ids": list(np.array([1]))}, "is not an integer"),
    ({"text": "abc"}, 'must be a text or {"prompt_token_ids".*dict'),
    ({"prompt": 5}, 'must be a text or {"prompt_token_ids".*'),
    (5, 'must be a text or {"prompt_token_ids".*int: 5'),
    (None, "must be a text.*NoneType"),
    (b"abc", "must be a text.*bytes"),
    ([1.5, 2.5], "must be a text.*float"),
    ([1, 2, 3], "must be a text.*int: 1"),
    (("a", "b"), "must be a text.*tuple"),
]

BAD_PARAMS = [
    (dict(max_tokens=0), "max_tokens.*at least 1.*got 0"), (dict(max_tokens=-3), "max_tokens.*got -3"),
    (dict(max_tokens=1.5), "max_tokens.*1.5"), (dict(max_tokens=True), "max_tokens.*True"),
    (dict(min_tokens=-1), "min_tokens"), (dict(min_tokens=5, max_tokens=4), r"min_tokens \(5\) must not exceed max_tokens \(4\)"),
    (dict(n=0), "n must be.*at least 1.*got 0"), (dict(n=2, temperature=0), "n > 1 with temperature 0"),
    (dict(n="2"), "n must be"), (dict(temperature=-0.1), "temperature.*>= 0.*-0.1"), (dict(temperature=float("nan")), "temperature"),
    (dict(temperature=float("inf")), "temperature"), (dict(temperature=None), "temperature"), (dict(top_k=-2), "top_k.*-2"),
    (dict(top_k=1.5), "top_k"), (dict(top_p=0), r"top_p must be in \(0, 1\]"), (dict(top_p=1.01), "top_p"),
    (dict(min_p=-0.1), r"min_p must be in \[0, 1\]"), (dict(min_p=1.1), "min_p"), (dict(repetition_penalty=0), "repetition_penalty"),
    (dict(seed=1.5), "seed"), (dict(seed="x"), "seed"), (dict(stop=""), "stop must hold non-empty strings"),
    (dict(stop=["a", ""]), "stop"), (dict(stop=[1]), "stop"), (dict(stop=5), "stop must be a list"),
    (dict(stop_token_ids=[-1]), "stop_token_ids"), (dict(stop_token_ids=["a"]), "stop_token_ids"),
    (dict(stop_token_ids=5), "stop_token_ids must be a list"), (dict(logprobs=-1), "logprobs"), (dict(logprobs=65), "logprobs"),
]

BAD_OPTIONS = [
    (dict(block_size=0), "block_size must be from 1 to 1024, got 0"), (dict(block_size=-4), "block_size"),
    (dict(block_size=0, num_gpu_blocks_override=None), "block_size must be from 1 to 1024, got 0"),
    (dict(block_size=2048), "block_size"), (dict(num_gpu_blocks_override=0), "num_blocks must be at least 1, got 0"),
    (dict(max_num_seqs=0), "max_num_seqs must be at least 1"), (dict(max_num_seqs=64, max_num_batched_tokens=32), "max_num_batched_tokens"),
    (dict(prefill_chunk_size=0), "prefill_chunk_size"), (dict(max_model_len=1), "max_model_len must be at least 2"),
    (dict(max_model_len=10**6), "max_model_len 1000000 is more than the 4096"), (dict(gpu_memory_utilization=0), "gpu_memory_utilization"),
    (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization"), (dict(watermark=1.0), "watermark"),
    (dict(max_tokens=5), "unknown option max_tokens; options are max_model_len, "), (dict(blocksize=5), "unknown option blocksize"),
]


@pytest.fixture(scope="module")
def small():
    """Context of 64 tokens, at most 8 sequences, 10 blocks of 16."""
    return LLM("tiny", device="cpu", max_model_len=64, max_num_seqs=8, num_gpu_blocks_override=10)


def still_answers(llm, clean) -> None:
    clean(llm)
    (output,) = llm.generate("hello", GREEDY, use_tqdm=False)
    assert output.error is None and len(output.outputs[0].token_ids) == 8
    clean(llm)


@pytest.mark.parametrize("prompt, message", BAD_PROMPTS, ids=repr)
def test_bad_prompt(prompt, message, small, clean):
    for ask in (lambda: small.generate(prompt, GREEDY), lambda: small.submit(prompt, GREEDY),
                lambda: list(small.stream(prompt, GREEDY)), lambda: small.beam_search(prompt, BeamSearchParams(2, 4))):
        if isinstance(prompt, list) and ask.__code__.co_names[0] in ("submit", "list"):
            continue  # a list is many prompts to generate() only
        with pytest.raises(InvalidRequest, match=message):
            ask()
    still_answers(small, clean)


@pytest.mark.parametrize("options, message", BAD_PARAMS, ids=repr)
def test_bad_sampling_params(options, message):
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**options)


def test_vllms_spellings_are_taken():
    params = SamplingParams(stop=None, stop_token_ids=None, top_k=-1)
    assert (params.stop, params.stop_token_ids, params.top_k) == ((), (), 0)
    assert SamplingParams(stop="x", stop_token_ids={3}).stop == ("x",)


@pytest.mark.parametrize("params, message", [
    (SamplingParams(n=9), "9 answers were asked for; a batch holds 8 sequences"),
    (SamplingParams(n=8, max_tokens=60), "8 answers of up to 63 tokens may need 32 blocks; the KV cache has 10"),
    (SamplingParams(stop_token_ids=[1664], min_tokens=1), "stop token id 1664 is out of range.*0 to 1663"),
    ({"temperature": 0}, "sampling_params must be SamplingParams, got dict"),
], ids=str)
def test_params_that_the_engine_cannot_serve(params, message, small, clean):
    with pytest.raises(InvalidRequest, match=message.replace("63 tokens", r"\d+ tokens")):
        small.generate("a", params)
    with pytest.raises(InvalidRequest):
        small.submit("a", params)
    still_answers(small, clean)


def test_beam_params_of_the_wrong_kind(small, clean):
    with pytest.raises(InvalidRequest, match="must be BeamSearchParams, got SamplingParams"):
        small.beam_search("a", GREEDY)
    still_answers(small, clean)


def test_prompt_longer_than_all_blocks(make_llm, clean):
    llm = make_llm("tiny", num_gpu_blocks_override=2)
    with pytest.raises(InvalidRequest, match="32 tokens; the KV cache holds 2 blocks of 16 = 32 tokens"):
        llm.generate({"prompt_token_ids": [5] * 32}, GREEDY)
    clean(llm)
    (output,) = llm.generate({"prompt_token_ids": [5] * 31}, GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1


@pytest.mark.parametrize("options, message", BAD_OPTIONS, ids=repr)
def test_bad_options(options, message):
    options = {"num_gpu_blocks_override": 16, **options}
    with pytest.raises(ConfigError, match=message):
        LLM("tiny", device="cpu", **options)
    with pytest.raises(ConfigError, match=message):
        Cluster("tiny", **options)


@pytest.mark.parametrize("device, message", [
    ("tpu", "unknown device 'tpu'; devices are 'cpu', 'cuda'"), ("cuda:99", "'cuda:99' is not there: torch sees"),
    ("meta", "'meta' is not supported; devices are"), ("", "unknown device ''"), (1.5, "unknown device 1.5"),
    ("cuda:x", "unknown device 'cuda:x'"),
])
def test_bad_device(device, message):
    with pytest.raises(ConfigError, match=message):
        LLM("tiny", device=device)


@pytest.mark.parametrize("topology, mode, message", [
    ("X:cpu", "collocated", "unknown role 'X'"), ("P:cpu", "disaggregated", "needs workers of role D and P"),
    ("P:cpu D:cpu", "adaptively", "unknown mode 'adaptively'"), ("", "collocated", "at least one worker"),
    ("C:tpu", "collocated", "is not ROLE:DEVICE"), ("C:99", "collocated", "is not there"),
])
def test_bad_topology(topology, mode, message):
    with pytest.raises(ConfigError, match=message):
        Cluster("tiny", topology, mode)


def test_default_cache_holds_the_context():
    """No number of blocks given: as many as fit a CPU's share, and at least one full context."""
    llm = LLM("tiny", device="cpu")
    assert llm.limits.max_len == llm.spec.max_position
    assert len(text_of(llm.generate("hello", GREEDY, use_tqdm=False)[0])) > 0
