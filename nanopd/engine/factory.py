"""Puts an engine together from a loaded model and a few options."""

from __future__ import annotations

import gc
import platform
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nanopd.block_manager.cache import KVCache
from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.config import CacheConfig, ConfigError, ModelSpec, SchedulerConfig
from nanopd.engine.cuda_runner import CudaRunner
from nanopd.engine.engine import Engine
from nanopd.engine.limits import Limits
from nanopd.engine.runner import ModelRunner
from nanopd.engine.scheduler import Scheduler
from nanopd.engine.speculative import PromptLookup
from nanopd.models.decoder import Decoder

CPU_CACHE_BYTES = 2**30  # for each engine; taken up only as blocks are written


@dataclass(frozen=True)
class EngineOptions:
    """How to build an engine. Names follow vLLM's where it has one."""

    max_model_len: int | None = None  # tokens; None: what the model was made for
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefill_chunk_size: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None  # also counts on a CPU
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    enforce_eager: bool = False  # on a GPU: queue every operation, record no CUDA graphs
    num_speculative_tokens: int = 0  # drafts a step, copied from what followed the latest tokens before; 0: none
    prompt_lookup_max: int = 4  # how many of the latest tokens must have stood together before: at first
    prompt_lookup_min: int = 2  # and at least

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if "int" in field.type and type(value) is not int and not (value is None and "None" in field.type):
                raise ConfigError(f"{field.name} must be an integer, got {value!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len must be at least 2, got {self.max_model_len}")

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> EngineOptions:
        """Raises ConfigError for a name that is not known."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(keywords) - set(known))
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; options are {', '.join(known)}")
        return cls(**keywords)


def resolve_device(device: str | None) -> torch.device:
    """Which device a name stands for; None: a GPU if there is one. Raises ConfigError where it is not there."""
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


def device_name(device: torch.device | str) -> str:
    """What the device calls itself, such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def build_engine(model: Decoder, device: torch.device, options: EngineOptions, cache_share: float = 1.0) -> Engine:
    """An engine around a loaded model, with a KV cache in `cache_share` of the memory its GPU has left.

    Raises:
        ConfigError: an option is out of range, or not one block fits into memory.
    """
    spec = model.spec
    dtype = next(model.parameters()).dtype
    max_model_len = _max_model_len(spec, options)
    num_blocks = options.num_gpu_blocks_override
    if num_blocks is None:
        num_blocks = _num_blocks(spec, dtype, device, max_model_len, options, cache_share)
    cache_config = CacheConfig(num_blocks, options.block_size, options.enable_prefix_caching, options.watermark)
    cache = _allocate(spec, cache_config, device, dtype)
    manager = BlockSpaceManager.from_config(cache_config)
    scheduler_config = SchedulerConfig(
        options.max_num_seqs, options.max_num_batched_tokens, options.prefill_chunk_size, max_model_len)
    limits = Limits(spec.vocab_size, max_model_len, num_blocks, options.block_size, options.max_num_seqs)
    runner = _runner(model, cache, scheduler_config, options)
    scheduler = Scheduler(scheduler_config, manager, spec.eos_token_ids, _proposer(options))
    return Engine(runner, scheduler, limits)


def _runner(model: Decoder, cache: KVCache, config: SchedulerConfig, options: EngineOptions) -> ModelRunner:
    eos_token_ids = model.spec.eos_token_ids
    if cache.data.device.type != "cuda":
        return ModelRunner(model, cache, eos_token_ids)
    return CudaRunner(model, cache, eos_token_ids, max_num_seqs=config.max_num_seqs, max_len=config.max_model_len,
                      enforce_eager=options.enforce_eager)


def _proposer(options: EngineOptions) -> PromptLookup | None:
    if options.num_speculative_tokens == 0:
        return None
    return PromptLookup(options.num_speculative_tokens, options.prompt_lookup_max, options.prompt_lookup_min)


def _allocate(spec: ModelSpec, config: CacheConfig, device: torch.device, dtype: torch.dtype) -> KVCache:
    try:
        return KVCache(spec, config.num_blocks, config.block_size, device, dtype)
    except RuntimeError as error:  # torch has no type of its own for a CPU that is out of memory
        size = spec.kv_bytes_per_token(dtype.itemsize) * config.block_size * config.num_blocks / 2**30
        raise ConfigError(f"no room for a KV cache of {config.num_blocks} blocks, {size:.1f} GiB, on {device}: "
                          "ask for fewer with num_gpu_blocks_override") from error


def give_back_memory() -> None:
    """Return to the GPU what no living object uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _max_model_len(spec: ModelSpec, options: EngineOptions) -> int:
    if options.max_model_len is None:
        return spec.max_position
    if options.max_model_len > spec.max_position:
        raise ConfigError(f"max_model_len {options.max_model_len} is more than the {spec.max_position} positions "
                          "the model was made for")
    return options.max_model_len


def _num_blocks(spec: ModelSpec, dtype: torch.dtype, device: torch.device, max_model_len: int,
                options: EngineOptions, cache_share: float) -> int:
    """As many blocks as memory allows, but no more than all seats can fill at full length."""
    if options.block_size < 1:
        raise ConfigError(f"block_size must be from 1 to 1024, got {options.block_size}")
    block_bytes = spec.kv_bytes_per_token(dtype.itemsize) * options.block_size
    one_sequence = -(-max_model_len // options.block_size)
    most = options.max_num_seqs * one_sequence
    if device.type != "cuda":
        return max(1, min(CPU_CACHE_BYTES // block_bytes, most))
    give_back_memory()  # an engine that is gone may still hold some
    free, total = torch.cuda.mem_get_info(device)
    room = int((free - total * (1 - options.gpu_memory_utilization)) * cache_share)
    if room < block_bytes:
        raise ConfigError(f"no room for a KV cache on {device}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are "
                          f"free and gpu_memory_utilization is {options.gpu_memory_utilization}")
    return min(room // block_bytes, most)
