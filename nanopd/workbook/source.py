"""Read a chapter's source and hold it to the rules, which the docstring of `nanopd.workbook` lists."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jupytext

LANGUAGES = ("en", "zh")
MAX_LINES, MAX_EXERCISE_LINES = 12, 25  # of code that the learner sees in a cell
KNOWN_METADATA = {"markdown": {"lang", "en_hash"}, "code": {"nbgrader", "tags"}}
KNOWN_TAGS = {"raises-exception"}  # nbclient's own: this cell is meant to fail
KNOWN_NBGRADER = {"grade_id", "points", "solution", "grade", "locked", "schema_version", "cell_type", "task"}
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")  # nbgrader's own
CELL_MARKER = re.compile(r"^# %%( |$)")


class SourceError(ValueError):
    """Chapters break the rules. The message lists every place."""


@dataclass(frozen=True)
class Cell:
    """A cell of a source. `en_hash` is the English that the Chinese was reviewed against."""

    kind: str  # "code" or "markdown"
    source: str
    metadata: dict[str, Any]
    where: str  # file, line and number, for messages

    @property
    def lang(self) -> str | None:
        return self.metadata.get("lang")

    @property
    def nbgrader(self) -> dict[str, Any]:
        return self.metadata.get("nbgrader", {})

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:8]

    @property
    def first_line(self) -> str:
        return self.source.strip().split("\n")[0][:60]


def read_chapter(path: Path) -> list[Cell]:
    """The cells of a source that keeps the rules. Comments above the first cell are the author's own."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if CELL_MARKER.match(line)]
    if not starts or any(line and not line.startswith("#") for line in lines[: starts[0]]):
        raise SourceError(f"{path}:1: a source starts with a cell (`# %%`), with nothing but comments above it")
    notebook = jupytext.reads("\n".join(lines[starts[0] :]), fmt="py:percent")
    if len(notebook.cells) != len(starts):
        raise SourceError(f"{path}: {len(starts)} lines start with `# %%`, but there are {len(notebook.cells)} cells; "
                          "is one of them inside a string?")
    cells = [Cell(cell.cell_type, cell.source, _authors(cell.metadata), f"{path}:{start + 1}: cell {number}")
             for number, (cell, start) in enumerate(zip(notebook.cells, starts), 1)]
    problems = [*_cell_problems(cells), *_twin_problems(cells), *_grade_id_problems(cells)]
    if problems:
        raise SourceError("\n".join(problems))
    return [_with_nbgrader_defaults(cell) for cell in cells]


def _authors(metadata: dict[str, Any]) -> dict[str, Any]:
    """Without jupytext's notes on the blank lines between cells."""
    return {key: value for key, value in metadata.items() if not key.startswith("lines_to_")}


def _cell_problems(cells: list[Cell]) -> Iterator[str]:
    for cell in cells:
        known = KNOWN_METADATA.get(cell.kind)
        if known is None:
            yield f"{cell.where}: a {cell.kind} cell; chapters have code and markdown"
            continue
        for key in sorted(cell.metadata.keys() - known):
            yield (f"{cell.where}: unknown metadata {key!r} for a {cell.kind} cell; "
                   f"known are {', '.join(sorted(known))}")
        yield from (f"{cell.where}: {problem}" for problem in (
            _markdown_problems(cell) if cell.kind == "markdown" else _code_problems(cell)))


def _markdown_problems(cell: Cell) -> Iterator[str]:
    if cell.lang not in (None, *LANGUAGES):
        yield f"unknown lang {cell.lang!r}; known are {', '.join(LANGUAGES)}, or none for both"
    if "en_hash" in cell.metadata and cell.lang != "zh":
        yield "en_hash belongs on the Chinese cell"
    if not cell.source.strip():
        yield "the cell is empty"


def _code_problems(cell: Cell) -> Iterator[str]:
    for tag in cell.metadata.get("tags", []):
        if tag not in KNOWN_TAGS:
            yield f"unknown tag {tag!r}; known are {', '.join(sorted(KNOWN_TAGS))}"
    yield from _nbgrader_problems(cell.nbgrader)
    try:
        learners = hide_tests(clear_solutions(cell.source))
        ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", learners))  # magics are not Python
    except (SourceError, SyntaxError) as error:
        yield str(error)
        return
    if clear_solutions(cell.source) != cell.source and not cell.nbgrader.get("solution"):
        yield 'a solution marker needs nbgrader={"grade_id": "...", "solution": true} on its cell'
    if cell.nbgrader.get("solution") and clear_solutions(cell.source) == cell.source:
        yield "a solution cell needs ### BEGIN SOLUTION and ### END SOLUTION"
    if hide_tests(cell.source) != cell.source and "points" not in cell.nbgrader:
        yield 'hidden tests need nbgrader={"grade_id": "...", "points": ...} on their cell'
    limit = MAX_EXERCISE_LINES if cell.nbgrader else MAX_LINES
    count = sum(bool(line.strip()) and not line.strip().startswith("#") for line in learners.splitlines())
    if count > limit:
        yield f"{count} lines of code; {limit} is the most for {'an exercise' if cell.nbgrader else 'a code'} cell"


def _nbgrader_problems(given: dict[str, Any]) -> Iterator[str]:
    if not given:
        return
    for key in sorted(given.keys() - KNOWN_NBGRADER):
        yield f"unknown nbgrader metadata {key!r}; known are {', '.join(sorted(KNOWN_NBGRADER))}"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(given.get("grade_id", ""))):
        yield f"an exercise needs a grade_id of letters, digits, - and _, got {given.get('grade_id')!r}"
    if given.get("solution") and ("points" in given or given.get("grade")):
        yield "a solution cell has no points: give them to a check cell after it, which is what nbgrader grades"
    if not given.get("solution") and "points" not in given:
        yield "an nbgrader cell either is a solution (\"solution\": true) or checks one (\"points\": 2)"


def _twin_problems(cells: list[Cell]) -> Iterator[str]:
    for before, cell, after in zip([None, *cells], cells, [*cells[1:], None]):
        if cell.lang == "en" and (after is None or after.lang != "zh"):
            yield f"{cell.where}: English without its Chinese twin right after it: {cell.first_line}"
        if cell.lang == "zh" and (before is None or before.lang != "en"):
            yield f"{cell.where}: Chinese without its English twin right before it: {cell.first_line}"


def _grade_id_problems(cells: list[Cell]) -> Iterator[str]:
    seen: set[str] = set()
    for cell in cells:
        grade_id = cell.nbgrader.get("grade_id")
        if grade_id in seen:
            yield f"{cell.where}: grade_id {grade_id!r} is taken by a cell above"
        seen |= {grade_id} - {None}


def _with_nbgrader_defaults(cell: Cell) -> Cell:
    """Everything nbgrader's schema 3 wants, so that authors write only what differs."""
    if not cell.nbgrader:
        return cell
    grade = not cell.nbgrader.get("solution", False)
    defaults = {"schema_version": 3, "solution": not grade, "grade": grade, "locked": grade, "task": False,
                "cell_type": "code"}
    return replace(cell, metadata={**cell.metadata, "nbgrader": {**defaults, **cell.nbgrader}})


def clear_solutions(source: str) -> str:
    """Each solution region replaced by the stub, at the indentation of its marker."""
    return _replace_regions(source, "SOLUTION", STUB)


def hide_tests(source: str) -> str:
    return _replace_regions(source, "HIDDEN TESTS", ()).rstrip()


def _replace_regions(source: str, name: str, stub: tuple[str, ...]) -> str:
    lines, inside = [], False
    for line in source.split("\n"):
        if f"BEGIN {name}" in line or f"END {name}" in line:
            begins = f"BEGIN {name}" in line
            if begins == inside:
                raise SourceError(f"### {'BEGIN' if begins else 'END'} {name} where a region is "
                                  f"{'already' if begins else 'not'} open")
            inside = begins
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + part for part in stub] if begins else []
        elif not inside:
            lines.append(line)
    if inside:
        raise SourceError(f"### BEGIN {name} without its END")
    return "\n".join(lines)
