"""The decoder: Qwen2, Qwen3 and Llama in one, told apart by their ModelSpec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nanopd.block_manager.cache import KVCache
from nanopd.config import ModelSpec
from nanopd.models.fused import embed, norm_linear
from nanopd.models.layers import DecoderLayer
from nanopd.models.parameters import Embedding, Linear, RMSNorm
from nanopd.models.rope import RotaryEmbedding
from nanopd.paged_attention.ops import AttentionBatch, plan_attention


class Decoder(nn.Module):
    """A decoder whose parameters are uninitialised: `load_model` fills them.

    They are made on torch's default device and in its default dtype, unless `factory` (`device`, `dtype`) says
    otherwise. Modules are named as in Hugging Face's checkpoints.
    """

    def __init__(self, spec: ModelSpec, **factory: Any) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size, **factory)
        self.rotary = RotaryEmbedding(spec, factory.get("device"))
        self.layers = nn.ModuleList(DecoderLayer(spec, **factory) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, **factory)
        tied = spec.tie_word_embeddings
        self.lm_head = None if tied else Linear(spec.hidden_size, spec.vocab_size, **factory)

    @property
    def head(self) -> Linear | Embedding:
        """Whose weight turns hidden states into logits."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def forward(self, token_ids: Tensor, positions: Tensor, cache: KVCache, batch: AttentionBatch,
                on_layer: Callable[[int], None] | None = None, last_drawn: Tensor | None = None) -> Tensor:
        """Run T new tokens: ids and positions [T] -> the residual stream [T, hidden], before the final norm.

        `on_layer(i)` is called once layer i's new K and V are in the cache and its attention is done (on a
        GPU: queued), before its MLP. A token id below zero, -1 - i, stands for last_drawn[i].
        """
        plan_attention(batch, cache.layer(0)[0], self.spec.num_heads)
        hidden, rotation = embed(token_ids, positions, last_drawn, self.embed_tokens, self.rotary)
        for index, layer in enumerate(self.layers):
            hidden = layer.attend(hidden, rotation, cache.layer(index), batch)
            if on_layer is not None:
                on_layer(index)
            hidden = layer.feed_forward(hidden)
        return hidden

    def logits(self, x: Tensor) -> Tensor:
        """[R, hidden] before the final norm -> [R, vocab], in the model's dtype."""
        return norm_linear(x, self.norm, self.head)
