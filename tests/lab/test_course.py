"""`nanopd lab release` and `nanopd lab grade` on the shipped chapters, through nbgrader."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nanopd
from nanopd.cli import app
from nanopd.lab import books, course, grading, nbgrader, submissions

pytest.importorskip("nbgrader")

PACKAGE_ROOT = Path(nanopd.__file__).parents[1]
FIRST = "01_block_manager"
CHAPTERS = [path.stem for path in books.chapters("en", [])]

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(autouse=True, scope="module")
def environment():
    """nbgrader's process and its kernels find this `nanopd`, and nothing but nbgrader makes a check strict."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")])))
    for variable in ("NANOPD_STRICT_CHECKS", "NANOPD_LANG"):
        patch.delenv(variable, raising=False)
    yield
    patch.undo()


def run(*args):
    return CliRunner().invoke(app, ["lab", *map(str, args)])


def hand_in(folder: Path, student: str, assignment: str, notebook: Path) -> Path:
    target = folder / "submitted" / student / assignment / notebook.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(notebook, target)
    return target


def table(folder: Path, assignment: str) -> dict[str, dict[str, str]]:
    with (folder / f"marks_{assignment}.csv").open(encoding="utf-8", newline="") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def points(notebook: Path) -> dict[str, float]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    marks = [cell["metadata"].get("nbgrader", {}) for cell in cells]
    return {mark["grade_id"]: mark["points"] for mark in marks if mark.get("grade")}


def assert_full_and_nothing(folder: Path, lang: str, chapter: str) -> None:
    """Grade the solution and the notebook as it was released: every point, and none."""
    assignment = f"{chapter}_{lang}"
    hand_in(folder, "full", assignment, folder / "source" / assignment / f"{chapter}.ipynb")
    released = folder / "release" / assignment / f"{chapter}.ipynb"
    hand_in(folder, "0042", assignment, released)  # who has only a number, and has done nothing
    result = run("grade", folder, assignment)
    assert result.exit_code == 0, result.output
    marks, worth = table(folder, assignment), points(released)
    assert worth and sum(worth.values()) > 0
    for check, most in worth.items():
        assert (float(marks["full"][check]), float(marks["0042"][check])) == (most, 0), check
    assert [float(marks[student]["score"]) for student in ("full", "0042")] == [sum(worth.values()), 0]
    assert all(float(row["max_score"]) == sum(worth.values()) for row in marks.values())


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A course with chapter 01 in Chinese, made by the command."""
    folder = tmp_path_factory.mktemp("lab") / "course"
    result = run("release", folder, "--lang", "zh", "--chapters", "01")
    assert result.exit_code == 0, result.output
    return folder


# ------------------------------------------------------------------------------------------ release and grade


def test_what_is_released_is_the_learners_notebook(released):
    ours = json.loads((books.notebooks() / "zh" / f"{FIRST}.ipynb").read_text(encoding="utf-8"))
    theirs = json.loads((released / "release" / f"{FIRST}_zh" / f"{FIRST}.ipynb").read_text(encoding="utf-8"))
    assert [("".join(cell["source"]).rstrip(), cell["id"]) for cell in theirs["cells"]] == [
        ("".join(cell["source"]), cell["id"]) for cell in ours["cells"]]
    assert "### BEGIN" not in json.dumps(theirs)


def test_released_again_it_is_left_as_it_is(released):
    before = {path: path.read_bytes() for path in released.rglob("*.ipynb")}
    result = run("release", released, "--lang", "zh", "--chapters", "01")
    assert result.exit_code == 0
    assert f"left as it is: {released}/release/{FIRST}_zh" in result.output
    assert {path: path.read_bytes() for path in released.rglob("*.ipynb")} == before


def test_the_solution_gets_every_point_and_the_released_notebook_none(released):
    assert_full_and_nothing(released, "zh", FIRST)
    feedback = (released / "feedback" / "0042" / f"{FIRST}_zh" / f"{FIRST}.html").read_text(encoding="utf-8")
    assert "还没有写" in feedback, "the assignment's language is the notebook's"


def test_graded_again_only_the_changed_are_run(released, monkeypatch):
    """Uses what the test before has graded."""
    assignment = f"{FIRST}_zh"
    before = table(released, assignment)
    ran = []
    monkeypatch.setattr(nbgrader, "run", lambda course, *step: ran.append(step))
    assert run("grade", released, "01").exit_code == 0
    assert (ran, table(released, assignment)) == ([], before)
    notebook = released / "submitted" / "0042" / assignment / f"{FIRST}.ipynb"
    old = notebook.stat().st_mtime - 3600
    again = hand_in(released, "0042", assignment, notebook.rename(released / notebook.name))
    os.utime(again, (old, old))  # as an archive unpacks it
    assert run("grade", released).exit_code == 0
    assert ran == [("grade", assignment, "0042")]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_an_exercise_s_name_means_nothing_elsewhere(chapter):
    """Else a check would find another function of that name where the exercise's cell was emptied, and might give its points."""
    notebook = json.loads((books.notebooks() / "solutions" / "en" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    checked = set(re.findall(r'nanopd\.check\("[^"]+", (\w+)\)', "\n".join("".join(cell["source"]) for cell in code)))
    elsewhere = [name for cell in code if "nbgrader" not in cell["metadata"] for name in bound_by("".join(cell["source"]))]
    assert checked and not checked & set(elsewhere)


def bound_by(source: str) -> Iterator[str]:
    """Names that a cell gives a meaning to, outside of functions and classes."""
    nodes: list[ast.AST] = list(ast.parse("\n".join(line for line in source.split("\n") if line[:1] not in ("%", "!"))).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            nodes += ast.iter_child_nodes(node)


@pytest.mark.nightly
@pytest.mark.parametrize("lang, chapter", [("en" if number % 2 else "zh", chapter) for number, chapter in enumerate(CHAPTERS)])
def test_every_chapter_full_and_nothing(tmp_path, lang, chapter):
    """A measurement in the notebook may take its time; a mark may not depend on it."""
    if chapter.startswith("03") and not any(map(shutil.which, ["nvcc", "c++", "g++", "clang++"])):
        pytest.skip("exercise 3.5b is compiled, and there is no compiler here (Debian: apt-get install g++)")
    assert run("release", tmp_path, "--lang", lang, "--chapters", chapter).exit_code == 0
    assert_full_and_nothing(tmp_path, lang, chapter)


# ------------------------------------------------------------------------------------- what cannot be marked


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A course with one small assignment, where nbgrader does nothing but leave its feedback and full marks."""
    folder, name = tmp_path / "course", "01_small"
    cells = [{"cell_type": "code", "id": mark["grade_id"], "metadata": {"nbgrader": mark}, "source": []}
             for mark in ({"grade_id": "ex", "solution": True}, {"grade_id": "check", "grade": True, "points": 2})]
    (folder / "release" / f"{name}_en").mkdir(parents=True)
    (folder / "release" / f"{name}_en" / f"{name}.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    (folder / "gradebook.db").touch()

    def graded(course, step, assignment, student):
        page = course / "feedback" / student / assignment / f"{name}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("feedback")

    monkeypatch.setattr(nbgrader, "run", graded)
    monkeypatch.setattr(grading, "_marks", lambda submission: {"check": (2.0, 2.0)})
    return folder


def submit(folder: Path, student: str, change) -> None:
    """Hand in the released notebook with its list of cells changed in place."""
    path = hand_in(folder, student, "01_small_en", folder / "release" / "01_small_en" / "01_small.ipynb")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    change(notebook["cells"])
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.mark.parametrize("change, says", [
    (lambda cells: cells.pop(1), "cell check is missing; copy it from"),
    (lambda cells: cells.clear(), "cell ex is missing"),
    (lambda cells: cells.append(cells[0]), "cell ex is there 2 times; leave the one that counts"),
])
def test_a_missing_or_a_doubled_cell_is_named_and_not_marked(fake, change, says):
    submit(fake, "ann", lambda cells: None)
    submit(fake, "bob", change)
    result = run("grade", fake)
    assert result.exit_code == 1
    assert f"bob: not marked: 01_small.ipynb: {says}" in result.output
    assert "1 of 2 marked" in result.output
    marks = table(fake, "01_small_en")
    assert (marks["ann"]["score"], marks["ann"]["note"]) == ("2.0", "")
    assert marks["bob"]["score"] == "" and says in marks["bob"]["note"]


def test_what_is_no_notebook_or_has_another_name_is_named(fake):
    for student, name, text in (("ann", "01_small.ipynb", "not JSON"), ("bob", "01_small.ipynb", '{"cells": [1]}'),
                                ("eve", "01_small (1).ipynb", "{}")):
        path = fake / "submitted" / student / "01_small_en" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    submit(fake, "x[1]", lambda cells: None)
    assert run("grade", fake).exit_code == 1
    notes = {student: row["note"] for student, row in table(fake, "01_small_en").items()}
    assert "not a notebook that can be read" in notes["ann"] and "not a notebook that can be read" in notes["bob"]
    assert notes["eve"] == "01_small.ipynb is missing; there is 01_small (1).ipynb: has it been renamed?"
    assert "rename it" in notes["x[1]"]


def test_one_that_nbgrader_fails_on_does_not_stop_the_others(fake, monkeypatch):
    graded = nbgrader.run

    def fails_for_ann(course, step, assignment, student):
        if student == "ann":
            raise nbgrader.NbgraderError("the kernel died")
        graded(course, step, assignment, student)

    monkeypatch.setattr(nbgrader, "run", fails_for_ann)
    for student in ("ann", "bob"):
        submit(fake, student, lambda cells: None)
    result = run("grade", fake, "01")
    assert result.exit_code == 1
    assert "ann: not marked: the kernel died" in result.output
    assert table(fake, "01_small_en")["bob"]["score"] == "2.0"


def test_an_interrupt_keeps_who_is_done_and_the_table_as_it_was(fake, monkeypatch):
    graded, ran = nbgrader.run, []

    def interrupted_at_bob(course, step, assignment, student):
        if student == "bob":
            raise KeyboardInterrupt
        ran.append(student)
        graded(course, step, assignment, student)

    for student in ("ann", "bob"):
        submit(fake, student, lambda cells: None)
    (fake / "marks_01_small_en.csv").write_text("of last week")
    monkeypatch.setattr(nbgrader, "run", interrupted_at_bob)
    result = run("grade", fake)
    assert result.exit_code == 130
    assert (fake / "marks_01_small_en.csv").read_text() == "of last week"
    monkeypatch.setattr(nbgrader, "run", lambda course, step, *names: (ran.append(names[1]), graded(course, step, *names)))
    assert run("grade", fake).exit_code == 0
    assert ran == ["ann", "bob"], "ann's was done before"
    assert not list(fake.glob("*.partial"))


def test_nothing_handed_in_says_where_it_goes(fake):
    for args in ((), ("01",)):
        result = run("grade", fake, *args)
        assert result.exit_code == 2
        assert "submitted/STUDENT" in result.output.replace("\n", "")


def test_an_unknown_assignment_names_the_known(fake, tmp_path):
    result = run("grade", fake, "07")
    assert result.exit_code == 2
    assert "no assignment is called 07; there are 01_small_en" in result.output
    (fake / "release" / "01_small_zh").mkdir()
    result = run("grade", fake, "01")
    assert result.exit_code == 2
    assert "several assignments are called 01; there are 01_small_en, 01_small_zh" in result.output
    result = run("grade", tmp_path / "elsewhere")
    assert result.exit_code == 2
    assert "nanopd lab release" in result.output


def test_without_nbgrader_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(nbgrader, "find_spec", lambda name: None)
    for args in (("release", tmp_path / "course"), ("grade", tmp_path / "course")):
        result = run(*args)
        assert result.exit_code == 2
        assert "pip install 'nanopd[course]'" in result.output
    assert not (tmp_path / "course").exists()


def test_a_release_that_fails_leaves_no_assignment(tmp_path, monkeypatch):
    def fails(folder, step, assignment):
        (folder / "release" / assignment).mkdir(parents=True)
        raise nbgrader.NbgraderError("no space left")

    monkeypatch.setattr(nbgrader, "run", fails)
    result = run("release", tmp_path, "--chapters", "01")
    assert result.exit_code == 2
    assert "no space left" in result.output
    assert not list(tmp_path.rglob("*.ipynb")) and not list((tmp_path / "release").iterdir())
    assert run("release", tmp_path / "other", "--chapters", "77").exit_code == 2
    assert not (tmp_path / "other").exists()


def test_what_the_instructor_wrote_is_kept_and_released(tmp_path, monkeypatch):
    source = tmp_path / "source" / f"{FIRST}_en" / f"{FIRST}.ipynb"
    source.parent.mkdir(parents=True)
    source.write_text("changed by the instructor")
    (tmp_path / course.CONFIG).write_text("# mine")
    ran = []
    monkeypatch.setattr(nbgrader, "run", lambda folder, *step: ran.append(step))
    assert run("release", tmp_path, "--chapters", "01").exit_code == 0
    assert (source.read_text(), (tmp_path / course.CONFIG).read_text()) == ("changed by the instructor", "# mine")
    assert ran == [("release", f"{FIRST}_en")]


# --------------------------------------------------------------------------------------------- nbgrader's process

ENDLESS = """
import os, pathlib, time
pathlib.Path({started!r}).write_text(str(os.getpid()))
time.sleep(600)
"""


def test_a_process_that_fails_tells_the_last_it_said(tmp_path, monkeypatch):
    monkeypatch.setattr(nbgrader, "__name__", "nanopd.lab.absent")
    with pytest.raises(nbgrader.NbgraderError, match=r"could not grade a of ann\. The last it said:\n.*nanopd\.lab\.absent"):
        nbgrader.run(tmp_path, "grade", "a", "ann")


@pytest.mark.nightly
def test_a_failing_step_tells_the_last_that_nbgrader_said(tmp_path):
    with pytest.raises(nbgrader.NbgraderError, match="could not release nothing") as failed:
        nbgrader.run(tmp_path, "release", "nothing")
    assert "No notebooks were matched" in str(failed.value)


@pytest.mark.nightly
def test_ctrl_c_ends_the_students_code_and_leaves_nothing_half_written(released, tmp_path):
    folder, assignment = tmp_path / "course", f"{FIRST}_zh"
    shutil.copytree(released, folder, ignore=shutil.ignore_patterns("submitted", "autograded", "feedback", "marks*"))
    path = hand_in(folder, "ann", assignment, folder / "release" / assignment / f"{FIRST}.ipynb")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    started = tmp_path / "started"
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    first["source"] = ENDLESS.format(started=str(started))
    path.write_text(json.dumps(notebook), encoding="utf-8")
    command = subprocess.Popen([sys.executable, "-m", "nanopd", "lab", "grade", str(folder)], stderr=subprocess.PIPE, text=True)
    while not started.exists():
        assert command.poll() is None, command.communicate()[1]
        time.sleep(0.2)
    time.sleep(0.5)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=60)
    assert (command.returncode, "interrupted" in said) == (130, True), said
    assert not list(folder.glob("autograded/ann/*")) and not list(folder.glob("feedback/ann/*")) and not list(folder.glob("marks*"))
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(started.read_text()), 0)
            time.sleep(0.2)
    assert submissions.submissions(folder, assignment)[0].is_graded() is False
