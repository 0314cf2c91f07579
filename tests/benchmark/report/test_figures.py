"""The figures in README and docs are those of the recorded results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanopd.benchmark.report.figures import SHOWN, figures_of, main
from nanopd.benchmark.results import load

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *ROOT.glob("docs_*/*.md")]


def shown_on(page: Path) -> list[Path]:
    return [(page.parent / target).resolve() for target in re.findall(r"!\[[^\]]+\]\(([^)]+\.svg)\)", page.read_text(encoding="utf-8"))]


def test_they_are_what_the_command_writes():
    """From the JSON that is committed: after new results, or another drawing, run `python -m nanopd.benchmark.report.figures`."""
    wanted = figures_of(ROOT)
    assert len(wanted) == 2 * len(SHOWN)
    assert set(wanted) == set(ROOT.glob("docs_*/figures/*"))
    for path, picture in wanted.items():
        assert path.read_text(encoding="utf-8") == picture, f"{path.relative_to(ROOT)}: draw it again"


def test_each_is_small_says_where_it_comes_from_and_is_shown_on_a_page_in_its_language():
    shown = {path for page in PAGES for path in shown_on(page)}
    commits = {load(bench).commit[:7] for bench in ("routing", "cluster", "decode", "study", "transfer")}
    for path in ROOT.glob("docs_*/figures/*"):
        text = path.read_text(encoding="utf-8")
        assert len(text) < 60_000 and any(commit in text for commit in commits) and "2026-" in text
        assert "NVIDIA H200" in text or "simulated" in path.stem
        assert path in shown, f"{path.relative_to(ROOT)} is on no page"
        assert bool(re.search("[\u4e00-\u9fff]", text)) == (path.parents[1].name == "docs_zh")


def test_pages_show_figures_of_their_own_language():
    for page in PAGES:
        assert {path.parents[1].name for path in shown_on(page)} <= {"docs_zh" if page.parent.name == "docs_zh" else "docs_en"}, page


def test_elsewhere_it_says_where_to_go(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--root", str(tmp_path)])
    assert "is no checkout of nanoPD" in capsys.readouterr().err and not list(tmp_path.iterdir())
