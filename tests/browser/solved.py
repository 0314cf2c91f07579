"""What the checks of a notebook said that was run in the browser, where they show and do not raise."""

from __future__ import annotations

from typing import Any

VERDICTS = """() => [...jupyterapp.shell.currentWidget.content.model.cells].flatMap(cell => cell.toJSON().outputs ?? [])
    .map(output => [output.data?.['text/html'] ?? ''].flat().join('')).filter(html => html.includes("class='nanopd-check'"))"""


def assert_solved(notebook: Any) -> None:
    """All checks passed, and there were some."""
    verdicts = notebook.page.evaluate(VERDICTS)
    assert verdicts, "no check has said anything"
    assert [verdict for verdict in verdicts if "✓" not in verdict] == []
