"""The embedded model through the engine: every code of a list is found, on both pipelines, and a wrong block shows.

One list is asked for many of its codes. After the first question the list is in the prefix cache, so each
further one costs little, and together they watch every part of the block table.
"""

from __future__ import annotations

import re
from itertools import product

import pytest

from nanopd import LLM, Cluster, SamplingParams
from nanopd.client import Client
from nanopd.tiny import recall_prompt
from nanopd.tiny.tasks import Lang

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PAIR = {"en": r"([a-z]+ [a-z]+)=(\d{4})", "zh": r"(\w+)=(\d{4})"}
MUST = 0.95


def questions(seed: int, num_tokens: int, lang: Lang, most: int = 24) -> list[tuple[str, str]]:
    """(prompt, answer) for keys spread evenly over one list."""
    task = recall_prompt(seed, num_tokens, lang)
    pairs = re.findall(PAIR[lang], task.prompt)
    asked = next(key for key, value in pairs if value == task.answer)
    head, tail = task.prompt.rsplit(asked, 1)
    stride = max(1, len(pairs) // most)
    return [(head + key + tail, value) for key, value in pairs[::stride]]


def share_right(client: Client, asked: list[tuple[str, str]]) -> float:
    first, *rest = [prompt for prompt, _ in asked]
    outputs = client.generate([first], GREEDY, use_tqdm=False) + client.generate(rest, GREEDY, use_tqdm=False)
    return sum(output.outputs[0].text == answer
               for output, (_, answer) in zip(outputs, asked, strict=True)) / len(asked)


def pipelines(**options: object) -> dict[str, Client]:
    return {"collocated": LLM("tiny", device="cpu", **options),
            "disaggregated": Cluster("tiny", "P:cpu D:cpu", "disaggregated", **options)}


@pytest.mark.parametrize(("num_tokens", "lang", "pipeline"), [
    *product([256, 1024], ["en", "zh"], ["collocated", "disaggregated"]), (3500, "en", "disaggregated"), (3500, "zh", "collocated"),
    *(pytest.param(3500, *case, marks=pytest.mark.nightly) for case in [("en", "collocated"), ("zh", "disaggregated")])])
def test_every_code_of_a_list_is_found(num_tokens: int, lang: Lang, pipeline: str) -> None:
    client = pipelines()[pipeline]
    asked = questions(num_tokens, num_tokens, lang)
    assert len(asked) >= 20
    assert share_right(client, asked) >= MUST


@pytest.mark.nightly
@pytest.mark.parametrize("pipeline", ["collocated", "disaggregated"])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_fresh_lists_without_a_prefix_cache(lang: Lang, pipeline: str) -> None:
    client = pipelines(enable_prefix_caching=False)[pipeline]
    asked = [(task.prompt, task.answer) for task in (recall_prompt(seed, 3500, lang) for seed in range(500, 540))]
    assert share_right(client, asked) >= MUST


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_one_wrong_block_is_seen(lang: Lang) -> None:
    """The proof that the tests above can fail: one of D's blocks gets another's content."""
    cluster = Cluster("tiny", "P:cpu D:cpu", "disaggregated")
    asked = questions(7, 256, lang)
    assert share_right(cluster, asked) == 1.0

    decode = cluster.workers["D0"]
    token_ids = cluster.tokenizer(asked[0][0])["input_ids"]
    table = decode.manager.cached_prefix(token_ids)
    decode.cache.copy_blocks([(table[0], table[len(table) // 2])])
    assert share_right(cluster, asked) < MUST
