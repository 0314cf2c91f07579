"""The gallery: a small chapter of our own through the whole of it, and what happens where something goes wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import nbformat
import pytest
from small_chapter import SMALL_CHAPTER, build_small_chapter

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from nanopd.workbook import gallery
from nanopd.workbook.source import SourceError

COMMIT = "0123456789abcdef"


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    root = tmp_path_factory.mktemp("notebooks")
    build_small_chapter(root / "book")
    return root / "book"


@pytest.fixture(scope="module")
def site(notebooks, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    said = []
    assert gallery.make(out, commit=COMMIT, notebooks=notebooks, say=said.append) == []
    assert said == ["en/99_small: executed", "zh/99_small: executed"]
    return out


def page(site, lang="en"):
    return (site / lang / "99_small.html").read_text(encoding="utf-8")


def figures(html):
    """The data of each figure that the page draws."""
    return [json.JSONDecoder().raw_decode(html, match.end())[0]
            for match in re.finditer(r'Plotly\.newPlot\(\s*"figure-\d+-\d+",\s*', html)]


def again(notebooks, site, **options):
    """What `make` says it did, with nothing changed but the options."""
    said = []
    failures = gallery.make(site, languages=("en",), notebooks=notebooks, say=said.append, **{"commit": COMMIT, **options})
    return said, failures


# ------------------------------------------------------------------------------------------------- what a page holds


def test_pages_say_where_when_and_from_what_they_were_made(site):
    stamp = gallery._read(site / "en" / "99_small.ipynb").stamp
    assert stamp.device == gallery.device_name()
    sentence = f"Executed on {stamp.device}, commit 0123456, {stamp.date[:10]}"
    index = (site / "index.html").read_text(encoding="utf-8")
    assert sentence in page(site) and sentence in index
    assert f"运行于 {stamp.device}" in page(site, "zh") and f"运行于 {stamp.device}" in index
    assert re.findall(r'href="(\w\w/\w+\.html)"', index) == ["en/99_small.html", "zh/99_small.html"]
    assert 'href="../zh/99_small.html"' in page(site)


def test_a_panel_is_drawn_as_it_is_once_all_cells_have_run(site):
    """The load of chapter 06 begins in the cell after its panel's; maps are empty until somebody presses Step."""
    changed, _, plain = figures(page(site))
    assert [trace["text"] for trace in changed if trace.get("text")] == [["<b>after</b>"]], "drawn by the cell after"
    assert "\\u003cb\\u003e2\\u002f2\\u003c\\u002fb\\u003e" in page(site), "two moves, the second by its action"
    assert plain[0]["y"] == [3, 1, 2]


def test_cells_speak_the_language_of_the_page(site):
    assert "Exercise 01.4: all checks pass" in page(site)
    assert "练习 01.4" in page(site, "zh")


def test_lines_of_a_cell_are_one_output(site):
    notebook = gallery._read(site / "en" / "99_small.ipynb").notebook
    (cell,) = [cell for cell in notebook.cells if "many lines" in cell.source]
    assert len(cell.outputs) == 1


def test_nothing_of_the_gallery_s_own_is_left_in_the_notebook(site):
    notebook = gallery._read(site / "en" / "99_small.ipynb").notebook
    nbformat.validate(notebook)
    assert "_stills" not in nbformat.writes(notebook)
    assert "widgets" not in notebook.metadata


def test_pages_ask_nothing_of_another_machine(site):
    for path in site.rglob("*.html"):
        addresses = re.findall(r'(?:src|href)="([^"]*)"', path.read_text(encoding="utf-8"))
        assert not [address for address in addresses if "//" in address]
        elsewhere = {"data:,", "98_next.html"}  # no icon; a chapter that is not there, which would be a page as well
        assert all((path.parent / address).exists() for address in {*addresses} - elsewhere)


# --------------------------------------------------------------------------------------------------- again, or not


def test_what_has_not_changed_is_not_executed_again(notebooks, site, monkeypatch):
    before = gallery._read(site / "en" / "99_small.ipynb").stamp
    monkeypatch.setattr(gallery, "execute", lambda *_: pytest.fail("executed"))
    assert again(notebooks, site) == (["en/99_small: as it was"], [])
    assert gallery._read(site / "en" / "99_small.ipynb").stamp == before


@pytest.mark.parametrize("options", [{"force": True}, {"commit": "fedcba9876543210"}], ids=str)
def test_force_and_another_commit_execute_again(notebooks, site, monkeypatch, options):
    executed = gallery._read(site / "en" / "99_small.ipynb").notebook
    monkeypatch.setattr(gallery, "execute", lambda *_: nbformat.from_dict(executed))
    assert again(notebooks, site, **options) == (["en/99_small: executed"], [])
    again(notebooks, site, force=True)


@pytest.mark.parametrize("change", [{"notebook": "another"}, {"device": "NVIDIA H200"}, {"dirty": True}], ids=str)
def test_another_notebook_or_device_or_changes_are_not_fresh(site, change):
    made = gallery._read(site / "en" / "99_small.ipynb").stamp
    assert replace(made, date="2030-01-01T00:00:00+00:00").is_fresh(made)
    assert not replace(made, **change).is_fresh(made)
    for unknown in ({"dirty": True}, {"commit": None}):
        assert not replace(made, **unknown).is_fresh(replace(made, **unknown)), "nobody knows which changes"


# ----------------------------------------------------------------------------------------------- what goes wrong


def test_a_cell_that_fails_is_named_and_leaves_the_old_page(notebooks, site, tmp_path, capsys):
    broken = tmp_path / "notebooks"
    build_small_chapter(broken, SMALL_CHAPTER.replace("3 + 4", "3 / 0"))
    before = page(site)
    options = ["--notebooks", str(broken), "--lang", "en", "--commit", COMMIT]
    assert gallery.main([str(site), *options]) == 1
    said = capsys.readouterr().err
    assert re.search(r"en/99_small, cell 1 \(\S+\): ZeroDivisionError: division by zero\n    3 / 0", said)
    assert page(site) == before
    assert not [path for path in site.rglob("*") if path.suffix == ".part"]


def test_a_page_is_written_whole_or_not_at_all(site, monkeypatch):
    before = page(site)
    monkeypatch.setattr(gallery.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gallery._write(site / "en" / "99_small.html", "half of it")
    assert page(site) == before


def test_a_folder_of_somebody_s_notebooks_is_left_alone(notebooks, tmp_path):
    own = tmp_path / "en" / "99_small.ipynb"
    own.parent.mkdir()
    own.write_bytes((notebooks / "en" / "99_small.ipynb").read_bytes())
    with pytest.raises(SourceError, match="not written by the gallery"):
        gallery.make(tmp_path, notebooks=notebooks)
    assert own.read_bytes() == (notebooks / "en" / "99_small.ipynb").read_bytes()


def test_an_unknown_chapter_says_which_there_are(notebooks, tmp_path, capsys):
    assert gallery.main([str(tmp_path), "--chapters", "42", "--notebooks", str(notebooks)]) == 1
    assert "no chapter 42" in capsys.readouterr().err
