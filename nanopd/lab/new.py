"""A learner's own set: the notebooks of one language and a page that says how to start."""

from __future__ import annotations

import os
from pathlib import Path

from nanopd.lab import LabError
from nanopd.lab.books import chapters

PAGES = Path(__file__).parent / "pages"


def copy_set(folder: Path, lang: str, wanted: list[str]) -> list[Path]:
    """Write README.md and LANG/NN_topic.ipynb into `folder`, which may be there already. Returns what was written.

    Raises LabError, having changed nothing, where a file is there already. An interrupt leaves nothing behind.
    """
    originals = {folder / lang / path.name: path for path in chapters(lang, wanted)}
    originals[folder / "README.md"] = PAGES / f"readme_{lang}.md"
    there = [str(path) for path in originals if os.path.lexists(path)]
    if there:
        raise LabError(f"there already, and nothing was changed: {', '.join(there)}. Name another directory, or move these away")
    made = [path for path in (folder / lang, folder, *folder.parents) if not path.exists()]
    try:
        (folder / lang).mkdir(parents=True, exist_ok=True)
        for path, original in originals.items():
            path.write_bytes(original.read_bytes())
    except BaseException:
        for path in originals:
            path.unlink(missing_ok=True)
        for empty in made:
            if empty.is_dir():
                empty.rmdir()
        raise
    return list(originals)
