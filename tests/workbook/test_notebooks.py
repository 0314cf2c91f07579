"""Every solution notebook runs in full; the learner's fails in its exercise cells, and nowhere else.

Both languages have the same code: each is run once every time, the one's solution and the other's learner's notebook.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from chromium import find_chromium
from solved import APPEND_SLOT_CELL

import nanopd
from nanopd.workbook import builder

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

PACKAGE_ROOT = Path(nanopd.__file__).parents[1]  # a kernel must find the package under test
CHAPTERS = [path.stem for path in builder.sources(builder.NOTEBOOKS, [])]
CELL_TIMEOUT = 300
IN_A_BROWSER = ("00", "01", "03", "05")

pytestmark = pytest.mark.timeout(1200)


def execute(path: Path, allow_errors: bool) -> nbformat.NotebookNode:
    """The notebook, run in memory as Jupyter would run it: in its own folder, with this repository's `nanopd`."""
    environment = {name: value for name, value in os.environ.items() if name != "NANOPD_LANG"}
    search_path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    environment |= {"NANOPD_STRICT_CHECKS": "1", "PYTHONPATH": search_path}
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=CELL_TIMEOUT, allow_errors=allow_errors, kernel_name="python3")
    client.execute(cwd=str(path.parent), env=environment)
    return notebook


def failed(cell: nbformat.NotebookNode) -> bool:
    return any(output.output_type == "error" for output in cell.get("outputs", []))


def errors_of_a_learner(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with a learner's notebook that was run unsolved: the rule is in `nanopd.workbook`."""
    faults = []
    for cell in notebook.cells:
        nbgrader = cell.metadata.get("nbgrader", {})
        meant_to_fail = nbgrader or "raises-exception" in cell.metadata.get("tags", [])
        if failed(cell) and not meant_to_fail:
            error = next(output for output in cell.outputs if output.output_type == "error")
            faults.append(f"cell {cell.id} depends on an unsolved exercise: {error.ename}: {error.evalue}\n{cell.source}")
        if nbgrader.get("grade") and not failed(cell):
            faults.append(f"check cell {cell.id} passes on the stub")
    return faults


@pytest.mark.parametrize("lang", ["zh", pytest.param("en", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_solution_runs_in_full(chapter, lang):
    if lang == "zh" and chapter[:2] in IN_A_BROWSER and find_chromium():
        pytest.skip("tests/browser runs this one in full, and sees that its checks passed")
    if chapter.startswith("03") and not any(map(shutil.which, ["nvcc", "c++", "g++", "clang++"])):
        pytest.skip("exercise 3.5b is compiled, and there is no compiler here (Debian: apt-get install g++)")
    execute(builder.NOTEBOOKS / "solutions" / lang / f"{chapter}.ipynb", allow_errors=False)


# Those that measure and serve for a minute each run unsolved at night only; so does 00, and 01, which nbgrader runs unsolved in
# tests/lab.
@pytest.mark.parametrize("lang", ["en", pytest.param("zh", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("chapter", [chapter if "02" <= chapter < "04" else pytest.param(chapter, marks=pytest.mark.nightly)
                                     for chapter in CHAPTERS])
def test_the_learners_fails_in_its_exercise_cells_only(chapter, lang):
    notebook = execute(builder.NOTEBOOKS / lang / f"{chapter}.ipynb", allow_errors=True)
    assert errors_of_a_learner(notebook) == []


# --------------------------------------------------------------------------------- the same, on a chapter of our own

SMALL = '''# %%
import nanopd
from nanopd.widgets.strings import current_language

guess = nanopd.predict("99.1", result=...)

# %% nbgrader={"grade_id": "ex", "solution": true}
''' + APPEND_SLOT_CELL + '''
# %% nbgrader={"grade_id": "check", "points": 1}
nanopd.check("01.4", append_slot)

# %%
guess.reveal(63)

# %%
print(current_language())

# %% tags=["raises-exception"]
1 / 0
'''


def build_small(root: Path, text: str) -> None:
    (root / "src").mkdir()
    (root / "src" / "99_small.py").write_text(text, encoding="utf-8")
    assert builder.main(["--notebooks", str(root)]) == 0


def test_a_small_chapter_speaks_its_folders_language(tmp_path):
    build_small(tmp_path, SMALL)
    solved = execute(tmp_path / "solutions" / "zh" / "99_small.ipynb", allow_errors=False)
    assert solved.cells[4].outputs[0].text == "zh\n"
    assert "全部通过" in solved.cells[2].outputs[0].data["text/html"]
    assert "预测 99.1" in solved.cells[3].outputs[0].text and len(solved.cells[3].outputs) == 1, "no echo of the dict"
    unsolved = execute(tmp_path / "en" / "99_small.ipynb", allow_errors=True)
    assert errors_of_a_learner(unsolved) == []
    assert "not written yet" in "".join(unsolved.cells[2].outputs[-1].traceback)


def test_a_chapter_that_leans_on_the_learner_is_caught(tmp_path):
    text = SMALL.replace("guess.reveal(63)", "append_slot(None, [], 0)").replace('nanopd.check("01.4", append_slot)', "pass")
    build_small(tmp_path, text)
    faults = errors_of_a_learner(execute(tmp_path / "en" / "99_small.ipynb", allow_errors=True))
    assert len(faults) == 2
    assert "check cell check passes on the stub" in faults[0] and "NotImplementedError" in faults[1]
