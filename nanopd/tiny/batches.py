"""Training batches for the embedded model, each a function of the seed and the step's number.

A row is one conversation, either raw (prompt, answer, end, prompt, ...) or in the chat template. Segments are
tokenized apart, prompt from answer, just as inference sees them. Only answers carry loss.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from nanopd.tiny import tasks
from nanopd.tiny.tasks import Kind, Task

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Retrieval is learned where the list is short, then stretched: (share of the run, row lengths in turn).
CURRICULUM: tuple[tuple[float, tuple[int, ...]], ...] = (
    (0.12, (128, 256)),
    (0.30, (256, 512)),
    (0.50, (256, 512, 1024)),
    (0.68, (256, 1024, 2048)),
    (1.00, (512, 1024, 2048, 4096, 4096)),
)

SHORT_ROW = 384
SHORT_KINDS: dict[Kind, int] = {
    "recall": 15,
    "arithmetic": 35,
    "copy": 8,
    "reverse": 12,
    "count": 12,
    "sort": 15,
    "story": 10,
}
# A story is long and mostly a matter of taste: without this it would drown the short answers.
STORY_WEIGHT = 0.2

PAIR_TOKENS = 8
LIST_TOKENS = 12  # what states the list, besides its pairs
QUESTION_TOKENS = {False: 15, True: 24}  # keyed by whether the row is in the chat template


@dataclass(frozen=True)
class Batch:
    """Token ids of shape [rows, length]; `targets` index the flat ids that carry loss, with `weights`."""

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class BatchMaker:
    """Makes the two batches of a step: one of recall, one of all the short tasks."""

    def __init__(
        self, tokenizer_json: str, seed: int, steps: int, recall_tokens: int, short_tokens: int
    ) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.end_id = self.tokenizer.token_to_id(TURN_END)
        self.seed, self.steps = seed, steps
        self.recall_tokens, self.short_tokens = recall_tokens, short_tokens

    def __call__(self, step: int) -> tuple[Batch, Batch]:
        rng = random.Random(f"{self.seed}/{step}")
        length = self._row_length(step)
        recall = [self._recall_row(rng, length) for _ in range(max(1, self.recall_tokens // length))]
        short = [self._short_row(rng) for _ in range(max(1, self.short_tokens // SHORT_ROW))]
        return _stack(recall, length), _stack(short, SHORT_ROW)

    def _row_length(self, step: int) -> int:
        progress = step / self.steps
        lengths = next(lengths for until, lengths in CURRICULUM if progress < until)
        return lengths[step % len(lengths)]

    def _recall_row(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        chat, lang = rng.random() < 0.5, rng.choice(tasks.LANGS)
        room = length - LIST_TOKENS
        questions = max(1, int(rng.uniform(0.0, 0.6) * room / QUESTION_TOKENS[chat]))
        pairs = max(1, (room - questions * QUESTION_TOKENS[chat]) // PAIR_TOKENS)
        dialogue = tasks.make_recall_dialogue(rng, pairs, min(questions, pairs), lang)
        return self._encode(dialogue, chat)

    def _short_row(self, rng: random.Random) -> tuple[list[int], list[float]]:
        chat = rng.random() < 0.5
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < SHORT_ROW:
            kind = rng.choices(list(SHORT_KINDS), list(SHORT_KINDS.values()))[0]
            task = tasks.make_task(rng, kind, rng.choice(tasks.LANGS), num_pairs=rng.randint(2, 8))
            more_ids, more_weights = self._encode([task], chat, first=not ids)
            ids += more_ids
            weights += more_weights
        return ids, weights

    def _encode(self, dialogue: list[Task], chat: bool, first: bool = True) -> tuple[list[int], list[float]]:
        encoded = iter(self.tokenizer.encode_batch_fast(list(_segments(dialogue, chat, first))))
        ids: list[int] = []
        weights: list[float] = []
        for task in dialogue:
            prompt, answer = next(encoded).ids, next(encoded).ids
            ids += [*prompt, *answer, self.end_id]
            weights += [0.0] * len(prompt)
            weights += [STORY_WEIGHT if task.kind == "story" else 1.0] * (len(answer) + 1)
        return ids, weights


def _segments(dialogue: list[Task], chat: bool, first: bool) -> Iterator[str]:
    """Prompt and answer by turns; the template puts a newline after the end of the turn before."""
    for task in dialogue:
        if chat:
            before = "" if first else "\n"
            yield f"{before}{TURN_START}user\n{task.prompt}{TURN_END}\n{TURN_START}assistant\n"
        else:
            yield task.prompt
        yield task.answer
        first = False


def _stack(rows: list[tuple[list[int], list[float]]], length: int) -> Batch:
    ids = np.zeros((len(rows), length), dtype=np.uint16)
    weights = np.zeros((len(rows), length), dtype=np.float32)
    for i, (row_ids, row_weights) in enumerate(rows):
        kept = min(length, len(row_ids))
        ids[i, :kept] = row_ids[:kept]
        weights[i, :kept] = row_weights[:kept]
    targets = np.flatnonzero(weights)
    return Batch(ids, targets.astype(np.int32), weights.ravel()[targets])
