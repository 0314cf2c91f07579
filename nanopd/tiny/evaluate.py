"""Accuracy of the embedded model on fresh questions, answered greedily: python -m nanopd.tiny.evaluate"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nanopd.tiny import WEIGHTS_DIR, recall_prompt
from nanopd.tiny.tasks import KINDS, LANGS, Task, is_right, make_task

RECALL_TOKENS = (256, 1024, 3500)
# Far from the seeds of training, whose generators are seeded by text and not by number.
FIRST_SEED = 1_000_000


def load(weights: Path, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The stored model in `dtype`, and its tokenizer set up for batches."""
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(weights, padding_side="left")


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str | None]:
    """Greedy answers; None where the model did not end by itself."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts: list[str | None] = []
    for new_ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        ended = tokenizer.eos_token_id in new_ids
        texts.append(tokenizer.decode(new_ids[: new_ids.index(tokenizer.eos_token_id)]) if ended else None)
    return texts


def count_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Task], chat: bool, batch: int
) -> int:
    """How many of the tasks, all of one kind, the model answers rightly."""
    prompts = [task.prompt for task in asked]
    if chat:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    max_new_tokens = 320 if asked[0].kind == "story" else 48
    right = 0
    for start in range(0, len(asked), batch):
        texts = answers(model, tokenizer, prompts[start : start + batch], max_new_tokens)
        right += sum(text is not None and is_right(task, text) for task, text in zip(asked[start:], texts))
    return right


def evaluate(
    weights: Path,
    device: str,
    dtype: torch.dtype,
    per_cell: int,
    recall_tokens: Iterable[int] = RECALL_TOKENS,
    batch: int = 50,
) -> dict[str, dict[str, int]]:
    """Right answers for every kind, language and prompt format; recall at each length of context."""
    model, tokenizer = load(weights, device, dtype)
    seeds = range(FIRST_SEED, FIRST_SEED + per_cell)
    cells: dict[str, list[Task]] = {}
    for lang in LANGS:
        for tokens in recall_tokens:
            cells[f"recall/{tokens}/{lang}"] = [
                recall_prompt(seed, tokens, lang, tokenizer) for seed in seeds
            ]
        for kind in KINDS[1:]:
            cells[f"{kind}/{lang}"] = [make_task(random.Random(seed), kind, lang) for seed in seeds]
    results: dict[str, dict[str, int]] = {}
    for chat in (False, True):
        for name, asked in cells.items():
            right = count_right(model, tokenizer, asked, chat, batch)
            key = f"{name}/{'chat' if chat else 'raw'}"
            results[key] = {"right": right, "asked": len(asked)}
            print(f"{key:24} {right:4} of {len(asked)}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--per-cell", type=int, default=20)
    parser.add_argument("--recall-tokens", type=int, nargs="*", default=list(RECALL_TOKENS))
    parser.add_argument("--batch", type=int, default=10)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    evaluate(options.weights, options.device, dtype, options.per_cell, options.recall_tokens, options.batch)


if __name__ == "__main__":
    main()
