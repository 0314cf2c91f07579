"""A live run as a file, small enough for the package, and what was to be seen of it at any moment. No torch, no widgets.

    recording = Recording.load(path)
    recording.picture(12.5).requests[-1].mode, recording.load_at(12.5).rate, recording.source
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanopd.benchmark.results import RECORDED, slug, source, write_whole
from nanopd.widgets.live_load import Load, LoadDriver, Picture, Sample, Seen

SCHEMA = 1
FOLDER = "live"  # below a device's results
DIGITS = 5  # of a second: ten microseconds


@dataclass(frozen=True)
class Recording:
    """A run of a `LoadDriver` that is over. Columns: `loads` by "since", `requests` by the fields of `Seen` in the order of their
    arrival, `samples` by those of `Sample`. Times in seconds since the start."""

    model: str
    topology: str
    seconds: float
    loads: dict[str, list[Any]]
    requests: dict[str, list[Any]]
    samples: dict[str, list[Any]]
    turned_away: list[float]
    device: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None  # None where it was not run from a checkout
    dirty: bool | None  # whether the checkout differed from the commit
    date: str  # ISO 8601, UTC
    command: str  # that was typed
    schema: int = SCHEMA

    @classmethod
    def of(cls, driver: LoadDriver, **provenance: Any) -> Recording:
        """`provenance`: the fields from `device` to `command`. The driver has to keep all that it sees, and to have stopped."""
        picture, course, cluster = driver.picture(), driver.course(), driver.cluster
        loads = _columns(["since", *_names(Load)], [(since, *astuple(load)) for since, load in course.loads])
        requests = _columns(_names(Seen), sorted(map(astuple, picture.requests), key=lambda row: row[_names(Seen).index("arrival")]))
        samples = _columns(_names(Sample), map(astuple, picture.samples))
        return cls(cluster.model, str(cluster.topology), _short(picture.elapsed), loads, requests, samples,
                   _short(course.turned_away), **provenance)

    # The file

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), allow_nan=False, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Raises ValueError where the file is of another version, or no recording."""
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or "samples" not in data:
            raise ValueError(f"{path} is no recording of a live run with schema {SCHEMA}: make it again, by `nanopd bench record`")
        return cls(**data)

    # What there is to see

    @property
    def source(self) -> str:
        """Where it comes from, in a line, to stand beside it."""
        return source(self.device, self.date, self.commit, self.dirty)

    @property
    def modes(self) -> list[str]:
        """Each that was asked for, once."""
        return list(dict.fromkeys(self.loads["mode"]))

    def load_at(self, now: float) -> Load:
        """What came then."""
        *earlier, first = reversed(_rows(self.loads))
        since = next((row for row in earlier if row["since"] <= now), first)
        return Load(**{name: since[name] for name in _names(Load)})

    def picture(self, now: float) -> Picture:
        """All that was to be seen `now` seconds after the start."""
        now = min(now, self.seconds)
        requests = [_as_of(Seen(**row), now) for row in _rows(self.requests) if row["arrival"] <= now]
        num_finished = sum(seen.finish is not None for seen in requests)
        samples = [sample for row in _rows(self.samples) if (sample := Sample(**row)).time <= now]
        return Picture(now, requests, samples, len(requests) - num_finished, num_finished, bisect_right(self.turned_away, now))


def _as_of(seen: Seen, now: float) -> Seen:
    """Of what came later, nothing."""
    if seen.sent is None or seen.sent > now:
        return Seen(seen.request_id, seen.prompt_len, seen.arrival)
    if seen.finish is None or seen.finish > now:
        has_begun = seen.first_token is not None and seen.first_token <= now
        return replace(seen, path="", first_token=seen.first_token if has_begun else None, finish=None, num_tokens=0, error=None)
    return seen


def _names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]


def _columns(names: Sequence[str], rows: Any) -> dict[str, list[Any]]:
    table = [_short(list(row)) for row in rows]
    return {name: [row[place] for row in table] for place, name in enumerate(names)}


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list | tuple) else value


def recordings(device: str | None = None, folder: Path = RECORDED) -> list[Recording]:
    """Those in FOLDER/<device>/live, GPUs before CPUs, of a device or a part of its name; none where nothing fits."""
    found = [Recording.load(path) for path in sorted(folder.glob(f"*/{FOLDER}/*.json"))
             if device is None or slug(device) in path.parents[1].name]
    return sorted(found, key=lambda recording: recording.device["kind"] == "cpu")
