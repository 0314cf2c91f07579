"""What requests of a schedule say: random tokens, the same ones where a recorded workload says that prompts begin alike."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from nanopd.simulator.workload import PIECE, Arrival

OF_PREFIXES, OF_REQUESTS = 0, 1  # so that no request draws the tokens of a piece


def prompts(arrivals: Sequence[Arrival], vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    """The tokens of each prompt, int32 below `vocab_size`. Prompts whose `prefix` begins with the same names begin with the
    same tokens, PIECE for each name; the rest is each one's own.

    Other arrivals have other prompts, so that a cluster which has served some finds nothing of them in its prefix caches.
    """
    of_load = seed, zlib.crc32(repr([(one.time, one.prompt_len, one.output_len) for one in arrivals]).encode())
    pieces: dict[int, np.ndarray] = {}
    return [_prompt(one, number, vocab_size, of_load, pieces) for number, one in enumerate(arrivals)]


def _prompt(one: Arrival, number: int, vocab_size: int, of_load: tuple[int, ...], pieces: dict[int, np.ndarray]) -> np.ndarray:
    names = one.prefix[: -(-one.prompt_len // PIECE)]
    for name in names:
        if name not in pieces:
            pieces[name] = _draw(PIECE, vocab_size, (*of_load, OF_PREFIXES, name))
    shared = [pieces[name] for name in names]
    rest = max(0, one.prompt_len - PIECE * len(names))
    return np.concatenate([*shared, _draw(rest, vocab_size, (*of_load, OF_REQUESTS, number))])[: one.prompt_len]


def _draw(length: int, vocab_size: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=length, dtype=np.int32)
