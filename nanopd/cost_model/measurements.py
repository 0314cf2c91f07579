"""What is measured on a device, a dataclass for each kind of row. Times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from nanopd.cost_model.checks import Checked


@dataclass(frozen=True)
class Measurement(Checked):
    AT_LEAST: ClassVar[Mapping[str, float]] = {"cached_tokens": 0}

    seconds: float


@dataclass(frozen=True)
class PrefillRow(Measurement):
    """A step that computes a part of one prompt and nothing else."""

    new_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class DecodeRow(Measurement):
    """A step of decodes alone."""

    decodes: int
    context_tokens: float  # of all sequences together, the new tokens included


@dataclass(frozen=True)
class MixedRow(Measurement):
    """A step with a part of one prompt and decodes."""

    new_tokens: int
    cached_tokens: int
    decodes: int
    context_tokens: float  # of the decodes together, the new tokens included


@dataclass(frozen=True)
class TransferRow(Measurement):
    """A send, from its start until the last byte is there."""

    source: str  # device, such as "cuda:0"
    destination: str
    transport: str
    num_bytes: float


@dataclass(frozen=True)
class MessageRow(Measurement):
    """From a request's submission until its worker, which had nothing to do, began a step."""


@dataclass(frozen=True)
class Measurements:
    """All that was measured of a model on a machine."""

    prefill: tuple[PrefillRow, ...] = ()
    decode: tuple[DecodeRow, ...] = ()
    mixed: tuple[MixedRow, ...] = ()
    transfer: tuple[TransferRow, ...] = ()
    messages: tuple[MessageRow, ...] = ()
