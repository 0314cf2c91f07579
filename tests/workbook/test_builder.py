"""The builder: what it writes, what it refuses, and that what is committed is what it writes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import nbformat
import pytest

from nanopd.workbook import builder
from nanopd.workbook.source import SourceError, clear_solutions, hide_tests, read_chapter

CHAPTER = '''# A note to authors, which goes nowhere.

# %% [markdown] lang="en"
# # 99 Doubling
#
# Twice is enough.

# %% [markdown] lang="zh"
# # 99 翻倍
#
# 两倍就够了。

# %%
import nanopd

# %% [markdown]
# $2x$

# %%
guess = nanopd.predict("99.1", result=...)

# %% nbgrader={"grade_id": "ex-99-1", "solution": true}
def double(x):
    """Return twice x."""
    if x is None:
        ### BEGIN SOLUTION
        return None
        ### END SOLUTION
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-99-1", "points": 2}
assert double(2) == 4
### BEGIN HIDDEN TESTS
assert double(3) == 6
### END HIDDEN TESTS

# %% tags=["raises-exception"]
1 / 0

# %%
guess.reveal(4)

# %%
guess.reveal(4)
'''

STUBBED = '''def double(x):
    """Return twice x."""
    if x is None:
        # YOUR CODE HERE
        raise NotImplementedError()
    # YOUR CODE HERE
    raise NotImplementedError()'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "99_doubling.py").write_text(CHAPTER, encoding="utf-8")
    return tmp_path


def run(root: Path, *arguments: str) -> int:
    return builder.main([*arguments, "--notebooks", str(root)])


def source(root: Path) -> Path:
    return root / "src" / "99_doubling.py"


def notebook(root: Path, folder: str) -> nbformat.NotebookNode:
    return nbformat.read(root / folder / "99_doubling.ipynb", as_version=4)


def digests(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.ipynb")}


# ---------------------------------------------------------------------------------------------- what it writes


def test_four_notebooks_each_valid_and_without_outputs(root):
    assert run(root) == 0
    assert sorted(digests(root)) == ["en/99_doubling.ipynb", "solutions/en/99_doubling.ipynb",
                                     "solutions/zh/99_doubling.ipynb", "zh/99_doubling.ipynb"]
    for folder in ("en", "zh", "solutions/en", "solutions/zh"):
        built = notebook(root, folder)
        nbformat.validate(built)
        assert built.metadata.kernelspec.name == "python3"
        assert "widgets" not in built.metadata
        assert built.metadata.nanopd.lang == folder[-2:]
        assert all(not cell.outputs and cell.execution_count is None for cell in built.cells if cell.cell_type == "code")


def test_code_is_the_same_in_both_languages_and_ids_too(root):
    run(root)
    for prefix in ("", "solutions/"):
        en, zh = notebook(root, f"{prefix}en"), notebook(root, f"{prefix}zh")
        assert [cell for cell in en.cells if cell.cell_type == "code"] == [c for c in zh.cells if c.cell_type == "code"]
        assert [cell.id for cell in en.cells] == [cell.id for cell in zh.cells]
    assert [cell.id for cell in notebook(root, "en").cells] == [cell.id for cell in notebook(root, "solutions/en").cells]


def test_each_language_gets_its_own_text_and_what_has_none(root):
    run(root)
    text = {lang: [cell.source for cell in notebook(root, lang).cells if cell.cell_type == "markdown"]
            for lang in ("en", "zh")}
    assert text["en"] == ["# 99 Doubling\n\nTwice is enough.", "$2x$"]
    assert text["zh"] == ["# 99 翻倍\n\n两倍就够了。", "$2x$"]


def test_building_twice_writes_the_same_bytes(root, tmp_path_factory):
    run(root)
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "src").mkdir()
    source(other).write_text(CHAPTER, encoding="utf-8")
    run(other)
    assert digests(root) == digests(other) != {}


def test_ids_are_unique_and_stay_when_cells_are_added_above(root):
    run(root)
    before = [cell.id for cell in notebook(root, "en").cells]
    assert len(set(before)) == len(before)
    source(root).write_text(CHAPTER.replace("# %%\nimport nanopd", "# %%\nx = 1\n\n# %%\nimport nanopd"), encoding="utf-8")
    run(root)
    assert [identity for identity in before if identity not in {cell.id for cell in notebook(root, "en").cells}] == []


def test_the_learners_is_stripped_and_the_solution_is_full(root):
    run(root)
    learners = {cell.id: cell for cell in notebook(root, "en").cells}
    solved = {cell.id: cell for cell in notebook(root, "solutions/en").cells}
    assert learners["ex-99-1"].source == STUBBED
    assert learners["check-99-1"].source == "assert double(2) == 4"
    assert "return 2 * x" in solved["ex-99-1"].source and "double(3) == 6" in solved["check-99-1"].source
    assert not re.search("SOLUTION|HIDDEN|en_hash", json.dumps(notebook(root, "en")))


def test_nbgrader_metadata_is_complete(root):
    run(root)
    cells = {cell.id: cell.metadata.get("nbgrader") for cell in notebook(root, "en").cells}
    assert cells["ex-99-1"] == {"grade_id": "ex-99-1", "schema_version": 3, "solution": True, "grade": False,
                                "locked": False, "task": False, "cell_type": "code"}
    assert cells["check-99-1"] == {"grade_id": "check-99-1", "schema_version": 3, "solution": False, "grade": True,
                                   "locked": True, "task": False, "cell_type": "code", "points": 2}


# ----------------------------------------------------------------------------------------------- what it refuses


def exercise(body: str, metadata: str = '{"grade_id": "e", "solution": true}') -> str:
    return f"# %% nbgrader={metadata}\n{body}\n"


EN, ZH = '# %% [markdown] lang="en"\n# hello\n\n', '# %% [markdown] lang="zh"\n# 你好\n\n'
SOLVED = "### BEGIN SOLUTION\nx = 1\n### END SOLUTION"
BROKEN = {
    "no twin": (EN + "# %%\nx = 1\n", "cell 1: English without its Chinese twin"),
    "no twin at the end": (EN + ZH + EN, "cell 3: English without its Chinese twin"),
    "twin not right after": (EN + "# %%\nx = 1\n\n" + ZH, "cell 3: Chinese without its English twin"),
    "Chinese first": (ZH + EN, "cell 1: Chinese without its English twin"),
    "unknown language": ('# %% [markdown] lang="fr"\n# salut\n', "cell 1: unknown lang 'fr'; known are en, zh"),
    "language of code": ('# %% lang="en"\nx = 1\n', "unknown metadata 'lang' for a code cell"),
    "unknown metadata": ('# %% colour="red"\nx = 1\n', "unknown metadata 'colour'; known are nbgrader, tags".replace(
        ";", " for a code cell;")),
    "a title": ("# %% Setting up\nx = 1\n", "unknown metadata 'title'"),
    "unknown tag": ('# %% tags=["hide"]\nx = 1\n', "unknown tag 'hide'"),
    "hash of the English": ('# %% [markdown] lang="en" en_hash="0"\n# hello\n\n' + ZH, "en_hash belongs on the Chinese"),
    "empty text": ('# %% [markdown] lang="en"\n#\n\n' + ZH, "the cell is empty"),
    "raw cell": ("# %% [raw]\n# x\n", "a raw cell"),
    "too long": ("# %%\n" + "x = 1\n" * 13, "cell 1: 13 lines of code; 12 is the most for a code cell"),
    "exercise too long": (exercise("x = 1\n" * 25 + SOLVED), "26 lines of code; 25 is the most"),
    "marker without metadata": ("# %%\n" + SOLVED + "\n", "a solution marker needs nbgrader="),
    "metadata without marker": (exercise("x = 1"), "needs ### BEGIN SOLUTION"),
    "solution never ends": (exercise("### BEGIN SOLUTION\nx = 1"), "BEGIN SOLUTION without its END"),
    "solution never begins": (exercise("x = 1\n### END SOLUTION"), "END SOLUTION where a region is not open"),
    "nested": (exercise("### BEGIN SOLUTION\n" + SOLVED), "BEGIN SOLUTION where a region is already open"),
    "hidden tests outside a check": ("# %%\n### BEGIN HIDDEN TESTS\nx = 1\n### END HIDDEN TESTS\n", "hidden tests need"),
    "points on a solution": (exercise(SOLVED, '{"grade_id": "e", "solution": true, "points": 2}'), "no points"),
    "neither solution nor check": (exercise("x = 1", '{"grade_id": "e"}'), "either is a solution"),
    "no grade_id": (exercise(SOLVED, '{"solution": true}'), "needs a grade_id"),
    "unknown nbgrader key": (exercise(SOLVED, '{"grade_id": "e", "solution": true, "pts": 1}'), "unknown nbgrader metadata"),
    "grade_id twice": (exercise(SOLVED) + "\n" + exercise(SOLVED), "cell 2: grade_id 'e' is taken"),
    "not Python": ("# %%\nx = = 1\n", "cell 1: invalid syntax"),
    "code above the first cell": ("import os\n\n# %%\nx = 1\n", "nothing but comments above it"),
    "no cell": ("# nothing\n", "a source starts with a cell"),
    "marker in a string": ('# %%\nx = """\n# %%\n"""\n', "inside a string"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named_with_its_file_and_cell(root, capsys, name):
    text, message = BROKEN[name]
    source(root).write_text(text, encoding="utf-8")
    with pytest.raises(SourceError) as caught:
        read_chapter(source(root))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{source(root)}:")
    assert run(root) == 1 and not digests(root), "nothing is written from a broken source"
    assert message in capsys.readouterr().err


def test_all_faults_of_a_source_are_told_at_once(root):
    source(root).write_text(EN + '# %% colour="red"\nx = 1\n\n# %%\n' + "y = 1\n" * 13, encoding="utf-8")
    with pytest.raises(SourceError) as caught:
        read_chapter(source(root))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", [
    "# %%\n" + "# why\n\n" * 20 + "x = 1\n" * 12,
    exercise("x = 1\n" * 24 + "### BEGIN SOLUTION\n" + "y = 1\n" * 40 + "### END SOLUTION"),
    "# %%\n# %matplotlib inline\nx = 1\n",
])
def test_comments_blank_lines_solutions_and_magics_are_fine(root, text):
    source(root).write_text(text, encoding="utf-8")
    assert read_chapter(source(root))


def test_an_unknown_chapter_is_named(root, capsys):
    assert run(root, "07") == 1
    assert "no chapter 07" in capsys.readouterr().err


def test_regions_keep_their_indentation():
    assert clear_solutions("if x:\n    ### BEGIN SOLUTION\n    y\n    ### END SOLUTION\nz") == (
        "if x:\n    # YOUR CODE HERE\n    raise NotImplementedError()\nz")
    assert hide_tests("a\n### BEGIN HIDDEN TESTS\nb\n### END HIDDEN TESTS") == "a"


# ------------------------------------------------------------------------------------ a learner's work is theirs


def test_a_notebook_somebody_worked_in_is_left_alone(root, capsys):
    run(root)
    path = root / "en" / "99_doubling.ipynb"
    mine = notebook(root, "en")
    mine.cells[-1].source = "my own"
    nbformat.write(mine, path)
    before = path.read_bytes()
    assert run(root) == 1
    assert path.read_bytes() == before
    assert f"{path}: changed by hand" in capsys.readouterr().err
    assert run(root, "--force") == 0
    assert path.read_bytes() != before


def test_a_notebook_that_was_only_built_is_written_again(root):
    run(root)
    source(root).write_text(CHAPTER.replace("Twice", "Two times"), encoding="utf-8")
    assert run(root) == 0
    assert "Two times" in notebook(root, "en").cells[0].source


# ------------------------------------------------------------------------------------------------- check and stamp


def test_check_is_content_with_a_stamped_fresh_build_and_writes_nothing(root):
    run(root, "--stamp", "99")
    run(root)
    before = digests(root)
    assert run(root, "--check") == 0
    assert digests(root) == before


def test_check_names_what_was_not_built(root, capsys):
    run(root, "--stamp", "99")
    assert run(root, "--check") == 1
    assert capsys.readouterr().err.count("not what the builder writes") == 4
    assert not digests(root)


def test_check_names_a_notebook_that_was_changed(root, capsys):
    run(root, "--stamp", "99")
    run(root)
    path = root / "solutions" / "zh" / "99_doubling.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("两倍", "三倍"), encoding="utf-8")
    assert run(root, "--check", "99") == 1
    assert str(path) in capsys.readouterr().err


def test_check_names_a_notebook_without_a_source(root, capsys):
    run(root, "--stamp", "99")
    run(root)
    (root / "zh" / "98_gone.ipynb").write_text("{}", encoding="utf-8")
    assert run(root, "--check") == 1
    assert "98_gone.ipynb: there is no source" in capsys.readouterr().err


def test_chinese_is_stale_when_its_english_changes(root, capsys):
    run(root)
    assert "not stamped: # 99 翻倍" in capsys.readouterr().out
    run(root, "--stamp", "99")
    stamped = source(root).read_text(encoding="utf-8")
    assert re.sub(r' en_hash="[0-9a-f]{8}"', "", stamped) == CHAPTER, "stamping changes the markers only"
    run(root)
    assert run(root, "--check") == 0

    source(root).write_text(stamped.replace("Twice is enough", "Twice is plenty"), encoding="utf-8")
    run(root)
    capsys.readouterr()
    assert run(root, "--check") == 1
    error = capsys.readouterr().err
    assert re.search(r"99_doubling\.py:8: cell 2: stale: # 99 翻倍", error) and "not what" not in error
    run(root, "--stamp", "99_doubling")
    assert run(root, "--check") == 0


def test_stamp_wants_its_chapters_named(root):
    with pytest.raises(SystemExit):
        run(root, "--stamp")


# ------------------------------------------------------------------------------------------------- what is committed


@pytest.mark.skipif(not builder.NOTEBOOKS.is_dir(), reason="the notebooks are not part of an installed package")
def test_what_is_committed_is_what_the_builder_writes():
    assert builder.check(builder.NOTEBOOKS, []) == []


@pytest.mark.parametrize("written, shown", [
    ("就地写入。\n**复制了三次**", "就地写入。**复制了三次**"),
    ("调度器。\n这一章里", "调度器。这一章里"),
    ("由此\n而来", "由此而来"),
    ("代码在，\n`runner.py`", "代码在，`runner.py`"),
    ("用的是\nGPU", "用的是\nGPU"),  # a space belongs between the two scripts
    ("- 一。\n- 二。", "- 一。\n- 二。"),
    ("第一段。\n\n第二段。", "第一段。\n\n第二段。"),
])
def test_a_line_break_in_chinese_leaves_no_space(written, shown):
    assert builder.LINE_BREAK_IN_CHINESE.sub("", written) == shown
