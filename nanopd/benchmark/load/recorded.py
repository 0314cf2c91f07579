"""How long the prompts and answers of published traces are, as a small table that stands in for the trace.

Requests are sorted by their prompts into strata of equal number. Of each, prompts and answers are kept as means of groups from
the shortest to the longest. So means stay, and so does what long prompts have to do with short answers; within a stratum the
two are drawn independently, and no length is longer than the mean of its stratum's longest 2%.

    python -m nanopd.benchmark.load.recorded azure-code azure_llm_code_2023.csv        writes the table of a trace
"""

from __future__ import annotations

import json
import sys
from bisect import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np

from nanopd.benchmark.results import write_whole
from nanopd.simulator.traces import read_trace

TABLES = Path(__file__).parent / "lengths"
SOURCES = {
    "azure-code": "Azure LLM inference trace 2023, code (Patel et al., Splitwise, ISCA 2024), CC-BY 4.0",
    "mooncake": "Mooncake, synthetic trace of the FAST'25 release, Apache-2.0",
}
STRATA = 20
EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)  # of the groups, as shares of a stratum


@dataclass(frozen=True)
class LengthTable:
    """Tokens: the mean of each group of each stratum, [strata][groups]."""

    source: str
    num_requests: int
    prompts: list[list[int]]
    outputs: list[list[int]]

    @classmethod
    def of(cls, source: str, lengths: Sequence[tuple[int, int]]) -> LengthTable:
        """`lengths`: prompt_len and output_len of each request, a thousand of them at least."""
        strata = np.array_split(np.array(sorted(lengths, key=lambda pair: pair[0])), STRATA)
        prompts, outputs = ([_means(np.sort(stratum[:, column])) for stratum in strata] for column in (0, 1))
        return cls(source, len(lengths), prompts, outputs)

    @classmethod
    def load(cls, name: str) -> LengthTable:
        return cls(**json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8")))

    def save(self, name: str) -> None:
        write_whole(TABLES / f"{name}.json", json.dumps(asdict(self)) + "\n")

    def __call__(self, random: Random) -> tuple[int, int]:
        """Draws (prompt_len, output_len)."""
        stratum = random.randrange(len(self.prompts))
        return self.prompts[stratum][_group(random)], self.outputs[stratum][_group(random)]


def _means(values: np.ndarray) -> list[int]:
    ends = [round(edge * len(values)) for edge in EDGES]
    return [round(group.mean()) for group in np.split(values, ends[1:-1])]


def _group(random: Random) -> int:
    return bisect(EDGES, random.random()) - 1


if __name__ == "__main__":
    name, path = sys.argv[1:]
    LengthTable.of(SOURCES[name], [(one.prompt_len, one.output_len) for one in read_trace(path)]).save(name)
