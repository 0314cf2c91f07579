"""Train the embedded model from nothing: python -m nanopd.tiny.train --out DIR --seed 0

One GPU, under ten minutes. The text comes from `tasks`, the tokenizer is trained on that text, batches are
made by worker processes while the GPU works, and the weights, the tokenizer and a log of the run go to DIR.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from nanopd.tiny import tasks
from nanopd.tiny.batches import END_OF_TEXT, TURN_END, TURN_START, Batch, BatchMaker
from nanopd.tiny.evaluate import evaluate

CONTEXT = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TrainConfig:
    """All that a run depends on, besides the code."""

    seed: int = 0
    steps: int = 5000
    recall_tokens: int = 65_536
    short_tokens: int = 24_576
    learning_rate: float = 1.5e-3
    warmup: int = 300
    weight_decay: float = 0.1
    hidden: int = 256
    layers: int = 5
    mlp: int = 640
    per_cell: int = 100
    workers: int = max(1, (os.cpu_count() or 2) - 1)


def train_tokenizer(seed: int, samples: int = 60_000) -> Tokenizer:
    """Byte-level BPE on the tasks' own text, each digit a token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        # Words are frequent and pairs of words are rare: stop before an adjective merges with a noun.
        min_frequency=60,
        # Nine bytes hold a space and an English word, or three Chinese characters: no phrase is one token.
        max_token_length=9,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in (END_OF_TEXT, TURN_START, TURN_END)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(random.Random(f"{seed}/tokenizer"), samples), trainer)
    return tokenizer


def _tokenizer_text(rng: random.Random, samples: int) -> Iterator[str]:
    for _ in range(samples):
        task = tasks.make_task(rng, rng.choice(tasks.KINDS), rng.choice(tasks.LANGS), num_pairs=16)
        yield task.prompt
        yield task.answer
    for role in ("system", "user", "assistant"):
        yield from [f"{role}\n"] * 1000
    # Each character by itself, often: its bytes merge before any byte of a neighbour joins them.
    for character in sorted(tasks.characters("zh")):
        yield from [character] * (samples // 10)


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """The two files that AutoTokenizer reads; no class of its own, so any release loads it alike."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights, its vocabulary rounded up for the matrix units."""
    special = {
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
    }
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=math.ceil(tokenizer.get_vocab_size() / 64) * 64,
            hidden_size=config.hidden,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
            **special,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=320, **special)
    return model


def answer_loss(model: Qwen3ForCausalLM, batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross entropy over the answers' tokens, and the share of them predicted rightly."""
    ids = torch.from_numpy(batch.ids.astype("int64")).to(device, non_blocking=True)
    targets = torch.from_numpy(batch.targets.astype("int64")).to(device, non_blocking=True)
    weights = torch.from_numpy(batch.weights).to(device, non_blocking=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # The hidden state one place earlier predicts a token; the rest need no logits at all.
        logits = model.lm_head(hidden.flatten(0, 1)[targets - 1]).float()
    labels = ids.flatten()[targets]
    losses = F.cross_entropy(logits, labels, reduction="none")
    right = (logits.argmax(-1) == labels).float()
    return (losses * weights).sum() / weights.sum(), right.mean()


def fit(
    model: Qwen3ForCausalLM, maker: BatchMaker, config: TrainConfig, device: str, pool: Pool
) -> dict[str, float]:
    """The training loop; returns the last window's mean losses and accuracies."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    window: list[torch.Tensor] = []
    means: dict[str, float] = {}
    started = time.monotonic()
    for step, batches in enumerate(pool.imap(maker, range(config.steps)), start=1):
        stats: list[torch.Tensor] = []
        for batch in batches:
            loss, accuracy = answer_loss(model, batch, device)
            loss.backward()
            stats += [loss.detach(), accuracy]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        window.append(torch.stack(stats))
        if step % 100 == 0 or step == config.steps:
            values = torch.stack(window).mean(0).tolist()
            window.clear()
            means = dict(zip(("recall_loss", "recall_accuracy", "short_loss", "short_accuracy"), values))
            text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"step {step:5} of {config.steps}  {time.monotonic() - started:4.0f} s  {text}", flush=True)
    return means


def _rate(step: int, config: TrainConfig) -> float:
    """Linear warmup, then a cosine down to nothing."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def train(out: Path, config: TrainConfig, device: str) -> None:
    """Tokenizer, model, training, evaluation, log."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(config.seed)
    save_tokenizer(tokenizer, out)
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {time.monotonic() - started:.0f} s", flush=True)
    maker = BatchMaker(
        tokenizer.to_str(), config.seed, config.steps, config.recall_tokens, config.short_tokens
    )
    # Forked before the GPU is touched: a CUDA context does not survive a fork.
    with multiprocessing.get_context("fork").Pool(config.workers) as pool:
        model = build_model(config, tokenizer).to(device)
        print(f"model: {model.num_parameters():,} parameters", flush=True)
        final = fit(model, maker, config, device, pool)
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    training_seconds = time.monotonic() - started
    torch.set_float32_matmul_precision("highest")
    accuracy = {
        str(dtype).removeprefix("torch."): evaluate(out, device, dtype, config.per_cell)
        for dtype in (torch.float32, torch.bfloat16)
    }
    log = {
        "date": datetime.date.today().isoformat(),
        "config": asdict(config),
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "training_seconds": round(training_seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "final": final,
        "accuracy": accuracy,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (out / "training_log.json").write_text(json.dumps(log, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    train(options.out, TrainConfig(seed=options.seed, steps=options.steps), options.device)


if __name__ == "__main__":
    main()
