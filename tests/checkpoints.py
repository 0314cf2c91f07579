"""Tiny random checkpoints of every supported family, to hold our decoder against Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

FAMILIES = {"qwen3": Qwen3ForCausalLM, "qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}

ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}

# Options of make_checkpoint, by a name to show. Between them they cover every branch of the decoder.
GRID: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3"},
    "qwen3-gqa1-tied": {"family": "qwen3", "heads": 4, "kv_heads": 4, "tie": True},
    "qwen3-gqa4-bias": {"family": "qwen3", "heads": 4, "kv_heads": 1, "bias": True},
    "qwen3-gqa8-wide-heads": {"family": "qwen3", "heads": 8, "kv_heads": 1, "head_dim": 32},
    "qwen3-yarn": {"family": "qwen3", "rope": "yarn"},
    "qwen3-yarn-mscale": {"family": "qwen3", "rope": {**ROPE["yarn"], "mscale": 0.7, "mscale_all_dim": 1.3}},
    "qwen3-sharded": {"family": "qwen3", "layers": 3, "shard_size": "40KB"},
    "qwen2": {"family": "qwen2"},
    "qwen2-gqa1": {"family": "qwen2", "heads": 4, "kv_heads": 4},
    "qwen2-gqa6-tied": {"family": "qwen2", "heads": 6, "kv_heads": 1, "hidden": 96, "tie": True},
    "qwen2-gqa8": {"family": "qwen2", "heads": 16, "kv_heads": 2, "head_dim": 4},
    "qwen2-yarn": {"family": "qwen2", "rope": {**ROPE["yarn"], "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2,
                                             "truncate": False}},
    "qwen2-linear": {"family": "qwen2", "rope": "linear"},
    "llama": {"family": "llama"},
    "llama-gqa1-tied": {"family": "llama", "heads": 2, "kv_heads": 2, "head_dim": 32, "tie": True},
    "llama-gqa4-bias": {"family": "llama", "heads": 8, "kv_heads": 2, "head_dim": 8, "bias": True},
    "llama-gqa8": {"family": "llama", "heads": 8, "kv_heads": 1},
    "llama-attention-bias": {"family": "llama", "bias": "attention"},
    "llama-mlp-bias": {"family": "llama", "bias": "mlp"},
    "llama-linear": {"family": "llama", "rope": "linear"},
    "llama-llama3": {"family": "llama", "rope": "llama3"},
    "llama-yarn-sharded": {"family": "llama", "rope": "yarn", "shard_size": "40KB"},
}


def make_checkpoint(
    path: Path | str,
    family: str = "qwen3",
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    hidden: int = 64,
    vocab: int = 128,
    tie: bool = False,
    rope: str | dict[str, Any] | None = None,
    bias: bool | str = False,
    eos: int | list[int] | None = None,
    seed: int = 0,
    max_position: int = 512,
    shard_size: str | None = None,
) -> PreTrainedModel:
    """Save a random model under `path` and return it: float32, in eval mode, without a tokenizer.

    family: "qwen3", "qwen2" or "llama"
    rope: a name in ROPE, parameters like those there, or None for no scaling
    bias: "attention", "mlp" (Llama only), or True for all that the family has; Qwen2's q, k and v always have one
    shard_size: bytes per file, as "40KB"; None writes a single file
    """
    options: dict[str, Any] = {} if family == "qwen2" else {"attention_bias": bias in (True, "attention")}
    if family == "llama":
        options["mlp_bias"] = bias in (True, "mlp")
    scaling = ROPE[rope] if isinstance(rope, str) else rope or {"rope_type": "default"}
    config = AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden + 8, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tie,
        max_position_embeddings=max_position, rope_parameters={"rope_theta": 10000.0, **scaling},
        bos_token_id=None, eos_token_id=eos, dtype="float32", **options)
    model = FAMILIES[family](config).float().eval()
    _randomize(model, seed)
    model.save_pretrained(path, max_shard_size=shard_size or "1GB")
    return model


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    """The usual initialisation (0.02, biases 0, norms 1) is so weak that a wrong bias or mask would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
