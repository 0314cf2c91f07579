"""The public face of one engine: text in, text out."""

from __future__ import annotations

from typing import Any

import torch

from nanopd.client import Client
from nanopd.config import ModelSpec
from nanopd.core import Request, TokenEvent
from nanopd.engine.engine import Engine
from nanopd.engine.factory import EngineOptions, build_engine, give_back_memory, resolve_device
from nanopd.engine.limits import Limits
from nanopd.models.loader import load_model, load_tokenizer


class LLM(Client):
    """A model on one device, served in continuous batches.

    Args:
        model: "tiny" (embedded), a preset with load_format="dummy", a local directory, or a hub name.
        device: "cpu", "cuda" or "cuda:N". Default: a GPU if there is one, else the CPU.
        dtype: "float32", "bfloat16" or "float16". Default: float32 on a CPU, the checkpoint's on a GPU.
        options: see `EngineOptions`: max_model_len, max_num_seqs, max_num_batched_tokens, block_size, ...
    """

    def __init__(self, model: str = "tiny", *, device: str | None = None, dtype: str | torch.dtype | None = None,
                 load_format: str = "auto", seed: int = 0, **options: Any) -> None:
        engine_options = EngineOptions.from_keywords(options)
        torch_device = resolve_device(device)
        decoder = load_model(model, device=torch_device, dtype=dtype, load_format=load_format, seed=seed)
        super().__init__(load_tokenizer(model), seed)
        self._engine: Engine | None = build_engine(decoder, torch_device, engine_options)
        self.device = torch_device

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this LLM has been shut down: make a new one")
        return self._engine

    @property
    def spec(self) -> ModelSpec:
        return self.engine.runner.model.spec

    @property
    def limits(self) -> Limits:
        return self.engine.limits

    def _release(self) -> None:
        self._engine = None
        give_back_memory()

    def _start(self, request: Request) -> None:
        self.engine.add(request)

    def _advance(self) -> list[TokenEvent]:
        events = self.engine.step()
        if not events and self.has_work and not self.engine.has_work:
            raise RuntimeError("requests are open, but the engine has nothing to do: a request was lost")
        return events

    def _cancel(self, request_id: str) -> list[TokenEvent]:
        return self.engine.cancel(request_id)

    def _stop_answer(self, request_id: str, index: int) -> None:
        self.engine.cancel(request_id, index)
