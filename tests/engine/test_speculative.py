"""Prompt lookup: what it proposes; and the engine's answers with it, which are those without."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd import LLM, SamplingParams
from nanopd.config import ConfigError
from nanopd.core import Sequence
from nanopd.engine.speculative import PromptLookup


def propose(tokens: list[int], num_tokens: int = 4, longest: int = 4, shortest: int = 2, limit: int = 100) -> list[int]:
    return PromptLookup(num_tokens, longest, shortest).propose(Sequence(tokens), limit)


def looked_up(tokens: list[int], num_tokens: int, longest: int, shortest: int) -> list[int]:
    """The definition, word for word: the latest earlier place of the longest suffix, and what followed it."""
    for length in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if length < len(tokens) and tokens[end - length : end] == tokens[-length:]:
                whole = list(tokens)
                for i in range(num_tokens):  # what is copied may be copied again
                    whole.append(whole[end + i])
                return whole[len(tokens) :]
    return []


def test_what_followed_last_time():
    assert propose([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5, 9]
    assert propose([1, 2, 3, 1, 2, 4, 1, 2]) == [4, 1, 2, 4]  # the latest place; then round again
    assert propose([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], num_tokens=1) == [3]  # a longer run counts for more
    assert propose([1, 2, 3, 4]) == propose([1]) == []
    assert propose([7, 7, 7]) == [7, 7, 7, 7]
    assert propose([1, 2, 3, 9, 1], shortest=1) == [2, 3, 9, 1]
    assert propose([1, 2, 3, 4, 5, 9, 1, 2], limit=2) == [3, 4]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2), st.integers(1, 6),
       st.lists(st.integers(1, 5), max_size=5))
def test_the_index_that_grows_finds_what_a_search_finds(tokens, shortest, more, num_tokens, pauses):
    lookup = PromptLookup(num_tokens, shortest + more, shortest)
    sequence = Sequence(tokens[:1])
    for token in tokens[1:]:
        sequence.append_token(token)
        if len(sequence) % (pauses[len(sequence) % len(pauses)] if pauses else 1) == 0:
            assert lookup.propose(sequence, 100) == looked_up(sequence.token_ids, num_tokens, shortest + more, shortest)


def test_what_has_ended_is_forgotten():
    lookup = PromptLookup(4)
    sequence = Sequence([1, 2, 3, 1, 2])
    lookup.propose(sequence, 4)
    lookup.forget(sequence)
    lookup.forget(sequence)
    assert not lookup._indices


@pytest.mark.parametrize(("settings", "message"), [
    ((0,), "num_speculative_tokens must be at least 1"),
    ((4, 2, 3), "prompt_lookup_min must be from 1 to prompt_lookup_max"),
    ((4, 2, 0), "prompt_lookup_min must be from 1"),
])
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        PromptLookup(*settings)


# ------------------------------------------------------------------------------------------ with the real model


PROMPTS = ["Copy this list: apple, cow, cup, owl.", "Sort these numbers: 3, 49, 55, 77, 97, 98.",
           "Reverse this list: river, cloud, tea, tree, chair, duck.", "Tell a story about a calm fox and a drum in 11 sentences."]


def answers(llm: LLM, sampling: SamplingParams) -> list[list[tuple[list[int], str]]]:
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return [[(answer.token_ids, str(answer.finish_reason)) for answer in output.outputs] for output in outputs]


@pytest.mark.parametrize("sampling", [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=40),
    SamplingParams(temperature=0.3, seed=3, n=2, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=40, min_tokens=20, stop=["o", "e"]),
], ids=["greedy", "to the end", "sampled", "stop strings"])
def test_answers_are_the_same_with_and_without(sampling: SamplingParams, clean) -> None:
    plain = LLM("tiny", device="cpu", num_gpu_blocks_override=64)
    drafting = LLM("tiny", device="cpu", num_gpu_blocks_override=64, num_speculative_tokens=4)
    assert answers(drafting, sampling) == answers(plain, sampling)
    assert drafting.engine.scheduler.drafts.accepted > 5
    clean(plain)
    clean(drafting)


def test_a_copy_takes_half_the_steps(clean) -> None:
    llm = LLM("tiny", device="cpu", num_gpu_blocks_override=64, num_speculative_tokens=4)
    llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    assert llm.engine.num_steps <= 20
    assert llm.engine.scheduler.drafts.acceptance > 0.7
    clean(llm)


def test_with_few_blocks_and_long_drafts(clean) -> None:
    plain = LLM("tiny", device="cpu", num_gpu_blocks_override=64)
    drafting = LLM("tiny", device="cpu", num_gpu_blocks_override=40, block_size=4, num_speculative_tokens=12,
                   prompt_lookup_min=1, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    assert answers(drafting, sampling) == answers(plain, sampling)
    assert drafting.engine.scheduler.drafts.accepted > 0
    clean(drafting)
