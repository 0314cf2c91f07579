"""The public face: `LLM` (one engine) and `Cluster` (workers with roles). Text in, text out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from nanopd.client import Client
from nanopd.config import ConfigError, ModelSpec, Topology
from nanopd.core import Request, TokenEvent
from nanopd.engine.engine import Engine
from nanopd.engine.factory import EngineOptions, build_engine, give_back_memory
from nanopd.engine.limits import Limits
from nanopd.models.decoder import Decoder
from nanopd.models.loader import load_model, load_tokenizer
from nanopd.router.central_scheduler import TIMELINES_KEPT, CentralScheduler
from nanopd.router.timeline import Timeline
from nanopd.workers.executors import InlineExecutor
from nanopd.workers.transfer import LocalTransport
from nanopd.workers.worker import Worker


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
        engine_options = _engine_options(options)
        torch_device = _resolve_device(device)
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


class Cluster(Client):
    """Workers with roles on one or more devices, all in this process and thread.

    Args:
        model: as for `LLM`.
        topology: workers as ROLE:DEVICE, roles C (collocated), P (prefill), D (decode); "P:cpu D:cpu", "C:0".
        mode: "collocated" or "disaggregated".
    """

    def __init__(self, model: str = "tiny", topology: str = "P:cpu D:cpu", mode: str = "disaggregated", *,
                 dtype: str | torch.dtype | None = None, load_format: str = "auto", seed: int = 0, **options: Any) -> None:
        self.topology = Topology.parse(topology)
        self.topology.check_mode(mode)
        self.mode = mode
        engine_options = _engine_options(options)
        devices = [_resolve_device(placement.device) for placement in self.topology.placements]
        if len(set(devices)) > 1:
            raise ConfigError(f"topology {topology!r} names several devices; the inline executor runs all workers on one")
        decoder = load_model(model, device=devices[0], dtype=dtype, load_format=load_format, seed=seed)
        super().__init__(load_tokenizer(model), seed)
        self._executor = InlineExecutor(self._build_workers(decoder, devices[0], engine_options))
        limits = Limits.tightest(worker.engine.limits for worker in self.workers.values())
        self._central = CentralScheduler(self._executor, mode, limits)

    def _build_workers(self, decoder: Decoder, device: torch.device, options: EngineOptions) -> list[Worker]:
        """One worker for each placement, with a cache of its own. They share the weights."""
        workers: dict[str, Worker] = {}
        numbers: dict[str, count[int]] = {}

        def connect_from(source_id: str) -> Callable[[str], LocalTransport]:
            return lambda target_id: LocalTransport(workers[source_id].cache, workers[target_id].cache)

        for num_built, placement in enumerate(self.topology.placements):
            worker_id = f"{placement.role}{next(numbers.setdefault(placement.role, count()))}"
            share = 1 / (len(self.topology.placements) - num_built)  # of the memory that the others have left
            engine = build_engine(decoder, device, options, cache_share=share)
            workers[worker_id] = Worker(worker_id, placement.role, engine, engine.runner.cache, connect_from(worker_id))
        return list(workers.values())

    @property
    def workers(self) -> dict[str, Worker]:
        """By id: "C0", "P0", "P1", "D0", ..."""
        return self._executor.workers

    @property
    def limits(self) -> Limits:
        return self._central.limits

    def timeline(self, request_id: str) -> Timeline:
        """The request's path through the workers, and when it got where."""
        if request_id not in self._central.timelines:
            raise KeyError(f"no request {request_id!r}; timelines are kept of the last {TIMELINES_KEPT} requests")
        return self._central.timelines[request_id]

    def _release(self) -> None:
        self._executor.workers.clear()
        give_back_memory()

    def _start(self, request: Request) -> None:
        if not self.workers:
            raise RuntimeError("this cluster has been shut down: make a new one")
        self._central.submit(request)

    def _advance(self) -> list[TokenEvent]:
        events = self._central.step()
        if not events and self.has_work and not self._central.has_work:
            raise RuntimeError("requests are open, but no worker knows of them: a request was lost")
        return events

    def _cancel(self, request_id: str) -> list[TokenEvent]:
        return self._central.cancel(request_id)

    def _stop_answer(self, request_id: str, index: int) -> None:
        self._central.cancel(request_id, index)


def _engine_options(options: dict[str, Any]) -> EngineOptions:
    known = EngineOptions.__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"unknown option {', '.join(unknown)}; options are {', '.join(known)}")
    return EngineOptions(**options)


def _resolve_device(device: str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device {device!r}; devices are 'cpu', 'cuda' and 'cuda:N'") from error
    if resolved.type == "cuda":
        found = torch.cuda.device_count()
        if (resolved.index or 0) >= found:
            raise ConfigError(f"device {device!r} is not there: torch sees {found} GPU(s); `nanopd doctor` says more")
        return torch.device("cuda", resolved.index or 0)
    if resolved.type != "cpu":
        raise ConfigError(f"device {device!r} is not supported; devices are 'cpu', 'cuda' and 'cuda:N'")
    return resolved
