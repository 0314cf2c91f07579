"""Tables and progress for the terminal: with rich where it is installed, as plain columns elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from nanopd.benchmark.results import Report

WIDE = 160  # characters of a line, where nobody's screen limits them


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def show(report: Report) -> None:
    """The rows, a table for each set of columns, then the summary."""
    print(f"\nnanopd bench {report.bench}: {report.source}")
    if report.ceilings:
        print(_cell(report.ceilings))
    for rows in _groups(report.rows, key=lambda row: (row.get("op"), *row)):
        rows = _by_kernel(rows) if "kernel" in rows[0] else rows
        same = {name: value for name, value in rows[0].items() if len(rows) > 1 and all(row[name] == value for row in rows)}
        if same:
            print(f"\n{_cell(same)}")
        columns = [name for name in rows[0] if name not in same]
        print_table(columns, [[_cell(row.get(name)) for name in columns] for row in rows])
    for name, value in report.summary.items():
        print(f"{name}: {_cell(value)}")
    for note in report.notes:
        print(f"({note})")


def _by_kernel(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each case, with each kernel's microseconds and share of the ceiling side by side."""
    lines = []
    for same_case in _groups(rows, key=_case):
        line = dict(_case(same_case[0]))
        for row in same_case:
            line[f"{row['kernel']} us"] = row["us"]
            if "share" in row:
                line[f"{row['kernel']} share"] = row["share"]
        lines.append(line)
    return lines


def _case(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What was measured: the columns before the kernel's name."""
    columns = list(row)
    return tuple((name, row[name]) for name in columns[: columns.index("kernel")])


def _groups(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> list[list[dict[str, Any]]]:
    """Rows of equal key together, in the order of their first."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(part)}" for key, part in value.items())
    return "-" if value is None else str(value)


def print_table(columns: list[str], cells: list[list[str]]) -> None:
    """Rows of texts under their columns' names."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_columns([columns, *cells])
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in cells:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _print_columns(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
