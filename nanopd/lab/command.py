"""`nanopd lab`: what a course needs, at the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from nanopd.terminal import plain_errors

app = typer.Typer(help="Sets of notebooks for learners, and assignments and marks for a course.", no_args_is_help=True)

Lang = Annotated[Literal["en", "zh"], typer.Option(help="English or Chinese.")]
Chapters = Annotated[list[str] | None, typer.Option(help="Only these: --chapters 01 06. Default: all.")]
MoreChapters = Annotated[list[str] | None, typer.Argument(hidden=True)]  # an option takes one value; the others come here


@app.command()
def new(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it is not there.")],
    more: MoreChapters = None,
    lang: Lang = "en",
    chapters: Chapters = None,
) -> None:
    """Copy the notebooks into a directory to work in. Never writes over a file."""
    from nanopd.lab.new import copy_set

    with plain_errors():
        written = copy_set(directory, lang, _together(chapters, more))
    typer.echo(f"{len(written) - 1} notebooks in {directory / lang}. How to start: {directory / 'README.md'}")


@app.command()
def release(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A course directory; made if it is not there.")],
    more: MoreChapters = None,
    lang: Lang = "en",
    chapters: Chapters = None,
) -> None:
    """Make nbgrader assignments of chapters, one of each. What students get is then in DIR/release."""
    from nanopd.lab import course

    with plain_errors():
        for assignment, is_new in course.release(directory, lang, _together(chapters, more)):
            path = directory / "release" / assignment
            typer.echo(f"released: {path}" if is_new else
                       f"left as it is: {path} was released before; move it away to release it anew")


@app.command()
def grade(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A course directory that `release` made.")],
    assignment: Annotated[str | None, typer.Argument(help="01_block_manager_en, or 01 for short. Default: all.")] = None,
) -> None:
    """Run and mark DIR/submitted/STUDENT/ASSIGNMENT. This runs students' code as you: do it in a container or a virtual machine.

    Writes DIR/marks_ASSIGNMENT.csv and, as pages to give back, DIR/feedback. Fails where a submission could not be marked.
    """
    from nanopd.lab import grading, nbgrader

    unmarked = 0
    with plain_errors():
        nbgrader.need_nbgrader()
        names = [grading.find_assignment(directory, assignment)] if assignment else grading.handed_in(directory)
        for name in names:
            with _progress(name) as progress:
                path, rows = grading.grade(directory, name, progress)
            for row in rows:
                if row["note"]:
                    typer.secho(f"{row['student']}: not marked: {row['note']}", fg="red", err=True)
            without = sum(bool(row["note"]) for row in rows)
            typer.echo(f"{name}: {len(rows) - without} of {len(rows)} marked, in {path}")
            unmarked += without
    raise typer.Exit(1 if unmarked else 0)


def _together(chapters: list[str] | None, more: list[str] | None) -> list[str]:
    return [*(chapters or []), *(more or [])]


@contextmanager
def _progress(assignment: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, which goes as it is done or interrupted; elsewhere a line for each student."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda student, done, total: typer.echo(f"{assignment}: {done} of {total} done" + (student and f", next {student}"),
                                                      err=True)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(assignment, total=None)
        yield lambda student, done, total: bar.update(task, description=f"{assignment} {student}", completed=done, total=total)
