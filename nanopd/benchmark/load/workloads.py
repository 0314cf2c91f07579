"""Workloads by their names: how long prompts and answers are."""

from __future__ import annotations

from nanopd.benchmark.load.recorded import SOURCES, LengthTable
from nanopd.config import ConfigError
from nanopd.simulator.workload import PROMPTS, Lengths, lengths

OUTPUTS = "128"  # tokens of the answers to "short", "long" and "mixed"
RECORDED = tuple(SOURCES)  # of which the longest requests are cut to what a server takes
NAMES = (*PROMPTS, *RECORDED)


def workload(name: str) -> Lengths:
    """Draws (prompt_len, output_len). `name` is "short" (64-256), "long" (1024-2048) or "mixed", with answers of 128 tokens;
    "azure-code" or "mooncake", as long as the requests of these published traces; or PROMPTS/OUTPUTS such as "64-256/128" or
    "mixed/16-64", each a number of tokens or a span.

    Raises ConfigError where it is none of these.
    """
    if name in RECORDED:
        return LengthTable.load(name)
    if name in PROMPTS:
        return lengths(name, OUTPUTS)
    prompts, slash, outputs = name.partition("/")
    if not slash:
        raise ConfigError(f"unknown workload {name!r}; there are {', '.join(NAMES)}, or PROMPTS/OUTPUTS in tokens such as 64-256/128")
    return lengths(prompts, outputs)
