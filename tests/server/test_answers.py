"""What OpenAI's own client gets from the server is what LLM answers."""

from __future__ import annotations

import pytest
from checkpoints import make_checkpoint
from server.harness import running

from nanopd.cluster import Cluster
from nanopd.core import SamplingParams
from nanopd.tiny import demo_prompts

TEXTS = [task.prompt for task in demo_prompts()[:5]]
STORY = "Tell a story about a cat."
CHAT = [{"role": "user", "content": TEXTS[2]}]


def test_demo_prompts_differ():
    assert len(set(TEXTS)) == 5 and any(not text.isascii() for text in TEXTS)


def answers(llm, prompts, **sampling):
    return llm.generate(prompts, SamplingParams(**sampling), use_tqdm=False)


def texts(outputs):
    return [answer.text for output in outputs for answer in output.outputs]


def by_choice(chunks, text_of):
    """The texts and the reasons to end of a stream's choices, by their index."""
    found, reasons = {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (text_of(choice) or "")
            if choice.finish_reason is not None:
                assert choice.index not in reasons, "an answer ends once"
                reasons[choice.index] = choice.finish_reason
    return [found[index] for index in sorted(found)], [reasons[index] for index in sorted(reasons)]


# --------------------------------------------------------------------------------------------- completions


def test_greedy_completions(server, llm):
    expected = answers(llm, TEXTS, temperature=0, max_tokens=40)
    got = server.openai.completions.create(model="tiny", prompt=TEXTS, temperature=0, max_tokens=40)
    assert (got.object, got.model) == ("text_completion", "tiny")
    assert [choice.text for choice in got.choices] == texts(expected)
    assert [choice.index for choice in got.choices] == list(range(5))
    assert [choice.finish_reason for choice in got.choices] == [str(one.outputs[0].finish_reason) for one in expected]
    prompt_tokens, written = (sum(map(len, ids)) for ids in zip(*((one.prompt_token_ids, one.outputs[0].token_ids) for one in expected)))
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (prompt_tokens, written)
    assert got.usage.total_tokens == prompt_tokens + written


def test_prompts_as_token_ids(server, llm):
    token_ids = [llm.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    expected = texts(answers(llm, TEXTS[:2], temperature=0))
    for prompt in (token_ids, token_ids[0]):
        got = server.openai.completions.create(model="tiny", prompt=prompt, temperature=0)
        assert [choice.text for choice in got.choices] == expected[: len(got.choices)]
        assert got.usage.prompt_tokens == sum(map(len, token_ids[: len(got.choices)]))


def test_streams_concatenate_to_the_same(server, llm):
    expected = answers(llm, TEXTS, temperature=0, max_tokens=40)
    chunks = list(server.openai.completions.create(model="tiny", prompt=TEXTS, temperature=0, max_tokens=40, stream=True,
                                                   stream_options={"include_usage": True}))
    got, reasons = by_choice(chunks, lambda choice: choice.text)
    assert got == texts(expected)
    assert reasons == [str(one.outputs[0].finish_reason) for one in expected]
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1) and chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == sum(len(one.outputs[0].token_ids) for one in expected)


def test_a_stream_comes_in_pieces(one_server):
    chunks = list(one_server.openai.completions.create(model="tiny", prompt=STORY, temperature=0, max_tokens=60, stream=True,
                                                       extra_body={"ignore_eos": True}))
    assert len(chunks) > 10 and not any(chunk.usage for chunk in chunks)


def test_a_model_without_a_tokenizer_takes_and_streams_token_ids(tmp_path):
    path = str(tmp_path)
    make_checkpoint(tmp_path, "qwen3", layers=1, hidden=32, heads=4, kv_heads=2, head_dim=8, vocab=64, max_position=64, eos=None)
    with running(make_cluster=lambda: Cluster(path, "C:cpu", "collocated")) as server:
        chunks = list(server.openai.completions.create(model="tiny", prompt=[1, 2, 3], temperature=0, max_tokens=20, stream=True,
                                                       stream_options={"include_usage": True}))
        pieces = [chunk.choices[0] for chunk in chunks[:-1]]
        assert {piece.text for piece in pieces} == {""} and pieces[-1].finish_reason == "length"
        assert 5 < len(pieces) <= 20 == chunks[-1].usage.completion_tokens
        whole = server.openai.completions.create(model="tiny", prompt=[1, 2, 3], temperature=0, max_tokens=2, logprobs=0)
        logprobs = whole.choices[0].logprobs
        assert all(token.isdigit() for token in logprobs.tokens) and logprobs.top_logprobs is None
        for path, body in (("completions", {"prompt": "x"}), ("completions", {"prompt": [1], "echo": True}),
                           ("completions", {"prompt": [1], "stop": "x"}), ("chat/completions", {"messages": CHAT})):
            refusal = server.post(f"/v1/{path}", **body)
            assert refusal.status_code == 400 and "this model has no" in refusal.text


def test_several_answers(server, llm):
    sampling = dict(n=2, temperature=1.0, seed=7, max_tokens=24)
    expected = texts(answers(llm, [STORY, TEXTS[1]], **sampling))
    assert len(set(expected)) > 2
    got = server.openai.completions.create(model="tiny", prompt=[STORY, TEXTS[1]], **sampling)
    assert [choice.text for choice in got.choices] == expected
    streamed, reasons = by_choice(server.openai.completions.create(model="tiny", prompt=[STORY, TEXTS[1]], stream=True, **sampling),
                                  lambda choice: choice.text)
    assert streamed == expected and len(reasons) == 4


def test_sampling_reaches_the_sampler(one_server, llm):
    ours = dict(top_k=5, min_p=0.01, repetition_penalty=1.3, min_tokens=8, ignore_eos=True)
    theirs = dict(temperature=0.9, top_p=0.8, seed=3, max_tokens=20)
    expected = texts(answers(llm, STORY, **theirs, **ours))
    got = one_server.openai.completions.create(model="tiny", prompt=STORY, **theirs, extra_body=ours)
    assert [choice.text for choice in got.choices] == expected
    plain = one_server.openai.completions.create(model="tiny", prompt=STORY, **theirs)
    assert plain.choices[0].text != expected[0]


def test_stop_strings_and_tokens(one_server, llm):
    (whole,) = texts(answers(llm, TEXTS[4], temperature=0, max_tokens=40))
    stop = whole[3:5]
    for stream in (False, True):
        got = one_server.openai.completions.create(model="tiny", prompt=TEXTS[4], temperature=0, max_tokens=40, stop=[stop, "never"],
                                                   stream=stream)
        found, reasons = by_choice(got if stream else [got], lambda choice: choice.text)
        assert (found, reasons) == ([whole[: whole.index(stop)]], ["stop"])
    second = answers(llm, TEXTS[4], temperature=0)[0].outputs[0].token_ids[1]
    got = one_server.openai.completions.create(model="tiny", prompt=TEXTS[4], temperature=0, extra_body={"stop_token_ids": [second]})
    assert got.usage.completion_tokens == 2 and whole.startswith(got.choices[0].text)


def test_echo(one_server, llm):
    (answer,) = texts(answers(llm, TEXTS[2], temperature=0))
    for prompt in (TEXTS[2], llm.tokenizer(TEXTS[2])["input_ids"]):
        got = one_server.openai.completions.create(model="tiny", prompt=prompt, temperature=0, echo=True)
        assert got.choices[0].text == TEXTS[2] + answer
    streamed, _ = by_choice(one_server.openai.completions.create(model="tiny", prompt=TEXTS[2], temperature=0, echo=True, stream=True),
                            lambda choice: choice.text)
    assert streamed == [TEXTS[2] + answer]


def test_logprobs_of_completions(one_server, llm):
    (expected,) = answers(llm, TEXTS[2], temperature=0, logprobs=2)[0].outputs
    request = dict(model="tiny", prompt=TEXTS[2], temperature=0, logprobs=2)
    whole = one_server.openai.completions.create(**request).choices[0].logprobs
    streamed = [chunk.choices[0].logprobs for chunk in one_server.openai.completions.create(**request, stream=True)]
    tokens = [llm.tokenizer.decode([token]) for token in expected.token_ids]
    for logprobs in ([whole], streamed):
        assert sum((one.tokens for one in logprobs), []) == tokens
        assert sum((one.token_logprobs for one in logprobs), []) == pytest.approx(
            [entry[token] for token, entry in zip(expected.token_ids, expected.logprobs)])
        assert [len(top) for one in logprobs for top in one.top_logprobs] == [2] * len(tokens)
        assert sum((one.text_offset for one in logprobs), []) == [len("".join(tokens[:number])) for number in range(len(tokens))]


# ---------------------------------------------------------------------------------------------------- chat


def test_chat(server, llm):
    (expected,) = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)
    got = server.openai.chat.completions.create(model="tiny", messages=CHAT, temperature=0)
    assert got.object == "chat.completion" and got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == expected.outputs[0].text
    assert got.usage.prompt_tokens == len(expected.prompt_token_ids)
    chunks = list(server.openai.chat.completions.create(model="tiny", messages=CHAT, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert by_choice(chunks, lambda choice: choice.delta.content) == ([expected.outputs[0].text], ["stop"])


def test_a_chat_s_messages_may_come_in_parts_and_from_a_developer(one_server):
    def ask(*messages):
        return one_server.openai.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=30).choices[0]

    system = {"role": "system", "content": "Be brief."}
    parts = {"role": "user", "content": [{"type": "text", "text": TEXTS[2][:5]}, {"type": "text", "text": TEXTS[2][5:]}]}
    assert ask({**system, "role": "developer"}, parts).message.content == ask(system, *CHAT).message.content


def test_how_long_a_chat_s_answer_may_be(one_server):
    def length(**bound):
        got = one_server.openai.chat.completions.create(model="tiny", messages=CHAT, temperature=0, extra_body={"ignore_eos": True},
                                                        **bound)
        assert got.choices[0].finish_reason == "length"
        return got.usage.completion_tokens

    assert length(max_tokens=3) == 3 and length(max_completion_tokens=5) == 5 == length(max_completion_tokens=5, max_tokens=3)


def test_several_chat_answers_with_logprobs(one_server, llm):
    sampling = dict(n=2, temperature=1.0, seed=5)
    (expected,) = llm.chat(CHAT, SamplingParams(**sampling, max_tokens=8, logprobs=3), use_tqdm=False)
    request = dict(model="tiny", messages=CHAT, **sampling, max_completion_tokens=8, logprobs=True, top_logprobs=3)
    whole = one_server.openai.chat.completions.create(**request)
    streamed = {0: [], 1: []}
    for chunk in one_server.openai.chat.completions.create(**request, stream=True):
        if chunk.choices[0].logprobs:
            streamed[chunk.choices[0].index] += chunk.choices[0].logprobs.content
    for choice, answer in zip(whole.choices, expected.outputs):
        assert choice.message.content == answer.text
        for content in (choice.logprobs.content, streamed[choice.index]):
            assert [one.token for one in content] == [llm.tokenizer.decode([token]) for token in answer.token_ids]
            assert [one.logprob for one in content] == pytest.approx(
                [entry[token] for token, entry in zip(answer.token_ids, answer.logprobs)])
            assert {len(one.top_logprobs) for one in content} == {3}
            assert bytes(content[0].bytes).decode() == content[0].token


# ------------------------------------------------------------------------------------------- what else there is


def test_models_and_health(one_server):
    (model,) = one_server.openai.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "nanopd")
    assert one_server.openai.models.retrieve("tiny").id == "tiny"
    assert (one_server.http.get("/health").status_code, one_server.http.get("/health").json()) == (200, {"status": "ok"})


def test_metrics_agree_with_what_clients_saw(server):
    before = server.metrics()
    whole = server.openai.completions.create(model="tiny", prompt=TEXTS, temperature=0)
    chunks = list(server.openai.chat.completions.create(model="tiny", messages=CHAT, temperature=0, stream=True,
                                                        stream_options={"include_usage": True}))
    server.post(prompt=[])
    after = server.metrics()

    def grown(name):
        return after[name] - before.get(name, 0)

    usages = [whole.usage, chunks[-1].usage]
    assert grown('nanopd_requests_total{endpoint="/v1/completions",outcome="completed"}') == 1
    assert grown('nanopd_requests_total{endpoint="/v1/chat/completions",outcome="completed"}') == 1
    assert grown('nanopd_requests_total{endpoint="/v1/completions",outcome="invalid"}') == 1
    assert grown("nanopd_prompt_tokens_total") == sum(usage.prompt_tokens for usage in usages)
    assert grown("nanopd_generated_tokens_total") == sum(usage.completion_tokens for usage in usages)
    for histogram in ("time_to_first_token", "time_per_output_token", "request"):
        assert grown(f"nanopd_{histogram}_seconds_count") == 6
    assert grown("nanopd_request_seconds_sum") > grown("nanopd_time_to_first_token_seconds_sum") > 0
    assert all(after[name] == 0 for name in ("nanopd_requests_open", "nanopd_streams_open", "nanopd_prompts_waiting",
                                             "nanopd_prompts_running"))
    used = {name: value for name, value in after.items() if name.startswith("nanopd_kv_blocks") and 'state="used"' in name}
    assert used and not any(used.values())
