"""Frozen settings, checked where they are made. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import count
from typing import Any


class ConfigError(ValueError):
    """A setting is out of range or contradicts another. The message says what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary embedding scaling. `kind` is "default", "linear", "llama3" or "yarn"; `params` as in the HF config."""

    kind: str = "default"
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder, as read from a Hugging Face config."""

    architecture: str  # "qwen2", "qwen3" or "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # what the checkpoint was saved in

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache of one worker: `num_blocks` blocks of `block_size` tokens."""

    num_blocks: int
    block_size: int = 16
    enable_prefix_caching: bool = True
    watermark: float = 0.01  # share of the blocks that admission leaves free for those already running

    def __post_init__(self) -> None:
        _require(self.num_blocks >= 1, f"num_blocks must be at least 1, got {self.num_blocks}")
        _require(1 <= self.block_size <= 1024, f"block_size must be from 1 to 1024, got {self.block_size}")
        _require(0 <= self.watermark < 1, f"watermark must be in [0, 1), got {self.watermark}")

    @property
    def watermark_blocks(self) -> int:
        return int(self.watermark * self.num_blocks)


@dataclass(frozen=True)
class SchedulerConfig:
    """How much one step may do."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefill_chunk_size: int | None = None  # longest prefill chunk of one sequence; None: the whole budget
    max_model_len: int = 4096

    def __post_init__(self) -> None:
        _require(self.max_num_seqs >= 1, f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        _require(self.max_num_batched_tokens >= self.max_num_seqs,
                 f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                 f"({self.max_num_seqs}): every running sequence decodes one token a step")
        _require(self.prefill_chunk_size is None or self.prefill_chunk_size >= 1,
                 f"prefill_chunk_size must be at least 1, or None, got {self.prefill_chunk_size}")
        _require(self.max_model_len >= 2, f"max_model_len must be at least 2, got {self.max_model_len}")


@dataclass(frozen=True)
class SLO:
    """What a service promises its users, in seconds: the first token within `ttft`, each after it within `tpot` on average."""

    ttft: float
    tpot: float

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft), ("tpot", self.tpot)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(is_number and 0 < value < math.inf, f"an SLO's {name} is a number of seconds above 0, got {value!r}")


ROLES = {"C": "collocated", "P": "prefill", "D": "decode"}
# And the pipelines each may send a request through, as the roles that one needs. Each mode needs a complete one.
MODES = {"collocated": (("C",),), "disaggregated": (("P", "D"),), "adaptive": (("C",), ("P", "D"))}
EXECUTORS = ("inline", "process", "ray")  # where a cluster's workers run


def check_mode(mode: str, roles: Collection[str], where: str) -> None:
    """Raises ConfigError where `mode` is unknown, or none of its pipelines is complete. `where` begins what is said about
    the roles that there are."""
    _require(mode in MODES, f"unknown mode {mode!r}; modes are {', '.join(MODES)}")
    needed = ", or ".join(" and ".join(sorted(pipeline)) for pipeline in MODES[mode])
    _require(any(set(pipeline) <= set(roles) for pipeline in MODES[mode]),
             f"mode {mode!r} needs workers of role {needed}; {where} {' '.join(sorted(roles)) or 'none'}")


@dataclass(frozen=True)
class Placement:
    """One worker: its role and its device ("cpu" or "cuda:3")."""

    role: str  # "C", "P" or "D"
    device: str


@dataclass(frozen=True)
class Topology:
    """Which workers there are. Written as "C:0 P:1 P:3 D:2" or "P:cpu D:cpu": role, colon, GPU number or cpu."""

    placements: tuple[Placement, ...]

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Raises ConfigError where a part is not ROLE:DEVICE or no part is given."""
        _require(isinstance(text, str), f"a topology is a text such as 'C:0' or 'P:cpu D:cpu', got {text!r}")
        placements = []
        for part in text.split():
            match = re.fullmatch(r"([A-Za-z]+):(cpu|\d+)", part)
            _require(match is not None,
                     f"topology part {part!r} is not ROLE:DEVICE; write for example 'C:0', 'P:0 D:1' or 'P:cpu D:cpu'")
            role, device = match.groups()  # type: ignore[union-attr]
            _require(role in ROLES, f"unknown role {role!r} in {part!r}; roles are "
                     + ", ".join(f"{letter} ({name})" for letter, name in ROLES.items()))
            placements.append(Placement(role, "cpu" if device == "cpu" else f"cuda:{int(device)}"))
        _require(bool(placements), "a topology needs at least one worker, for example 'C:cpu'")
        return cls(tuple(placements))

    @property
    def workers(self) -> dict[str, Placement]:
        """By worker id: a role's letter and a number, "C0", "P0", "P1", "D0", ..."""
        numbers = {role: count() for role in ROLES}
        return {f"{placement.role}{next(numbers[placement.role])}": placement for placement in self.placements}

    @property
    def devices(self) -> list[str]:
        """Each once, in the order they are first named."""
        return list(dict.fromkeys(placement.device for placement in self.placements))

    def check_mode(self, mode: str) -> None:
        """Raises ConfigError where `mode` is unknown or needs a role that is not there."""
        check_mode(mode, {placement.role for placement in self.placements}, f"the topology {self} has")

    def __str__(self) -> str:
        return " ".join(f"{p.role}:{p.device.removeprefix('cuda:')}" for p in self.placements)
