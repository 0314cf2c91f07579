"""`nanopd lab new`: a learner's set, in both languages, from a checkout and from an installed package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanopd.cli import app
from nanopd.lab import LabError, books
from nanopd.lab import new as lab_new

ROOT = Path(__file__).parents[2]


def run(*args):
    return CliRunner().invoke(app, ["lab", *map(str, args)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lang, says", [("en", "## Without a GPU"), ("zh", "## 没有 GPU")])
def test_a_set_is_the_learners_notebooks_and_a_page(tmp_path, lang, says):
    result = run("new", tmp_path / "deep" / "set", "--lang", lang)
    assert result.exit_code == 0, result.output
    copied = files(tmp_path / "deep" / "set")
    assert says in copied.pop("README.md").decode()
    assert copied == {f"{lang}/{path.name}": path.read_bytes() for path in (ROOT / "notebooks" / lang).glob("*.ipynb")}


@pytest.mark.parametrize("options", [("--chapters", "01", "02_engine"), ("--chapters", "02", "--chapters", "01"), ("01", "02")])
def test_only_some_chapters(tmp_path, options):
    result = run("new", tmp_path, "--lang", "zh", *options)
    assert result.exit_code == 0, result.output
    assert set(files(tmp_path)) == {"README.md", "zh/01_block_manager.ipynb", "zh/02_engine.ipynb"}


def test_a_file_that_is_there_is_named_and_nothing_changes(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "02_engine.ipynb").write_text("my work")
    before = files(tmp_path)
    result = run("new", tmp_path, "--lang", "en")
    assert result.exit_code == 2
    assert "en/02_engine.ipynb" in result.output.replace("\n", "") and "01_block_manager" not in result.output
    assert files(tmp_path) == before


def test_a_link_that_leads_nowhere_is_a_file_too(tmp_path):
    (tmp_path / "README.md").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LabError, match=r"README\.md"):
        lab_new.copy_set(tmp_path, "en", ["01"])
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "en").exists()


def test_the_directory_is_a_file(tmp_path):
    (tmp_path / "set").write_text("")
    result = run("new", tmp_path / "set")
    assert result.exit_code == 2
    assert "nanopd: " in result.output


def test_an_unknown_chapter_and_language_name_what_there_is(tmp_path):
    result = run("new", tmp_path / "set", "--chapters", "01", "77")
    assert result.exit_code == 2
    assert "no chapter 77" in result.output and "01_block_manager" in result.output
    assert run("new", tmp_path / "set", "--lang", "fr").exit_code == 2
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("there_before", [True, False])
def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, there_before):
    target = tmp_path / "some" / "set"
    if there_before:
        target.mkdir(parents=True)
        (target / "mine.txt").write_text("mine")
    write = Path.write_bytes

    def interrupted(path, data):
        write(path, data[:10])
        if path.name.startswith("02"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab_new.copy_set(target, "en", [])
    assert [path.name for path in tmp_path.rglob("*")] == (["some", "set", "mine.txt"] if there_before else [])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package: it has the notebooks inside, and no checkout around it."""
    package = tmp_path / "site-packages" / "nanopd"
    for lang in ("en", "zh"):
        (package / "_notebooks" / "solutions" / lang).mkdir(parents=True)
        shutil.copytree(ROOT / "notebooks" / lang, package / "_notebooks" / lang)
    monkeypatch.setattr(books, "PACKAGE", package)
    return package


def test_from_an_installed_package(installed, tmp_path):
    assert books.notebooks() == installed / "_notebooks"
    assert run("new", tmp_path / "set", "--lang", "en", "--chapters", "06").exit_code == 0
    assert (tmp_path / "set" / "en" / "06_router.ipynb").read_bytes() == (ROOT / "notebooks/en/06_router.ipynb").read_bytes()


def test_a_package_without_notebooks_says_so(installed, tmp_path):
    with pytest.raises(LabError, match="no chapter at all in .*_notebooks"):
        books.chapters("en", [], solved=True)
