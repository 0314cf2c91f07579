"""A checksum of a prompt's KV, to see that what arrived is what was sent."""

from __future__ import annotations

import torch

from nanopd.block_manager.cache import KVCache

PRIME = 1_000_003


def checksum(cache: KVCache, block_ids: list[int], num_tokens: int) -> int:
    """Of the keys and values of the first `num_tokens` tokens in these blocks, all layers. Counts bits, and where they lie.

    The same on every device; a flipped bit, a block left out and two that changed places all show.
    """
    index = torch.tensor(block_ids, dtype=torch.int64, device=cache.data.device)
    words = {2: torch.int16, 4: torch.int32}[cache.data.element_size()]
    total = 0
    for layer in range(cache.num_layers):  # one at a time: all would need as much memory again as the prompt has
        tokens = cache.data[layer].index_select(1, index).flatten(1, 2)[:, :num_tokens].contiguous()
        values = tokens.view(words).flatten().long()
        places = torch.arange(1, len(values) + 1, device=values.device)
        total = total * PRIME + int((values * (2 * places + 1)).sum())  # the sum wraps, and an odd factor loses no bit
    return total % 2**64
