"""From tokens to text: detokenizing as tokens come, stop strings, and how answers end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd import FinishReason, InvalidRequest, SamplingParams
from nanopd.core import Request, TokenEvent
from nanopd.engine.output import Answer, OutputProcessor, TextStream
from nanopd.models.loader import load_tokenizer

CHINESE = "请记住这些密码：银色硬币＝１９３１；龘𠮷🦊👩‍👩‍👧"  # rare characters are several tokens of one byte each


@pytest.fixture(scope="module")
def byte_level():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def sentencepiece_like():
    """As Llama 2's: "▁" for a space, single bytes as a fallback, and the first space is not shown."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁", "▁the", "▁fox", "es", ".", "▁é", "狐", "▁▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def deltas_of(tokenizer, token_ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in token_ids] + [stream.flush()]


# ----------------------------------------------------------------------------- incremental detokenizing


@pytest.mark.parametrize("text", ["What is 47+35?", CHINESE, "mixed 中文 and\n\n  spaces ", "é" * 5, "龘" * 20], ids=repr)
def test_deltas_add_up_to_the_text(text, byte_level):
    token_ids = byte_level.encode(text, add_special_tokens=False)
    deltas = deltas_of(byte_level, token_ids)
    assert "".join(deltas) == text == byte_level.decode(token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in delta for delta in deltas)


def test_text_comes_as_soon_as_it_is_whole(byte_level):
    token_ids = byte_level.encode("a龘b", add_special_tokens=False)
    assert len(token_ids) == 5  # the rare character is three tokens
    assert deltas_of(byte_level, token_ids) == ["a", "", "", "龘", "b", ""]


def test_unfinished_character_is_shown_at_the_end_only(byte_level):
    token_ids = byte_level.encode("a龘", add_special_tokens=False)[:-1]
    assert deltas_of(byte_level, token_ids) == ["a", "", "", "\ufffd"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_add_up(data, byte_level):
    """Also those that are no text: stray bytes, special tokens, beginnings of characters."""
    characters = byte_level.encode(CHINESE, add_special_tokens=False)
    token = st.one_of(st.integers(0, len(byte_level) - 1), st.sampled_from(characters), st.integers(0, 12))
    token_ids = data.draw(st.lists(token, max_size=30))
    assert "".join(deltas_of(byte_level, token_ids)) == byte_level.decode(token_ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whole_characters_of_a_sentencepiece_tokenizer_add_up(data, sentencepiece_like):
    """Whole ones only: this kind of decoder takes back bytes that it has shown when an invalid one follows."""
    word = st.integers(0, 9).map(lambda token: [token])
    character = st.characters(codec="utf-8").map(lambda char: [10 + byte for byte in char.encode()])
    token_ids = sum(data.draw(st.lists(st.one_of(word, character), max_size=15)), [])
    assert "".join(deltas_of(sentencepiece_like, token_ids)) == sentencepiece_like.decode(token_ids, skip_special_tokens=True)


def test_spaces_of_a_sentencepiece_tokenizer(sentencepiece_like):
    token_ids = [3, 4, 5, 6, 2, 8, 1, 3]
    assert deltas_of(sentencepiece_like, token_ids) == ["the", " fox", "es", ".", " ", "狐", "", " the", ""]


# ----------------------------------------------------------------------------- stop strings


class Letters:
    """Token i is the i-th of a few words."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def decode(self, token_ids, skip_special_tokens):
        return "".join(self.words[token] for token in token_ids)


def push_all(words: list[str], token_ids: list[int], **sampling) -> tuple[Answer, list[TokenEvent], bool]:
    """Returns the answer, its events, and whether a stop string ended it."""
    answer = Answer(Request("r", [1], SamplingParams(max_tokens=None, **sampling)), 0, Letters(words))
    events = []
    for i, token in enumerate(token_ids):
        last = i == len(token_ids) - 1
        events.append(TokenEvent("r", 0, token, finish_reason=FinishReason.LENGTH if last else None))
        stopped = answer.take(events[-1])
        if answer.finished:
            return answer, events, stopped
    return answer, events, False


def test_stop_string_across_tokens():
    words = ["Hello", " wo", "rl", "d!", " more"]
    answer, events, told = push_all(words, [0, 1, 2, 3, 4], stop="world")
    assert [event.text for event in events] == ["Hello", " ", "", ""]
    assert answer.output.text == "Hello " and answer.output.token_ids == [0, 1, 2, 3]
    assert answer.output.finish_reason is FinishReason.STOP and answer.output.stop_reason == "world"
    assert told


def test_withheld_beginning_is_released():
    answer, events, _ = push_all(["a", "S", "T", "x", "S"], [0, 1, 2, 3, 4], stop=["STOP", "SX"])
    assert [event.text for event in events] == ["a", "", "", "STx", "S"]
    assert answer.output.text == "aSTxS" and answer.output.finish_reason is FinishReason.LENGTH


def test_only_what_may_yet_stop_is_withheld():
    _, events, _ = push_all(["aab", "a", "c"], [0, 1, 1, 2], stop="aaab")
    assert [event.text for event in events] == ["aab", "", "", "aac"]


def test_stop_string_in_the_last_token_tells_nobody():
    """The engine has ended the answer already; the reason is still the string."""
    answer, _, told = push_all(["a", "STOP"], [0, 1], stop="STOP")
    assert answer.output.stop_reason == "STOP" and answer.output.finish_reason is FinishReason.STOP and not told


def test_earliest_of_several_stop_strings():
    answer, _, _ = push_all(["one two three"], [0], stop=["three", "two"])
    assert answer.output.text == "one " and answer.output.stop_reason == "two"


def test_min_tokens_lets_early_stop_strings_pass():
    answer, events, _ = push_all(["ab", "c", "ab"], [0, 1, 0, 1, 2, 1], stop="ab", min_tokens=3)
    assert answer.output.text == "abcabc" and answer.output.token_ids == [0, 1, 0, 1, 2]
    answer, _, _ = push_all(["ab", "c"], [0, 1, 0, 1, 1], stop="ab", min_tokens=2)
    assert answer.output.text == "abc" and answer.output.token_ids == [0, 1, 0]


def test_stop_string_of_a_character_split_over_tokens(byte_level):
    answer = Answer(Request("r", [1], SamplingParams(stop="龘")), 0, byte_level)
    texts = []
    for token in byte_level.encode("前龘后", add_special_tokens=False):
        event = TokenEvent("r", 0, token)
        stopped = answer.take(event)
        texts.append(event.text)
        if stopped:
            break
    assert "".join(texts) == answer.output.text == "前" and answer.output.stop_reason == "龘"


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
       stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), min_tokens=st.integers(0, 3), data=st.data())
def test_stop_strings_against_the_rule_written_out(words, stops, min_tokens, data):
    """At every token: the text up to the first stop string; before it, all but the longest possible beginning of one."""
    token_ids = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=1, max_size=12))
    answer, events, _ = push_all(words, token_ids, stop=stops, min_tokens=min_tokens)
    shown, released = "", 0
    for count, event in enumerate(events, start=1):
        shown += event.text
        text = "".join(words[token] for token in token_ids[:count])
        ends = [(text.index(stop, released), stop) for stop in stops if stop in text[released:]]
        if ends and count > min_tokens:
            assert (shown, event.stop_reason) == (text[: min(ends)[0]], min(ends)[1])
            assert event.finish_reason is FinishReason.STOP and count == len(events)
        elif count == len(token_ids):
            assert shown == text and event.finish_reason is FinishReason.LENGTH
        else:
            held = max(len(text[released:][-k:]) if k and any(s.startswith(text[released:][-k:]) and len(s) > k for s in stops)
                       else 0 for k in range(min(len(text) - released, 5) + 1))
            assert shown == text[: len(text) - held] and event.finish_reason is None
        released = len(shown)
    assert shown == answer.output.text


def test_without_a_tokenizer_there_is_no_text():
    processor = OutputProcessor(None)
    processor.add(Request("r", [1], SamplingParams(max_tokens=2)))
    events, stopped = processor.process([TokenEvent("r", 0, 3), TokenEvent("r", 0, 4, finish_reason=FinishReason.LENGTH)])
    assert [event.text for event in events] == ["", ""] and stopped == []
    assert processor.pop("r").outputs[0].token_ids == [3, 4]


def test_what_comes_after_the_end_or_for_nobody_is_dropped():
    processor = OutputProcessor(None)
    processor.add(Request("r", [1], SamplingParams()))
    events, _ = processor.process([
        TokenEvent("r", 0, 3, finish_reason=FinishReason.STOP), TokenEvent("r", 0, 4), TokenEvent("unknown", 0, 5)])
    assert [event.token_id for event in events] == [3]


# ----------------------------------------------------------------------------- how answers end, in an LLM

WORLDS = ["llm", "C:cpu", "P:cpu D:cpu"]


@pytest.fixture(params=WORLDS)
def client(request, make_llm, make_cluster):
    return make_llm("tiny") if request.param == "llm" else make_cluster("tiny", request.param)


def encode(client, text: str) -> list[int]:
    return client.tokenizer.encode(text, add_special_tokens=False)


def run(client, n: int = 1, **sampling):
    params = SamplingParams(n=n, **{"max_tokens": 40, "seed": 1, **sampling})
    (output,) = client.generate("hello", params, use_tqdm=False)
    assert output.error is None
    return output.outputs


def eos_of(client) -> int:
    return client.tokenizer.eos_token_id


def test_eos_as_the_very_first_token(client, script):
    script(client, {"*": [[eos_of(client)]]})
    (answer,) = run(client)
    assert (answer.text, answer.token_ids) == ("", [eos_of(client)])
    assert answer.finish_reason is FinishReason.STOP and answer.stop_reason is None


def test_eos_ends_and_is_not_shown(client, script):
    tokens = encode(client, "8117")
    script(client, {"*": [[*tokens, eos_of(client)]]})
    (answer,) = run(client)
    assert (answer.text, answer.token_ids) == ("8117", [*tokens, eos_of(client)])
    assert answer.cumulative_logprob == -sum(range(1, len(tokens) + 2))


def test_ignore_eos(client, script):
    tokens = encode(client, "81")
    script(client, {"*": [[eos_of(client), *tokens, eos_of(client)]]}, filler=tokens[0])
    (answer,) = run(client, ignore_eos=True, max_tokens=len(tokens) + 4)
    assert answer.finish_reason is FinishReason.LENGTH and len(answer.token_ids) == len(tokens) + 4
    assert answer.text == client.tokenizer.decode(answer.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens(max_tokens, client, script):
    tokens = encode(client, "a long answer that goes on")
    script(client, {"*": [tokens]})
    (answer,) = run(client, max_tokens=max_tokens, logprobs=0)
    assert answer.token_ids == tokens[:max_tokens] and answer.finish_reason is FinishReason.LENGTH
    assert answer.logprobs == [{token: -float(i + 1)} for i, token in enumerate(tokens[:max_tokens])]


def test_stop_token_ids(client, script):
    stop = encode(client, ";")[0]
    script(client, {"*": [[*encode(client, "abc"), stop, 9]]})
    (answer,) = run(client, stop_token_ids=[stop, 7])
    assert answer.token_ids[-1] == stop and len(answer.token_ids) == len(encode(client, "abc")) + 1
    assert answer.finish_reason is FinishReason.STOP and answer.stop_reason == stop
    (answer,) = run(client, stop_token_ids=[stop], ignore_eos=True, max_tokens=30)
    assert answer.stop_reason == stop  # ignore_eos ignores EOS, not what the client asks for


def test_stop_token_before_min_tokens_does_not_end(client, script):
    stop = encode(client, ";")[0]
    script(client, {"*": [[stop, 9, stop, 9, stop]]})
    (answer,) = run(client, stop_token_ids=[stop], min_tokens=3)
    assert answer.token_ids == [stop, 9, stop, 9, stop]


@pytest.mark.parametrize("text, stop, expected", [
    ("The code is 8117; that is all.", ";", "The code is 8117"),
    ("Hello wonderful world!", "ful wor", "Hello wonder"),
    ("密码是八千一百。没有了", "。", "密码是八千一百"),
    ("x", "x", ""),  # the very first token: in a cluster, on the prefill worker
])
def test_stop_strings(text, stop, expected, client, script, clean):
    script(client, {"*": [encode(client, text)]})
    stream = client.submit("hello", SamplingParams(max_tokens=100, stop=stop, seed=1))
    texts = [event.text for event in stream]
    answer = stream.result().outputs[0]
    assert "".join(texts) == answer.text == expected
    assert answer.finish_reason is FinishReason.STOP and answer.stop_reason == stop
    assert stop in client.tokenizer.decode(answer.token_ids) and stop not in client.tokenizer.decode(answer.token_ids[:-1])
    clean(client)  # the engine was told at once


def test_one_of_several_answers_stops_early(client, script):
    texts = ["first STOP and more and more", "second, which is longer", "x STOP", "fourth"]
    script(client, {"*": [encode(client, text) for text in texts]}, filler=encode(client, ".")[0])
    answers = run(client, n=4, stop="STOP", max_tokens=30)
    assert [answer.text for answer in answers[::2]] == ["first ", "x "]
    for answer, text in zip(answers[1::2], texts[1::2], strict=True):
        assert answer.finish_reason is FinishReason.LENGTH and len(answer.token_ids) == 30
        assert answer.text.startswith(text)


def test_a_stopped_answer_frees_its_blocks_at_once(make_llm, script):
    llm = make_llm("tiny", block_size=1)
    script(llm, {"*": [encode(llm, "ab STOP"), encode(llm, "a" * 50)]})
    stream = llm.submit("hello", SamplingParams(n=2, seed=1, stop="STOP", max_tokens=60))
    before = 0
    while not any(event.finish_reason for event in llm.step()):
        before = llm.engine.scheduler.manager.num_used_blocks
    after = llm.engine.scheduler.manager.num_used_blocks
    assert after < before
    stream.close()


@pytest.mark.parametrize("blocks", [256, 2])
def test_context_limit(blocks, make_llm, script):
    """max_tokens=None goes on to the end of the context, or of the blocks."""
    llm = make_llm("tiny", max_model_len=40, num_gpu_blocks_override=blocks)
    script(llm, {"*": [[]]})
    (output,) = llm.generate("hello", SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)
    answer = output.outputs[0]
    assert answer.finish_reason is FinishReason.LENGTH
    assert len(output.prompt_token_ids) + len(answer.token_ids) == min(40, blocks * 16)


def test_stop_strings_need_a_tokenizer(checkpoint, make_llm):
    llm = make_llm(checkpoint("qwen3"))
    with pytest.raises(InvalidRequest, match="stop strings need a tokenizer.*stop_token_ids"):
        llm.generate({"prompt_token_ids": [1]}, SamplingParams(stop="x"))
