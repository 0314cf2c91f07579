"""Chapter 01: the paged KV cache's bookkeeping. Which blocks hold whose tokens, and who may write where.

`pool` knows blocks (reference counts, prefix hashes, eviction), `manager` knows sequences (block tables,
copy-on-write, leases). Neither touches a tensor; those live in `nanopd.block_manager.cache`.
"""

from nanopd.block_manager.manager import BlockSpaceManager, Lease
from nanopd.block_manager.pool import (
    Block,
    BlockEvent,
    BlockPool,
    InvariantError,
    NoFreeBlocks,
    PoolCounters,
    Prefix,
    hash_block,
)

__all__ = [
    "Block",
    "BlockEvent",
    "BlockPool",
    "BlockSpaceManager",
    "InvariantError",
    "Lease",
    "NoFreeBlocks",
    "PoolCounters",
    "Prefix",
    "hash_block",
]
