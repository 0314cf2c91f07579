"""What a benchmark found, as a JSON file for each GPU and benchmark. No torch: figures and notebooks read them too.

    report = load("decode")
    report.rows[0]["ms"], report.ceilings["read_gb_s"], report.source
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """One run of one benchmark. `rows` are its figures, `summary` what follows from them.

    Units are in the keys: `_us`, `_ms`, `_s` for times, `_gb_s` for 1e9 bytes a second, `_tflop_s` for 1e12
    operations a second; a `share` is of the ceiling, 1 at best.
    """

    bench: str
    date: str  # ISO 8601, UTC
    command: str
    commit: str | None  # None where it was not run from a checkout
    dirty: bool | None  # whether the checkout differed from the commit
    device: dict[str, Any]
    versions: dict[str, str | None]
    ceilings: dict[str, float]  # measured in the same run
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # the conditions
    schema: int = SCHEMA

    @property
    def slug(self) -> str:
        """The folder that holds what was recorded on this device."""
        return slug(self.device["name"])

    @property
    def source(self) -> str:
        """Where the figures come from, in a line, to stand beside them."""
        return source(self.device, self.date, self.commit, self.dirty)

    def save(self, folder: Path = RECORDED) -> Path:
        """Write FOLDER/<device>/<bench>.json."""
        path = folder / self.slug / f"{self.bench}.json"
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def source(device: dict[str, Any], date: str, commit: str | None, dirty: bool | None) -> str:
    """Where figures come from, in a line."""
    made_by = f"commit {commit[:7]}{' with changes' if dirty else ''}" if commit else "no commit"
    return f"{device['name']}, {date[:10]}, {made_by}"


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def rounded(value: Any) -> Any:
    """Five digits are more than any of these measurements holds."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def slug(name: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(bench: str, gpu: str | None = None, folder: Path = RECORDED) -> Report:
    """What `bench` found on `gpu`, a name or a part of one. Default: the latest, of GPUs rather than of a CPU.

    Raises FileNotFoundError where nothing fits; the message says what there is.
    """
    found = [path for path in sorted(folder.glob(f"*/{bench}.json")) if gpu is None or slug(gpu) in path.parent.name]
    if not found:
        there = ", ".join(sorted(f"{path.stem} on {path.parent.name}" for path in folder.glob("*/*.json"))) or "nothing"
        raise FileNotFoundError(f"no recorded result of {bench!r}{f' on {gpu!r}' if gpu else ''}; recorded: {there}")
    reports = [_read(path) for path in found]
    return max(reports, key=lambda report: (report.device["kind"] != "cpu", report.date))


def _read(path: Path) -> Report:
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {data.get('schema')}, this version reads {SCHEMA}: run the benchmark again")
    return Report(**data)
