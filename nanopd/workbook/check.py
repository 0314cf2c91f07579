"""`nanopd.check`: run an exercise's checks on what the learner wrote, and answer with what failed and a hint.

The checks live in `nanopd/workbook/checks/chNN.py`, each a function that takes the learner's object and asserts:

    @exercise("01.4", hint_en="Who else reads the last block?", hint_zh="最后一块还有谁在读？")
    def check_shared_block_is_copied(theirs):
        assert ..., say("the block was written while shared", "块还在共享就被写了")

One exercise may have several; they run in the order written, each in turn, and never stop one another.
"""

from __future__ import annotations

import html
import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from nanopd.widgets.strings import pick, t

say = pick  # what a check's assertion says, in the reader's language

CheckFunction = Callable[[Any], None]


class UnknownExercise(LookupError):
    """No checks are registered under this id."""


class CheckFailed(AssertionError):
    """Raised for a failed check only where nobody reads the answer: see `_is_strict`."""


@dataclass(frozen=True)
class Check:
    run: CheckFunction
    hint_en: str
    hint_zh: str


@dataclass(frozen=True)
class Failure:
    check: str  # the check function's name
    message: str
    hint: str


@dataclass(frozen=True)
class CheckResult:
    """What `check` answers. True where everything passed."""

    exercise: str
    count: int
    failures: list[Failure] = field(default_factory=list)
    unfinished: bool = False

    @property
    def passed(self) -> bool:
        return not self.failures and not self.unfinished

    @property
    def hint(self) -> str:
        """The first failure's hint: later failures often follow from it."""
        return self.failures[0].hint if self.failures else ""

    @property
    def headline(self) -> str:
        if self.unfinished:
            return t("check.unfinished", id=self.exercise)
        if self.failures:
            return t("check.failed", id=self.exercise, failed=len(self.failures), count=self.count)
        return t("check.passed", id=self.exercise, count=self.count)

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        lines = [f"{self._mark} {self.headline}"]
        lines += [f"  {names}: " + message.replace("\n", "\n    ") for message, names in self._by_message().items()]
        if self.hint:
            lines.append("  " + t("check.hint", hint=self.hint))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        colour = "#2e7d32" if self.passed else "#b26a00"  # green; amber rather than red: it is an exercise
        items = "".join(f"<li><pre style='margin:.2em 0;white-space:pre-wrap'>{html.escape(message)}</pre>"
                        f"<code style='opacity:.6'>{html.escape(names)}</code></li>" for message, names in self._by_message().items())
        hint = f"<div>{_marked_up(t('check.hint', hint=self.hint))}</div>" if self.hint else ""
        body = (f"<ul style='margin:.3em 0'>{items}</ul>" if items else "") + hint
        return (f"<div class='nanopd-check' style='border-left:4px solid {colour};padding:.3em .8em'>"
                f"<b style='color:{colour}'>{self._mark}</b> {_marked_up(self.headline)}{body}</div>")

    @property
    def _mark(self) -> str:
        return "✓" if self.passed else "○" if self.unfinished else "✗"

    def _by_message(self) -> dict[str, str]:
        """What failed -> the checks that say so: one mistake often trips several in the same way."""
        names: dict[str, list[str]] = {}
        for failure in self.failures:
            names.setdefault(failure.message, []).append(failure.check)
        return {message: ", ".join(checks) for message, checks in names.items()}


def _marked_up(text: str) -> str:
    """As HTML, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


_registry: dict[str, dict[str, Check]] = {}  # exercise id -> check function's name -> check


def exercise(id: str, *, hint_en: str, hint_zh: str) -> Callable[[CheckFunction], CheckFunction]:
    """Register the decorated function as a check of exercise `id` ("01.4")."""

    def register(function: CheckFunction) -> CheckFunction:
        _registry.setdefault(id, {})[function.__name__] = Check(function, hint_en, hint_zh)
        return function

    return register


def check(id: str, theirs: Any) -> CheckResult:
    """Run the checks of exercise `id` on `theirs`. What the learner's code raises is reported, never raised."""
    checks = _checks_of(id)
    failures = []
    unfinished = theirs is None or theirs is ...
    for name, one in checks.items() if not unfinished else ():
        try:
            one.run(theirs)
        except NotImplementedError:
            unfinished = True
            break
        except Exception as error:  # whatever the learner's code does is an answer to give, not a crash
            failures.append(Failure(name, _what_failed(error, one.run), pick(one.hint_en, one.hint_zh)))
    result = CheckResult(id, len(checks), [] if unfinished else failures, unfinished)
    if not result and _is_strict():
        raise CheckFailed(repr(result))
    return result


def _is_strict() -> bool:
    """In CI, and while nbgrader grades or validates: it takes a cell that raises nothing as solved."""
    return os.environ.get("NANOPD_STRICT_CHECKS") == "1" or os.environ.get("NBGRADER_EXECUTION") in ("autograde", "validate")


def _checks_of(id: str) -> dict[str, Check]:
    """The checks of `id`, their chapter's module loaded on first use."""
    chapters = sorted(path.stem[2:] for path in (Path(__file__).parent / "checks").glob("ch[0-9][0-9].py"))
    written = re.fullmatch(r"(\d\d)\.\w+", id)
    if not written or written[1] not in chapters:
        raise UnknownExercise(t("check.unknown_chapter", id=id, known=", ".join(chapters)))
    import_module(f"nanopd.workbook.checks.ch{written[1]}")
    if id not in _registry:
        known = sorted(other for other in _registry if other.startswith(f"{written[1]}."))
        raise UnknownExercise(t("check.unknown", id=id, chapter=written[1], known=", ".join(known)))
    return _registry[id]


def _what_failed(error: Exception, run: CheckFunction) -> str:
    """The check's own words where it asserted; the learner's last lines where their code raised."""
    frames = traceback.extract_tb(error.__traceback__)
    checks = str(Path(__file__).parent / "checks")  # which may call one another
    if isinstance(error, AssertionError) and frames[-1].filename.startswith((checks, run.__code__.co_filename)):
        return str(error) or frames[-1].line or "assert"
    message = (str(error).splitlines() or [""])[0]
    text = t("check.raised", error=f"{type(error).__name__}: {message}" if message else type(error).__name__)
    checks = str(Path(__file__).parent)
    learners = [frame for frame in frames if not frame.filename.startswith(checks)][-3:]
    return "\n".join([text, *(f"  {frame.name}, line {frame.lineno}: {frame.line}" for frame in learners)])
