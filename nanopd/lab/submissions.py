"""What was handed in, and whether it can be graded as it is."""

from __future__ import annotations

import glob
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanopd.lab import LabError


@dataclass(frozen=True)
class Submission:
    """submitted/STUDENT/ASSIGNMENT in a course directory."""

    course: Path
    student: str
    assignment: str

    @property
    def folder(self) -> Path:
        return self.course / "submitted" / self.student / self.assignment

    @property
    def feedback(self) -> Path:
        return self.course / "feedback" / self.student / self.assignment

    @property
    def released(self) -> list[Path]:
        """The notebooks as students got them."""
        return sorted((self.course / "release" / self.assignment).glob("*.ipynb"))

    def is_graded(self) -> bool:
        """Whether all feedback is newer than what was handed in and what was released.

        By the time of the last change to the file itself: a copy keeps the time at which its text was changed.
        """
        pages = [self.feedback / f"{path.stem}.html" for path in self.released]
        files = [*self.released, *self.folder.glob("*.ipynb")]
        return (all(page.is_file() for page in pages)
                and min(page.stat().st_ctime_ns for page in pages) > max(path.stat().st_ctime_ns for path in files))

    def faults(self) -> list[str]:
        """Why a mark for this would be unjust: notebooks or cells that are missing, or there twice."""
        if glob.escape(self.student) != self.student:
            return [f"nbgrader takes the folder's name {self.student!r} for a pattern: rename it without * ? ["]
        return [fault for path in self.released for fault in self._faults_of(path)]

    def _faults_of(self, released: Path) -> list[str]:
        path = self.folder / released.name
        if not path.is_file():
            others = sorted(other.name for other in self.folder.glob("*"))
            return [f"{released.name} is missing" + (f"; there is {', '.join(others)}: has it been renamed?" if others else "")]
        try:
            found = grade_ids(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{path.name} is not a notebook that can be read: {type(error).__name__}: {error}"]
        missing = [name for name in grade_ids(released) if name not in found]
        twice = [name for name, count in Counter(found).items() if count > 1]
        return ([f"{path.name}: cell {name} is missing; copy it from {released}" for name in missing]
                + [f"{path.name}: cell {name} is there {found.count(name)} times; leave the one that counts" for name in twice])


def grade_ids(path: Path) -> list[str]:
    """Of a notebook's exercise and check cells, in order."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    marked = [cell["metadata"].get("nbgrader") or {} for cell in cells]
    return [mark["grade_id"] for mark in marked if mark.get("grade_id")]


def submissions(course: Path, assignment: str) -> list[Submission]:
    """In order of the students. Raises LabError where nobody has handed in anything."""
    folders = sorted(path for path in (course / "submitted").glob(f"*/{glob.escape(assignment)}") if path.is_dir())
    if not folders:
        raise LabError(f"nobody has handed in {assignment}: put each notebook into "
                       f"{course / 'submitted' / 'STUDENT' / assignment}, under the name it was released with")
    return [Submission(course, path.parent.name, assignment) for path in folders]
