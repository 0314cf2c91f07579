"""A Ray cluster of two nodes, both on this machine."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from workers.processes import children

ADDRESSES = ("127.0.0.2", "127.0.0.3")  # Ray knows better than to take 127.0.0.1 for a machine's
DIED = "its Ray actor died"
# Ray's processes check JSON schemas, and where there is a package with the grammar of IRIs they all take seconds to build it.
NO_GRAMMAR = {"rfc3987_syntax.py": 'raise ImportError("not needed here")\n'}


@contextmanager
def environment() -> Iterator[None]:
    """What Ray's processes are to find in theirs. They find modules where this process does."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets are in there, and their names may not be long
    for name, text in NO_GRAMMAR.items():
        (folder / name).write_text(text)
    settings = {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
                "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0",
                "RAY_prestart_worker_first_driver": "0", "RAY_raylet_start_wait_time_s": "120",
                "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def two_nodes(num_cpus: int) -> Iterator[str]:
    """Each with so many CPUs. Gives the address to join them at."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for address in ADDRESSES:
            cluster.add_node(num_cpus=num_cpus, num_gpus=0, node_ip_address=address, object_store_memory=80 * 2**20)
        yield cluster.address
    finally:
        cluster.shutdown()


def descendants(pid: int | None = None) -> set[int]:
    """Process ids of the children, and of theirs."""
    mine = children(pid or os.getpid())
    return set(mine).union(*map(descendants, mine))
