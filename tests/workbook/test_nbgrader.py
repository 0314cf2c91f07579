"""nbgrader takes the built notebooks as they are: the same stubs, valid metadata, and a whole course run with them."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from solved import APPEND_SLOT_CELL

import nanopd
from nanopd.workbook import builder

pytest.importorskip("nbgrader")

PACKAGE_ROOT = Path(nanopd.__file__).parents[1]  # a kernel must find the package under test
CHAPTER = '''# %% [markdown] lang="en"
# # 99 Course

# %% [markdown] lang="zh"
# # 99 课程

# %%
import nanopd

# %% nbgrader={"grade_id": "ex-1-4", "solution": true}
''' + APPEND_SLOT_CELL + '''
# %% nbgrader={"grade_id": "check-1-4", "points": 3}
nanopd.check("01.4", append_slot)

# %% nbgrader={"grade_id": "ex-double", "solution": true}
def double(x):
    if x is None:
        ### BEGIN SOLUTION
        return None
        ### END SOLUTION
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-double", "points": 2}
assert double(2) == 4
### BEGIN HIDDEN TESTS
assert double(3) == 6
### END HIDDEN TESTS
'''


@pytest.fixture
def built(tmp_path: Path) -> Path:
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    (tmp_path / "notebooks" / "src" / "99_course.py").write_text(CHAPTER, encoding="utf-8")
    assert builder.main(["--notebooks", str(tmp_path / "notebooks")]) == 0
    return tmp_path / "notebooks"


@pytest.mark.parametrize("enforce_metadata", [False, True])  # with True it also proves each marker's cell the right kind
def test_nbgrader_makes_the_same_learners_notebook(built, enforce_metadata):
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions

    released = nbformat.read(built / "solutions" / "en" / "99_course.ipynb", as_version=4)
    for preprocessor in (ClearSolutions, ClearHiddenTests):
        released, _ = preprocessor(enforce_metadata=enforce_metadata).preprocess(released, {})
    ours = nbformat.read(built / "en" / "99_course.ipynb", as_version=4)
    assert [cell.source.rstrip() for cell in released.cells] == [cell.source for cell in ours.cells]
    assert [cell.metadata for cell in released.cells] == [cell.metadata for cell in ours.cells]


@pytest.mark.parametrize("folder", ["en", "zh", "solutions/en", "solutions/zh"])
def test_nbgrader_finds_the_metadata_valid(built, folder):
    from nbgrader.nbgraderformat import read

    read(built / folder / "99_course.ipynb", as_version=4)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_course_releases_collects_and_grades(built, tmp_path):
    """One who submits the solution gets every point, one who submits the learner's notebook as it came gets none."""
    course, name = tmp_path / "course", "99_course.ipynb"
    (course / "source" / "ps1").mkdir(parents=True)
    shutil.copy(built / "solutions" / "zh" / name, course / "source" / "ps1" / name)
    nbgrader(course, "generate_assignment", "ps1", "--create")
    for student, notebook in (("full", built / "solutions" / "zh" / name), ("empty", course / "release" / "ps1" / name)):
        (course / "submitted" / student / "ps1").mkdir(parents=True)
        shutil.copy(notebook, course / "submitted" / student / "ps1" / name)
    nbgrader(course, "autograde", "ps1", "--create")
    with sqlite3.connect(course / "gradebook.db") as gradebook:
        scores = dict(gradebook.execute(
            "select submitted_assignment.student_id, sum(grade.auto_score) from grade "
            "join submitted_notebook on grade.notebook_id = submitted_notebook.id "
            "join submitted_assignment on submitted_notebook.assignment_id = submitted_assignment.id "
            "group by submitted_assignment.student_id").fetchall())
    assert scores == {"full": 5, "empty": 0}


def nbgrader(course: Path, *arguments: str) -> None:
    """Run its command line with a strict check, finding this `nanopd`, and alembic beside the interpreter."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(PACKAGE_ROOT), os.environ["PYTHONPATH"]]),
        "NANOPD_STRICT_CHECKS": "1",
    }
    done = subprocess.run([sys.executable, "-m", "nbgrader", *arguments], cwd=course, env=environment, text=True,
                          capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
