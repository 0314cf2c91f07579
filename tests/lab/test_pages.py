"""The pages for whoever teaches say what the notebooks have: exercises, points, sections."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nanopd.lab import books

ROOT = Path(__file__).parents[2]
CHAPTERS = [path.stem for path in books.chapters("en", [])]


def page(lang: str, name: str) -> str:
    return (ROOT / f"docs_{lang}" / name).read_text(encoding="utf-8")


def cells(chapter: str) -> list[dict]:
    return json.loads((books.notebooks() / "en" / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]


def exercises(chapter: str) -> dict[tuple[str, str], int]:
    """(number, name of what is checked) -> points, of each check in a chapter: {("1.4", "append_slot"): 2, ...}."""
    found = {}
    for cell in cells(chapter):
        call = re.search(r'nanopd\.check\("(\d\d)\.(\w+)", (\w+)', "".join(cell["source"]))
        if call and "points" in cell["metadata"].get("nbgrader", {}):
            found[f"{int(call[1])}.{call[2]}", call[3]] = cell["metadata"]["nbgrader"]["points"]
    return found


def sections(chapter: str) -> set[str]:
    text = "\n".join("".join(cell["source"]) for cell in cells(chapter) if cell["cell_type"] == "markdown")
    return set(re.findall(r"^## (\d+\.\d+) ", text, re.MULTILINE))


@pytest.mark.parametrize("lang, unit", [("en", r"points?"), ("zh", "分")])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_instructors_page_has_each_exercise_with_its_points(lang, unit, chapter):
    text = page(lang, "INSTRUCTOR.md")
    rows = re.findall(rf"^\| {chapter[:2]} .*\| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    expected = exercises(chapter)
    assert [tuple(map(int, row)) for row in rows] == [(len(expected), sum(expected.values()))]
    listed = re.findall(rf"^- \*\*({int(chapter[:2])}\.\w+) `(\w+)`\*\*(?:, |，)(\d+) {unit}", text, re.MULTILINE)
    assert {(number, name): int(points) for number, name, points in listed} == expected


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_lab_is_ninety_minutes_of_sections_that_exist(lang):
    known = set().union(*map(sections, CHAPTERS))
    labs = re.findall(r"(?:^\|.*\n)+", page(lang, "SYLLABUS.md"), re.MULTILINE)
    assert len(labs) == 3
    for lab in labs:
        rows = re.findall(r"^\| (\d+)-(\d+) \| (.*?) ?\| ", lab, re.MULTILINE)
        ends = [0, *(int(end) for _, end, _ in rows)]
        assert [int(start) for start, _, _ in rows] == ends[:-1] and ends[-1] == 90
        named = {section for _, _, names in rows for section in re.findall(r"\d\.\d", names)}
        assert named and named <= known
