"""The one error of this package, and the base of its dataclasses of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar


class CostModelError(ValueError):
    """Measurements, parameters or a profile can't be used. The message says what was wrong and what is allowed."""


@dataclass(frozen=True)
class Checked:
    """Its numbers are finite and above 0, or at least what AT_LEAST says; its texts are not empty.

    Raises:
        CostModelError: one is not; the message names it.
    """

    AT_LEAST: ClassVar[Mapping[str, float]] = {}

    def __post_init__(self) -> None:
        for each in fields(self):
            value, where = getattr(self, each.name), f"{type(self).__name__}.{each.name}"
            if each.type == "str":
                if not isinstance(value, str) or not value:
                    raise CostModelError(f"{where} must be a text, got {value!r}")
            elif not self._allows(each.name, each.type, value):
                kind = "an integer" if each.type == "int" else "a number"
                bound = f"of at least {self.AT_LEAST[each.name]}" if each.name in self.AT_LEAST else "above 0"
                raise CostModelError(f"{where} must be {kind} {bound}, got {value!r}")

    def _allows(self, name: str, kind: object, value: object) -> bool:
        types = (int,) if kind == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, types) or not math.isfinite(value):
            return False
        return value >= self.AT_LEAST[name] if name in self.AT_LEAST else value > 0
