"""The embedded model "tiny": a Qwen3-shaped decoder of under five million parameters, trained from nothing.

It answers a few kinds of question in English and Chinese and ends each answer by itself, so that every part
of the engine can be watched at work, and checked, on any machine and without a download.

    weights/            config, bf16 safetensors, tokenizer with a chat template, training_log.json
    tasks.py            the generators of questions and answers
    batches.py          training batches made from them
    train.py            python -m nanopd.tiny.train --out DIR --seed 0   (one GPU, under ten minutes)
    evaluate.py         python -m nanopd.tiny.evaluate                   (accuracy on fresh questions)

A prompt is either the bare text of a task, which is the canonical format, or the same text as the user's
turn of the chat template. The answer follows at once, with no cue and no space between:

    Remember these codes: silver coin=1931; sweet sand=8117. What is the code of sweet sand?    -> 8117
    请记住这些密码：银色硬币=1931；香甜沙子=8117。“香甜沙子”的密码是多少？                        -> 8117
    What is 47+35?                                                                              -> 82
    Sort these numbers: 72, 97, 8, 32.                                            -> 8, 32, 72, 97

It knows nothing else: a question worded in another way gets nonsense.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopd.tiny.tasks import Kind, Lang, Task, make_recall, make_task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["WEIGHTS_DIR", "Task", "demo_prompts", "recall_prompt"]

WEIGHTS_DIR: Path = Path(__file__).parent / "weights"

_DEMO: tuple[tuple[Kind, Lang, int], ...] = (
    ("recall", "en", 0),
    ("recall", "zh", 3),
    ("arithmetic", "en", 24),
    ("arithmetic", "zh", 5),
    ("sort", "en", 4),
    ("reverse", "zh", 5),
    ("count", "en", 6),
    ("story", "en", 7),
    ("story", "zh", 8),
)


def recall_prompt(seed: int, target_tokens: int, lang: Lang, tokenizer: Any = None) -> Task:
    """The longest recall question of this seed whose prompt has at most `target_tokens` tokens.

    `tokenizer` is anything with `encode`; left out, it is the embedded model's own.
    """
    tokenizer = tokenizer or _own_tokenizer()

    def fits(num_pairs: int) -> bool:
        prompt = make_recall(random.Random(seed), num_pairs, lang).prompt
        encoded = tokenizer.encode(prompt)
        return len(getattr(encoded, "ids", encoded)) <= target_tokens

    low, high = 0, target_tokens // 4  # a pair takes more than four tokens in any tokenizer
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low == 0:
        raise ValueError(f"no recall question fits in {target_tokens} tokens")
    return make_recall(random.Random(seed), low, lang)


def demo_prompts(lang: Lang | None = None) -> list[Task]:
    """A few short questions of every sort, which the embedded model answers rightly."""
    return [make_task(random.Random(seed), kind, of) for kind, of, seed in _DEMO if lang in (None, of)]


@lru_cache(maxsize=1)
def _own_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(WEIGHTS_DIR / "tokenizer.json"))
