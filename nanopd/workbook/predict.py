"""`nanopd.predict`: write a number down before measuring it, then see both side by side."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

from nanopd.widgets.strings import t

CLOSE = 0.10  # relative error up to which a guess counts as close


class Comparison(dict[str, dict[str, Any]]):
    """name -> {"guess", "measured", "ratio"}; ratio is guess / measured, or None where there is none."""

    def _ipython_display_(self) -> None:
        """Nothing: `reveal` has printed the comparison already."""


class Prediction:
    """Guesses committed by name. Make it with `predict`."""

    def __init__(self, section: str, guesses: dict[str, Any]) -> None:
        self.section = section
        self.guesses = guesses

    def __repr__(self) -> str:
        return f"Prediction({self.section!r}, {', '.join(f'{n}={_show(g)}' for n, g in self.guesses.items())})"

    @property
    def missing(self) -> list[str]:
        """The names still left as `...`."""
        return [name for name, guess in self.guesses.items() if guess is ...]

    def reveal(self, *values: Any, **named: Any) -> Comparison:
        """Print each guess beside what was measured. Values in the order of the guesses, or by name."""
        measured = self._by_name(values, named)
        comparison = Comparison({name: _compare(guess, measured[name]) for name, guess in self.guesses.items()})
        rows = [("", t("predict.guess"), t("predict.measured"), "")]
        rows += [(name, _show(row["guess"]), _show(row["measured"]), _verdict(**row))
                 for name, row in comparison.items()]
        print(t("predict.title", id=self.section))
        print(_table(rows))
        guessed = [row for row in comparison.values() if row["guess"] is not ...]
        if guessed:
            print(t("predict.all_close" if all(map(_is_close, guessed)) else "predict.some_off"))
        return comparison

    def _by_name(self, values: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        measured = dict(zip(self.guesses, values)) | named
        if len(values) + len(named) != len(self.guesses) or measured.keys() != self.guesses.keys():
            raise TypeError(
                f"prediction {self.section} needs one measured value for each of {', '.join(self.guesses)}; "
                f"got {len(values)} by position and {', '.join(named) or 'none'} by name")
        return measured


def predict(section: str, **guesses: Any) -> Prediction:
    """Commit a guess before measuring: `guess = predict("01.4", blocks=63)`, later `guess.reveal(blocks=used)`.

    A guess left as `...` is allowed: it earns a nudge, and the notebook runs on.
    """
    if not guesses:
        raise TypeError('a prediction needs at least one named guess, for example predict("01.4", blocks=63)')
    prediction = Prediction(section, guesses)
    missing = prediction.missing
    names = t("predict.list_separator").join(missing)
    print(t("predict.nudge", id=section, names=names) if missing else t("predict.noted", id=section))
    return prediction


def _compare(guess: Any, measured: Any) -> dict[str, Any]:
    ratio = guess / measured if _is_number(guess) and _is_number(measured) and measured != 0 else None
    return {"guess": guess, "measured": measured, "ratio": ratio}


def _is_close(row: dict[str, Any]) -> bool:
    return row["guess"] == row["measured"] or (row["ratio"] is not None and abs(row["ratio"] - 1) <= CLOSE)


def _verdict(guess: Any, measured: Any, ratio: float | None) -> str:
    if guess is ...:
        return t("predict.no_guess")
    if guess == measured:
        return t("predict.exact")
    if not (_is_number(guess) and _is_number(measured)):
        return t("predict.different")
    if ratio is None or ratio <= 0:  # nothing measured, or opposite signs: a ratio would say nothing
        return t("predict.off_by", difference=_show(abs(guess - measured)))
    if abs(ratio - 1) <= CLOSE:
        return t("predict.close", percent=max(1, math.ceil(round(abs(ratio - 1) * 100, 6))))  # 5.000000001 is 5
    if ratio >= 2:
        return t("predict.times_above", ratio=f"{ratio:.3g}")
    if ratio <= 0.5:
        return t("predict.times_below", ratio=f"{1 / ratio:.3g}")
    return t("predict.above" if ratio > 1 else "predict.below", percent=f"{abs(ratio - 1) * 100:.0f}")


def _is_number(value: Any) -> bool:
    """Python's numbers and also numpy's and torch's scalars, which only promise to become a float."""
    return hasattr(value, "__float__") and not isinstance(value, bool)


def _show(value: Any) -> str:
    if value is ...:
        return "..."
    if isinstance(value, bool) or not _is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{float(value):,.4g}"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Columns padded to their widest entry: names and verdicts to the left, numbers to the right."""
    widths = [max(columns(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, guess, measured, verdict in rows:
        padding = [" " * (width - columns(text)) for width, text in zip(widths, (name, guess, measured))]
        lines.append(f"  {name}{padding[0]}  {padding[1]}{guess}  {padding[2]}{measured}   {verdict}".rstrip())
    return "\n".join(lines)


def columns(text: str) -> int:
    """Columns on screen: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
