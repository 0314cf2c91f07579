"""Write the notebooks of both languages, the learner's and the solved, from notebooks/src/NN_topic.py.

    python -m nanopd.workbook.builder                 build every chapter
    python -m nanopd.workbook.builder 01 02           build these
    python -m nanopd.workbook.builder --check         write nothing; fail where a build would change anything
    python -m nanopd.workbook.builder --stamp 01      the Chinese of chapter 01 has been reviewed against its English

The rules for a source are in the docstring of `nanopd.workbook`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat

from nanopd.workbook.source import (
    CELL_MARKER,
    LANGUAGES,
    Cell,
    SourceError,
    clear_solutions,
    hide_tests,
    read_chapter,
)

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
_STOPS, _CJK = "\u3000-\u303f\uff00-\uffef—…”’", "\u4e00-\u9fff"
LINE_BREAK_IN_CHINESE = re.compile(
    rf"(?<=[{_STOPS}{_CJK}])\n(?=[“‘（{_STOPS}{_CJK}])|(?<=[{_STOPS}])\n(?=[A-Za-z`]|\*\*[{_CJK}A-Za-z0-9])")


def build(cells: list[Cell], lang: str, solved: bool) -> str:
    """The text of one notebook. Ids come from the English, so the same cell has the same id in all four."""
    ids = Counter[str]()
    notebook = nbformat.v4.new_notebook()
    notebook.nbformat_minor = 5
    english = ""
    for cell in cells:
        english = cell.hash if cell.lang != "zh" else english
        if cell.lang not in (None, lang):
            continue
        cell_id = cell.nbgrader.get("grade_id") or f"{cell.kind}-{english}"
        ids[cell_id] += 1
        source = cell.source if solved or cell.kind == "markdown" else hide_tests(clear_solutions(cell.source))
        if cell.lang == "zh":
            source = LINE_BREAK_IN_CHINESE.sub("", source)  # Markdown would show it as a space
        new = nbformat.v4.new_code_cell if cell.kind == "code" else nbformat.v4.new_markdown_cell
        metadata = {key: value for key, value in cell.metadata.items() if key not in ("lang", "en_hash")}
        unique = cell_id if ids[cell_id] == 1 else f"{cell_id}-{ids[cell_id]}"
        notebook.cells.append(new(source, id=unique, metadata=metadata))
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "nanopd": {"lang": lang},
    }
    notebook.metadata["nanopd"]["built"] = _digest(notebook)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def _digest(notebook: nbformat.NotebookNode) -> str:
    return hashlib.sha256(json.dumps(notebook, sort_keys=True).encode()).hexdigest()[:16]


def is_as_built(path: Path) -> bool:
    """True unless somebody has worked in the notebook: then it is theirs, and is not written over."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        built = notebook["metadata"]["nanopd"].pop("built")
    except (KeyError, ValueError):
        return False
    return built == _digest(nbformat.from_dict(_joined(notebook)))


def _joined(notebook: dict[str, Any]) -> dict[str, Any]:
    """Sources as one string, as they are in memory; on disk they are lists of lines."""
    return {**notebook, "cells": [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"]]}


def targets(root: Path, stem: str) -> dict[Path, tuple[str, bool]]:
    """Where a chapter's notebooks go -> (language, solved)."""
    return {root / folder / lang / f"{stem}.ipynb": (lang, solved)
            for folder, solved in ((".", False), ("solutions", True)) for lang in LANGUAGES}


# ------------------------------------------------------------------------------------------------ translation


def stale(cells: list[Cell]) -> list[str]:
    """Chinese cells whose English has changed since a person reviewed them, or that nobody has."""
    return [f"{zh.where}: {'stale' if 'en_hash' in zh.metadata else 'not stamped'}: {zh.first_line}"
            for en, zh in pairwise(cells) if zh.lang == "zh" and zh.metadata.get("en_hash") != en.hash]


def stamp(path: Path) -> list[str]:
    """Write the hash of the English to each Chinese cell of a source; return those that were stale."""
    cells = read_chapter(path)
    hashes = iter([en.hash for en, zh in pairwise(cells) if zh.lang == "zh"])
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if CELL_MARKER.match(line) and 'lang="zh"' in line:
            lines[number] = re.sub(r' en_hash="[^"]*"', "", line).rstrip() + f' en_hash="{next(hashes)}"'
    path.write_text("\n".join(lines), encoding="utf-8")
    return stale(cells)


# ----------------------------------------------------------------------------------------------- command line


def sources(root: Path, chapters: list[str]) -> list[Path]:
    """The sources of the chapters asked for ("01" or "01_block_manager"); all of them where none is named."""
    found = sorted((root / "src").glob("[0-9][0-9]_*.py"))
    unknown = [name for name in chapters if not any(name in (path.stem, path.stem[:2]) for path in found)]
    if unknown:
        raise SourceError(f"no chapter {', '.join(unknown)} in {root / 'src'}; there are "
                          + (", ".join(path.stem for path in found) or "none"))
    return [path for path in found if not chapters or path.stem in chapters or path.stem[:2] in chapters]


def check(root: Path, chapters: list[str]) -> list[str]:
    """What differs from a fresh build, is stale, or has no source any more."""
    found = sources(root, chapters)
    faults = []
    for path in found:
        cells = read_chapter(path)
        faults += stale(cells)
        faults += [f"{target}: not what the builder writes; run python -m nanopd.workbook.builder {path.stem}"
                   for target, (lang, solved) in targets(root, path.stem).items()
                   if not target.exists() or target.read_text(encoding="utf-8") != build(cells, lang, solved)]
    stems = {path.stem for path in sources(root, [])}
    orphans = [path for lang in LANGUAGES for folder in (root / lang, root / "solutions" / lang)
               for path in sorted(folder.glob("*.ipynb")) if path.stem not in stems]
    return faults + [f"{path}: there is no source for it" for path in orphans]


def write(root: Path, chapters: list[str], force: bool = False) -> list[str]:
    """Build into the folders beside `src`. Returns the notebooks left alone because somebody has worked in them."""
    kept = []
    for path in sources(root, chapters):
        cells = read_chapter(path)
        for target, (lang, solved) in targets(root, path.stem).items():
            if target.exists() and not force and not is_as_built(target):
                kept.append(f"{target}: changed by hand, left as it is; --force writes over it")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(build(cells, lang, solved), encoding="utf-8", newline="\n")
        for warning in stale(cells):
            print(f"warning: {warning}")
    return kept


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nanopd.workbook.builder", description="Write the notebooks.")
    parser.add_argument("chapters", nargs="*", metavar="chapter", help='"01" or "01_block_manager"; default: all')
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a build would change a byte")
    parser.add_argument("--stamp", action="store_true", help="the Chinese of the named chapters has been reviewed")
    parser.add_argument("--force", action="store_true", help="write over notebooks that somebody has changed")
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="the folder that holds src/")
    options = parser.parse_args(argv)
    if options.stamp and (options.check or not options.chapters):
        parser.error("--stamp takes the chapters that were reviewed, and no --check")
    try:
        if options.stamp:
            for path in sources(options.notebooks, options.chapters):
                print("\n".join([f"{path}: stamped", *stamp(path)]))
            return 0
        faults = (check(options.notebooks, options.chapters) if options.check
                  else write(options.notebooks, options.chapters, options.force))
    except SourceError as error:
        faults = str(error).split("\n")
    print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
