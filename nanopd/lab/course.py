"""A course directory of nbgrader's: its assignments are chapters, generated from the solution notebooks.

    source/01_block_manager_zh/01_block_manager.ipynb               the solution, which stays with the instructor
    release/01_block_manager_zh/01_block_manager.ipynb              what students get
    submitted/STUDENT/01_block_manager_zh/01_block_manager.ipynb    what they hand in
    autograded/, feedback/, gradebook.db                            nbgrader's

nbgrader's own commands can be used here between ours.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from nanopd.lab import LabError, nbgrader
from nanopd.lab.books import chapters

CONFIG = "nbgrader_config.py"
CONFIG_TEXT = """\
# Read by every nbgrader command that runs here. Yours to change: `nanopd lab` writes it once and never again.
c = get_config()
c.Execute.timeout = 600  # seconds for a cell, as several chapters measure for a minute; None: for ever
c.Execute.iopub_timeout = 60  # a machine that grades is a busy one
"""


def release(course: Path, lang: str, wanted: list[str]) -> Iterator[tuple[str, bool]]:
    """Make the course directory, or add to it. Yields each assignment in turn, and whether it is released only now.

    What is in source/ already is the instructor's own and is released as it is.
    """
    nbgrader.need_nbgrader()
    solutions = chapters(lang, wanted, solved=True)
    course.mkdir(parents=True, exist_ok=True)
    if not (course / CONFIG).exists():
        (course / CONFIG).write_text(CONFIG_TEXT, encoding="utf-8")
    for solution in solutions:
        assignment = f"{solution.stem}_{lang}"  # this ending tells the notebook's code its language
        is_new = not (course / "release" / assignment).exists()
        if is_new:
            _release(course, assignment, solution)
        yield assignment, is_new


def _release(course: Path, assignment: str, solution: Path) -> None:
    source = course / "source" / assignment
    made = [course / "release" / assignment] if source.exists() else [course / "release" / assignment, source]
    try:
        if not source.exists():
            source.mkdir(parents=True)
            shutil.copyfile(solution, source / solution.name)
        nbgrader.run(course, "release", assignment)
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def released(course: Path) -> list[str]:
    """The assignments there are. Raises LabError where `course` is no course directory."""
    found = sorted(path.name for path in (course / "release").glob("*") if path.is_dir())
    if not found or not (course / "gradebook.db").is_file():
        raise LabError(f"{course} is no course directory with a released assignment; nanopd lab release {course} makes it one")
    return found
