"""A measured machine in a file: what was measured, when and with what, and the cost model fitted to it.

    profile = Profile.load("profile.json")
    profile.warn_if_foreign(device="NVIDIA H200", model="qwen3-8b", dtype="bfloat16")
    profile.cost.step_seconds(work)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from nanopd.cost_model.analytical import CostModel, Shape
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.fit import Fit, fit
from nanopd.cost_model.measurements import Measurements

SCHEMA = 2


class ForeignProfile(UserWarning):
    """A profile is used for something other than what it was measured on."""


@dataclass(frozen=True)
class Profile:
    """Raises CostModelError where a name is empty or the date is none."""

    device: str  # its name, such as "NVIDIA H200"
    model: str
    dtype: str
    date: str  # ISO 8601
    versions: dict[str, str | None]
    notes: tuple[str, ...]  # where the rows come from, and under which conditions they were measured
    measurements: Measurements
    cost: CostModel
    fits: tuple[Fit, ...]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name in ("device", "model", "dtype"):
            if not getattr(self, name):
                raise CostModelError(f"{name} is empty")
        try:
            datetime.fromisoformat(self.date)
        except ValueError:
            raise CostModelError(f"date {self.date!r} is not as in '2026-01-31T12:00:00+00:00'") from None

    @classmethod
    def of(cls, measurements: Measurements, shape: Shape, *, device: str, model: str, dtype: str, date: str,
           versions: dict[str, str | None], notes: tuple[str, ...] = ()) -> Profile:
        """Fitted to measurements. Raises CostModelError where they don't suffice."""
        cost, fits = fit(measurements, shape)
        return cls(device, model, dtype, date, versions, notes, measurements, cost, fits)

    # ------------------------------------------------------------------------------------------------ files

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Raises CostModelError where there is no such file or it is not a profile; the message says where in it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CostModelError(f"can't read the profile {path}: {error}") from None
        try:
            return cls.from_json(text)
        except CostModelError as error:
            raise CostModelError(f"{path} is not a profile: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Raises CostModelError where the text is not what `to_json` writes."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CostModelError(f"not JSON: {error}") from None
        if isinstance(data, dict) and data.get("schema") != SCHEMA:
            raise CostModelError(f"schema {data.get('schema')!r}, this version reads {SCHEMA}: make the profile again")
        return read(cls, data, "profile")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(self.to_json(), encoding="utf-8")
        os.replace(unfinished, path)

    # ------------------------------------------------------------------------------------------------- use

    def warn_if_foreign(self, *, device: str, model: str, dtype: str) -> list[str]:
        """Warn (ForeignProfile) where it is to be used for something else than it was measured on. Returns in what they
        differ, in words."""
        wanted = {"device": device, "model": model, "dtype": dtype}
        differences = [f"{name} {getattr(self, name)!r}, here it is {value!r}"
                       for name, value in wanted.items() if getattr(self, name) != value]
        if differences:
            warnings.warn(f"the profile was measured on another {'; another '.join(differences)}. Predictions and routing "
                          "will be off: measure this machine with `nanopd profile`", ForeignProfile, stacklevel=2)
        return differences


# ----------------------------------------------------------------------------------------- JSON to dataclasses


def read(kind: Any, data: Any, where: str) -> Any:
    """A value of the type that an annotation names, from what JSON has for it.

    Raises:
        CostModelError: something is missing, unknown or of another type; the message begins with where.
    """
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return None if data is None and type(None) in inner else read(inner[0], data, where)
    if origin is tuple:
        _require(isinstance(data, list), where, "a list", data)
        kinds = [inner[0]] * len(data) if inner[-1] is Ellipsis else inner
        _require(len(kinds) == len(data), where, f"a list of {len(kinds)}", data)
        return tuple(read(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, data)))
    if origin is dict:
        _require(isinstance(data, dict), where, "an object", data)
        return {key: read(inner[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is float:
        is_number = isinstance(data, (int, float)) and not isinstance(data, bool)
        _require(is_number and math.isfinite(data), where, "a number", data)
        return float(data)
    _require(isinstance(data, kind) and not (kind is int and isinstance(data, bool)), where,
             {int: "an integer", str: "a text"}[kind], data)
    return data


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    _require(isinstance(data, dict), where, "an object", data)
    hints = get_type_hints(kind)
    names = [each.name for each in dataclasses.fields(kind)]
    missing, unknown = [name for name in names if name not in data], [name for name in data if name not in names]
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise CostModelError(f"{where} {' and '.join(said)}")
    values = {name: read(hints[name], data[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except CostModelError as error:
        raise CostModelError(f"{where}: {error}") from None


def _require(condition: bool, where: str, wanted: str, data: Any) -> None:
    if not condition:
        shown = repr(data)
        raise CostModelError(f"{where} must be {wanted}, got {shown if len(shown) < 60 else shown[:56] + ' ...'}")
