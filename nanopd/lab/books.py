"""Where the built notebooks are, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path

from nanopd.lab import LabError

LANGUAGES = ("en", "zh")
PACKAGE = Path(__file__).parents[1]


def notebooks() -> Path:
    """The folder with en/, zh/ and solutions/: an installed package's own copy, or the checkout's notebooks/."""
    return PACKAGE / "_notebooks" if (PACKAGE / "_notebooks").is_dir() else PACKAGE.parent / "notebooks"


def chapters(lang: str, wanted: list[str], solved: bool = False) -> list[Path]:
    """The notebooks of the chapters wanted ("01" or "01_block_manager"), in order; all where none is named.

    Raises LabError for a language or a chapter that is not there.
    """
    if lang not in LANGUAGES:
        raise LabError(f"there is no language {lang!r}; there are {' and '.join(LANGUAGES)}")
    folder = notebooks() / "solutions" / lang if solved else notebooks() / lang
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    unknown = [name for name in wanted if not any(name in (path.stem, path.stem[:2]) for path in found)]
    if unknown or not found:
        raise LabError(f"there is no chapter {', '.join(unknown) or 'at all'} in {folder}; there are "
                       + (", ".join(path.stem for path in found) or "none"))
    return [path for path in found if not wanted or path.stem in wanted or path.stem[:2] in wanted]
