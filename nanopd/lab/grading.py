"""Have nbgrader grade what was handed in, and write the marks as a table.

This runs students' code with the rights of whoever calls it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanopd.lab import LabError, nbgrader
from nanopd.lab.course import released
from nanopd.lab.submissions import Submission, submissions

Row = dict[str, Any]  # of the table of marks: column -> value


def find_assignment(course: Path, name: str) -> str:
    """The one assignment called so, in full or by the start of its name ("01"). Raises LabError with those there are."""
    known = released(course)
    found = [name] if name in known else [each for each in known if each.startswith(f"{name}_")]
    if len(found) != 1:
        raise LabError(f"{'several assignments are' if found else 'no assignment is'} called {name}; "
                       f"there are {', '.join(found or known)}")
    return found[0]


def handed_in(course: Path) -> list[str]:
    """The assignments of which there is at least one submission. Raises LabError where there is none at all."""
    known = released(course)
    found = [name for name in known if any((course / "submitted").glob(f"*/{name}"))]
    if not found:
        raise LabError(f"nothing has been handed in: put each notebook into {course / 'submitted' / 'STUDENT' / 'ASSIGNMENT'}; "
                       f"the assignments are {', '.join(known)}")
    return found


def grade(course: Path, assignment: str, progress: Callable[[str, int, int], None]) -> tuple[Path, list[Row]]:
    """Grade every submission that was not graded before, or has changed since. Returns the file of marks and its rows.

    `progress` is told the student, how many are done and how many there are. An interrupt leaves the students done so far
    graded, so that the next call goes on there, and the table as it was.
    """
    rows = []
    found = submissions(course, assignment)
    for done, submission in enumerate(found):
        progress(submission.student, done, len(found))
        faults = submission.faults()
        if not faults and not submission.is_graded():
            faults = _run(submission)
        rows.append(_row(submission, faults))
    progress("", len(found), len(found))
    path = course / f"marks_{assignment}.csv"
    _write(path, rows)
    return path, rows


def _run(submission: Submission) -> list[str]:
    """Grade one, and write the feedback. Returns why it could not be done, if so."""
    try:
        nbgrader.run(submission.course, "grade", submission.assignment, submission.student)
    except nbgrader.NbgraderError as error:
        return [str(error)]
    return []


def _row(submission: Submission, faults: list[str]) -> Row:
    """One line of the table; without a mark where there are faults."""
    row: Row = {"student": submission.student, "score": "", "max_score": "", "note": " | ".join(faults)}
    if not faults:
        marks = _marks(submission)
        row |= {"score": sum(score for score, _ in marks.values()), "max_score": sum(most for _, most in marks.values())}
        row |= {name: score for name, (score, _) in marks.items()}
    return row


def _marks(submission: Submission) -> dict[str, tuple[float, float]]:
    """Of each check: the mark (one given by hand counts before nbgrader's) and the most there is."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{submission.course.resolve() / 'gradebook.db'}") as gradebook:
        notebooks = gradebook.find_submission(submission.assignment, submission.student).notebooks
        grades = [grade for notebook in notebooks for grade in notebook.grades]
        return {grade.name: (grade.score, grade.max_score) for grade in sorted(grades, key=lambda grade: grade.name)}


def _write(path: Path, rows: list[Row]) -> None:
    """The whole table or none of it."""
    checks = sorted({column for row in rows for column in row} - {"student", "score", "max_score", "note"})
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["student", "score", "max_score", *checks, "note"])
            table.writeheader()
            table.writerows(rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
