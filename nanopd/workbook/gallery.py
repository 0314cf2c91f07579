"""The gallery: chapters executed on this machine, as static pages with figures, each stamped with device, commit and date.

    python -m nanopd.workbook.gallery OUT                          all chapters, both languages
    python -m nanopd.workbook.gallery OUT --chapters 01 06 --lang zh

Solution notebooks are executed in their folder. OUT/<lang>/NN_topic.ipynb is what came of one, with its stamp; the pages beside
them and OUT/index.html are written from those. A chapter whose notebook, commit and device are still those of its stamp is not
executed again. Pages need nothing from the network: plotly's code lies in OUT/plotly.min.js.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import plotly
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from nanopd.widgets.strings import STRINGS
from nanopd.workbook.builder import NOTEBOOKS
from nanopd.workbook.source import LANGUAGES, SourceError
from nanopd.workbook.stills import PLACE, PLOTLY, STILLS

PACKAGE_ROOT = Path(__file__).parents[2]
STYLE = Path(__file__).with_name("gallery.css")
CELL_SECONDS = 900
STATIC = ["text/html", "image/svg+xml", "image/png", "text/plain"]  # what needs no code but plotly's in the page
HTML_LANG = {"en": "en", "zh": "zh-CN"}
FIRST_CELL = "from nanopd.workbook.stills import Stills as _Stills; _stills = _Stills()"
LAST_CELL = "_stills.publish()"

Progress = Callable[[str, float], None]  # what is being done, and the share of this chapter's cells that are done


class ChapterFailed(Exception):
    """A chapter that did not run to its end. The message names it, the cell, and what happened there."""


@dataclass(frozen=True)
class Stamp:
    """What a page was made from, where and when."""

    chapter: str  # "01_block_manager"
    lang: str
    notebook: str  # digest of the notebook that was executed
    device: str  # "2 × NVIDIA H200", or the CPU's name
    commit: str | None  # None where it was not executed from a checkout
    dirty: bool | None  # whether the checkout differed from the commit
    date: str  # ISO 8601, UTC

    def is_fresh(self, made: Stamp) -> bool:
        """Whether executing it now would use just what `made` was made with: never, where no commit tells what that is."""
        return self.commit is not None and not self.dirty and replace(self, date=made.date) == made

    def sentence(self) -> str:
        changes = _say("gallery.with_changes", self.lang) if self.dirty else ""
        commit = f"{self.commit[:7]}{changes}" if self.commit else _say("gallery.no_commit", self.lang)
        return _say("gallery.stamp", self.lang, device=self.device, commit=commit, date=self.date[:10])


@dataclass(frozen=True)
class Page:
    """A chapter in one language, executed."""

    stamp: Stamp
    notebook: NotebookNode

    @property
    def title(self) -> str:
        first = next(cell.source for cell in self.notebook.cells if cell.cell_type == "markdown")
        return first.split("\n")[0].lstrip("# ")

    @property
    def address(self) -> str:
        return f"{self.stamp.lang}/{self.stamp.chapter}.html"


def make(out: Path, chapters: Sequence[str] = (), languages: Sequence[str] = LANGUAGES, force: bool = False,
         commit: str | None = None, notebooks: Path = NOTEBOOKS, progress: Progress = lambda text, share: None,
         say: Callable[[str], None] = print) -> list[str]:
    """Execute what is not there or no longer fresh, and write the site. Returns what failed; the others' pages are written.

    `chapters` as "01" or "01_block_manager"; none: all of them. `commit`: to be recorded, where this copy has no .git.
    Raises SourceError for a chapter that there is none of.
    """
    stems, failures = _chapters(notebooks, chapters), []
    device, (here, dirty) = device_name(), ((commit, None) if commit else _commit())
    try:
        for stem, lang in [(stem, lang) for stem in stems for lang in languages]:
            source, target, name = notebooks / "solutions" / lang / f"{stem}.ipynb", out / lang / f"{stem}.ipynb", f"{lang}/{stem}"
            stamp = Stamp(stem, lang, hashlib.sha256(source.read_bytes()).hexdigest()[:16], device, here, dirty,
                          datetime.now(timezone.utc).isoformat(timespec="seconds"))
            if not force and target.exists() and stamp.is_fresh(_read(target).stamp):
                say(f"{name}: as it was")
                continue
            try:
                notebook = execute(source, lang, partial(progress, name))
            except ChapterFailed as failure:
                failures.append(str(failure))
                say(f"{name}: failed")
                continue
            notebook.metadata["nanopd"] = {"stamp": asdict(stamp)}
            _write(target, nbformat.writes(notebook) + "\n")
            say(f"{name}: executed")
    finally:
        write_site(out)
    return failures


def _chapters(notebooks: Path, wanted: Sequence[str]) -> list[str]:
    """Stems, such as "01_block_manager". From what was built: an installed package has no sources."""
    stems = sorted({path.stem for path in (notebooks / "solutions").glob("*/[0-9][0-9]_*.ipynb")})
    unknown = [name for name in wanted if not any(name in (stem, stem[:2]) for stem in stems)]
    if unknown or not stems:
        raise SourceError(f"no chapter {', '.join(unknown) or 'at all'} in {notebooks / 'solutions'}; there are "
                          + (", ".join(stems) or "none"))
    return [stem for stem in stems if not wanted or stem in wanted or stem[:2] in wanted]


def device_name() -> str:
    """What chapters run on here: the GPUs, or else the CPU."""
    import torch

    from nanopd.benchmark.environment import device_facts

    facts = device_facts()
    if facts["kind"] == "cpu":
        return facts["cpu"]
    count = torch.cuda.device_count()
    return f"{count} × {facts['name']}" if count > 1 else facts["name"]


def _commit() -> tuple[str | None, bool | None]:
    from nanopd.benchmark.environment import commit

    return commit()


# --------------------------------------------------------------------------------------------------- executing


def execute(path: Path, lang: str, progress: Callable[[float], None] = lambda share: None) -> NotebookNode:
    """The notebook with its outputs, panels as plotly's JSON. Raises ChapterFailed at the first error."""
    notebook = nbformat.read(path, as_version=4)
    ours = notebook.cells
    notebook.cells = [nbformat.v4.new_code_cell(FIRST_CELL), *ours, nbformat.v4.new_code_cell(LAST_CELL)]
    last = len(ours)
    at = 0

    def begin(cell: NotebookNode, cell_index: int) -> None:
        nonlocal at
        at = cell_index
        progress(cell_index / last)

    client = nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", on_cell_start=begin,
                                   coalesce_streams=True, store_widget_state=False)
    try:
        client.execute(cwd=str(path.parent), env=_environment(lang))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ChapterFailed(_complaint(path.stem, lang, notebook.cells[at], at, error)) from error
    *_, stills = notebook.cells
    notebook.cells = ours
    figures = next(output.data[STILLS] for output in stills.outputs if output.output_type == "display_data")
    for output in (output for cell in ours for output in cell.get("outputs", ()) if PLACE in output.get("data", ())):
        output.data[PLOTLY] = figures[output.data.pop(PLACE)]
    return notebook


def _environment(lang: str) -> dict[str, str]:
    """A kernel finds this package, speaks the language, fails where a check fails, and leaves plotly's code out of its outputs."""
    search_path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"NANOPD_LANG": lang, "NANOPD_STRICT_CHECKS": "1", "PLOTLY_RENDERER": "plotly_mimetype",
                         "PYTHONPATH": search_path}


def _complaint(chapter: str, lang: str, cell: NotebookNode, index: int, error: Exception) -> str:
    if isinstance(error, CellExecutionError):
        what = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        what = f"it took more than {CELL_SECONDS} s"
    else:
        what = "the kernel died"
    code = "\n".join(f"    {line}" for line in cell.source.split("\n"))
    return f"{lang}/{chapter}, cell {index} ({cell.id}): {what}\n{code}"


# ----------------------------------------------------------------------------------------------------- writing


def write_site(out: Path) -> None:
    """A page for each executed notebook in `out`, and the index of them."""
    pages = sorted((_read(path) for lang in LANGUAGES for path in (out / lang).glob("*.ipynb")),
                   key=lambda page: (page.stamp.chapter, page.stamp.lang))
    if not pages:
        return
    _write(out / "plotly.min.js", plotly.offline.get_plotlyjs())
    _write(out / "gallery.css", STYLE.read_text(encoding="utf-8") + HtmlFormatter(style="default").get_style_defs(".highlight"))
    for page in pages:
        _write(out / page.address, _html_of(page, pages))
    _write(out / "index.html", _index_of(pages))


def _read(path: Path) -> Page:
    notebook = nbformat.read(path, as_version=4)
    try:
        return Page(Stamp(**notebook.metadata["nanopd"]["stamp"]), notebook)
    except (KeyError, TypeError):
        raise SourceError(f"{path} was not written by the gallery: name an empty folder") from None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)


def _html_of(page: Page, pages: list[Page]) -> str:
    lang = page.stamp.lang
    same_language = [other for other in pages if other.stamp.lang == lang]
    at = same_language.index(page)
    twin = next((other for other in pages if other.stamp.chapter == page.stamp.chapter and other.stamp.lang != lang), None)
    links = [_link("../index.html", _say("gallery.index", lang))]
    links += [_link(f"../{twin.address}", _say("gallery.language", twin.stamp.lang))] if twin else []
    nearby = [_link(f"../{other.address}", f"{arrow} {other.title}") for arrow, other in
              [("←", at and same_language[at - 1]), ("→", at + 1 < len(same_language) and same_language[at + 1])] if other]
    return _document(
        page.title, lang, "../",
        f'<nav>{" · ".join(links)}</nav>\n<p class="stamp">{escape(page.stamp.sentence())}<br>'
        f'{escape(_say("gallery.solved", lang))}</p>\n<main>{_body_of(page)}</main>\n<nav>{" · ".join(nearby)}</nav>',
        scripts='<script src="../plotly.min.js"></script>')


def _body_of(page: Page) -> str:
    """The cells as HTML, their figures drawn by plotly."""
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True,
                            config=Config({"NbConvertBase": {"display_data_priority": STATIC}}))
    notebook = nbformat.from_dict(page.notebook)
    for index, cell in enumerate(notebook.cells):
        for number, output in enumerate(cell.get("outputs", ())):
            if PLOTLY in output.get("data", ()):
                output.data["text/html"] = _drawn(output.data[PLOTLY], f"figure-{index}-{number}")
    body, _ = exporter.from_notebook_node(notebook)
    return re.sub(r'(<a href="(?:\d\d_\w+))\.ipynb', r"\1.html", body)  # chapters that point at each other


def _drawn(figure: dict[str, Any], name: str) -> str:
    return plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, validate=False, div_id=name,
                             config={"responsive": True, "displayModeBar": False})


def _index_of(pages: list[Page]) -> str:
    """A section for each language, a line for each chapter: its title, and where and when it ran."""
    sections = []
    for lang in LANGUAGES:
        rows = [f'<tr><td>{_link(page.address, page.title)}</td><td class="stamp">{escape(page.stamp.sentence())}</td></tr>'
                for page in pages if page.stamp.lang == lang]
        if rows:
            sections.append(f'<section lang="{HTML_LANG[lang]}"><h2>{escape(_say("gallery.title", lang))}</h2>\n'
                            f'<p>{escape(_say("gallery.about", lang))}</p>\n<table>\n' + "\n".join(rows) + "\n</table></section>")
    return _document("nanoPD", "en", "", "<h1>nanoPD</h1>\n" + "\n".join(sections))


def _document(title: str, lang: str, root: str, body: str, scripts: str = "") -> str:
    return f"""<!doctype html>
<html lang="{HTML_LANG[lang]}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{root}gallery.css">
{scripts}
</head>
<body>
{body}
</body>
</html>
"""


def _link(address: str, text: str) -> str:
    return f'<a href="{escape(address)}">{escape(text)}</a>'


def _say(key: str, lang: str, **fields: object) -> str:
    """In the page's language, not in that of whoever makes it."""
    return STRINGS[key][LANGUAGES.index(lang)].format(**fields)


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nanopd.workbook.gallery",
                                     description="Execute chapters here and write them as static pages.")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--chapters", nargs="+", metavar="NN", default=[], help='"01" or "01_block_manager"; default: all')
    parser.add_argument("--lang", choices=LANGUAGES, help="default: both")
    parser.add_argument("--force", action="store_true", help="execute also what has not changed")
    parser.add_argument("--commit", help="the commit to record, where this copy has no .git")
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="the folder that holds solutions/")
    options = parser.parse_args(argv)
    return run(options.out, options.chapters, (options.lang,) if options.lang else LANGUAGES, options.force, options.commit,
               options.notebooks)


def run(out: Path, chapters: Sequence[str] = (), languages: Sequence[str] = LANGUAGES, force: bool = False, commit: str | None = None,
        notebooks: Path = NOTEBOOKS) -> int:
    """`make` with its progress on the terminal. Returns the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False)
    try:
        with Bar(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
            task = bar.add_task("looking for what is there", total=1.0)
            failures = make(out, chapters, languages, force, commit, notebooks,
                            lambda text, share: bar.update(task, description=text, completed=share), console.print)
    except SourceError as error:
        failures = [str(error)]
    except KeyboardInterrupt:
        console.print("stopped; the pages of the chapters that had ended are written")
        return 130
    for failure in failures:
        console.print(f"nanopd: {failure}", markup=False)
    if not failures:
        console.print(f"written to {out / 'index.html'}", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
