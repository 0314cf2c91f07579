"""The figures that stand in README and docs, as SVG, from the recorded JSON.

    python -m nanopd.benchmark.report.figures        writes docs_en/figures and docs_zh/figures of a checkout
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nanopd.benchmark.report.page import drawings
from nanopd.benchmark.report.svg import to_svg
from nanopd.benchmark.results import RECORDED, write_whole
from nanopd.widgets.strings import LANGUAGES, current_language, set_language

SHOWN = ("tokens-mixed", "tokens-long", "interference", "lone-request", "transfer", "decode-scaling", "seed", "predicted",
         "crossover-simulated")


def figures_of(root: Path) -> dict[Path, str]:
    """What each file below `root` is to hold."""
    before, found = current_language(), {}
    try:
        for language in LANGUAGES:
            set_language(language)
            found |= {root / f"docs_{language}" / "figures" / f"{drawing.name}.svg": to_svg(drawing.draw())
                      for drawing in drawings([], RECORDED) if drawing.name in SHOWN}
    finally:
        set_language(before)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanopd.benchmark.report.figures",
                                     description="Draw the figures of README and docs from the recorded results.")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout; default: where you are")
    root = parser.parse_args(argv).root
    if not (root / "docs_en").is_dir():
        parser.error(f"{root.resolve()} is no checkout of nanoPD, it has no docs_en: go there, or name it with --root")
    for path, picture in figures_of(root).items():
        write_whole(path, picture)
        print(path)


if __name__ == "__main__":
    main()
