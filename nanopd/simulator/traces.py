"""Recorded request traces, in the two formats that are published, as workloads.

    Azure:     TIMESTAMP,ContextTokens,GeneratedTokens                       a line for each request, under this header
    Mooncake:  {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}      JSON, one in each line

    workload = read_trace("azure.csv").sped_up(2.0).first(1000).cut_to(8192)
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from nanopd.config import ConfigError
from nanopd.simulator.workload import Arrival

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")  # "hash_ids", of PIECE tokens each, may be missing
FORMATS = f"known are Azure's CSV ({','.join(AZURE)}) and Mooncake's JSON lines ({', '.join(MOONCAKE)}, hash_ids)"
TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?")

Line = tuple[int, str]  # its number in the file, from 1


class TraceError(ConfigError):
    """A trace can't be read. The message says in which line, and what should be there."""


@dataclass(frozen=True)
class Trace:
    """A workload from a file: times in seconds from its first request on. `num_cut` of the requests are shorter than they
    were."""

    name: str
    arrivals: list[Arrival]
    num_cut: int = 0

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self.arrivals)

    def __len__(self) -> int:
        return len(self.arrivals)

    def sped_up(self, factor: float) -> Trace:
        """All comes `factor` times as fast. Raises ConfigError for one that is not above 0."""
        if not (factor > 0 and math.isfinite(factor)):
            raise ConfigError(f"a trace is sped up by a factor above 0, got {factor!r}")
        return self._of([replace(one, time=one.time / factor) for one in self.arrivals])

    def window(self, begin: float, end: float = math.inf) -> Trace:
        """What comes from `begin` on and before `end`; times are then from `begin` on. Raises TraceError where that is nothing."""
        return self._of([replace(one, time=one.time - begin) for one in self.arrivals if begin <= one.time < end],
                        f"has no request from {begin} to {end} s; it goes from 0 to {self.arrivals[-1].time:g} s")

    def first(self, num_requests: int) -> Trace:
        """Raises ConfigError for a number below 1."""
        if num_requests < 1:
            raise ConfigError(f"at least 1 request of a trace is to be taken, got {num_requests!r}")
        return self._of(self.arrivals[:num_requests])

    def cut_to(self, max_len: int) -> Trace:
        """So that prompt and answer have at most `max_len` tokens together: the answer gives way down to half of them, then
        the prompt, at its end. Raises ConfigError for less than 2."""
        if max_len < 2:
            raise ConfigError(f"a request has at least 2 tokens, so it can't be cut to {max_len!r}")
        cut = [_cut(one, max_len) for one in self.arrivals]
        return replace(self, arrivals=cut, num_cut=self.num_cut + sum(new is not old for new, old in zip(cut, self.arrivals)))

    def _of(self, arrivals: list[Arrival], or_else: str = "is empty") -> Trace:
        if not arrivals:
            raise TraceError(f"the trace {self.name} {or_else}")
        return replace(self, arrivals=arrivals)


def _cut(one: Arrival, max_len: int) -> Arrival:
    if one.prompt_len + one.output_len <= max_len:
        return one
    output_len = min(one.output_len, max(max_len - one.prompt_len, max_len // 2))
    return replace(one, prompt_len=min(one.prompt_len, max_len - output_len), output_len=output_len)


# ---------------------------------------------------------------------------------------------- reading


def read_trace(path: str | Path) -> Trace:
    """Raises TraceError where the file can't be read, is of another format, empty, not sorted by time or malformed; the
    message says in which line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"can't read the trace {path}: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise TraceError(f"the trace {path} is empty; {FORMATS}")
    read = _format(path, lines[0])
    found = []
    for number, line in lines if read is _mooncake else lines[1:]:
        try:
            found.append((number, read(line)))
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {error}") from None
    if not found:
        raise TraceError(f"the trace {path} has a header and no request")
    return Trace(path.name, _from_the_first(path, found))


def _format(path: Path, first: Line) -> Callable[[str], Arrival]:
    _, line = first
    if line.lstrip().startswith("{"):
        return _mooncake
    columns = [column.strip() for column in next(csv.reader([line]))]
    if set(AZURE) <= set(columns):
        return _Azure(columns)
    raise TraceError(f"{path} is no trace of a known format, it begins {line[:60]!r}; {FORMATS}")


def _from_the_first(path: Path, found: list[tuple[int, Arrival]]) -> list[Arrival]:
    begin = before = found[0][1].time
    for number, one in found:
        if one.time < before:
            raise TraceError(f"{path}, line {number}: it comes {before - one.time:g} s before the request above it; sort the "
                             "trace by time")
        before = one.time
    return [replace(one, time=round(one.time - begin, 6)) for _, one in found]


class _Azure:
    """Reads a line of a CSV with these columns."""

    def __init__(self, columns: list[str]) -> None:
        self._places = [columns.index(column) for column in AZURE]
        self._num_columns = len(columns)

    def __call__(self, line: str) -> Arrival:
        values = next(csv.reader([line]))
        if len(values) != self._num_columns:
            raise ValueError(f"{len(values)} columns, the header has {self._num_columns}: {line[:60]!r}")
        timestamp, prompt_len, output_len = (values[place].strip() for place in self._places)
        return Arrival(_seconds(timestamp), _count("ContextTokens", prompt_len), _count("GeneratedTokens", output_len))


def _seconds(timestamp: str) -> float:
    """Since 2000, right to a microsecond."""
    match = TIMESTAMP.fullmatch(timestamp)
    if match is None:
        raise ValueError(f"TIMESTAMP is such as 2023-11-16 18:17:03.9799600, got {timestamp!r}")
    day, clock, fraction, zone = match.groups()
    zone = "+00:00" if zone in (None, "Z") else zone
    since = datetime.fromisoformat(f"{day} {clock}{zone}") - datetime.fromisoformat("2000-01-01 00:00:00+00:00")
    return since.total_seconds() + float(f"0{fraction}" if fraction else 0)


def _count(name: str, value: object) -> int:
    """Of tokens, as a number or its digits."""
    if isinstance(value, str) and re.fullmatch(r"\d+", value):
        value = int(value)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is a number of tokens of at least 1, got {value!r}")
    return value


def _mooncake(line: str) -> Arrival:
    try:
        data = json.loads(line)
    except ValueError:
        raise ValueError(f"not JSON: {line[:60]!r}") from None
    missing = [name for name in MOONCAKE if not isinstance(data, dict) or name not in data]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}: {line[:60]!r}")
    milliseconds, names = data["timestamp"], data.get("hash_ids", [])
    if type(milliseconds) not in (int, float) or not math.isfinite(milliseconds):
        raise ValueError(f"timestamp is a number of milliseconds, got {milliseconds!r}")
    if not isinstance(names, list) or any(type(name) is not int or name < 0 for name in names):
        raise ValueError("hash_ids is a list of integers of at least 0")
    return Arrival(milliseconds / 1e3, _count("input_length", data["input_length"]),
                   _count("output_length", data["output_length"]), prefix=tuple(names))
