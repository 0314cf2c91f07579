"""From the name of a model to the place where it lies. No torch."""

from __future__ import annotations

import re
from pathlib import Path

PRESETS = Path(__file__).parent / "presets"
TINY = Path(__file__).parent.parent / "tiny" / "weights"

# Nothing else is ever fetched from the hub: no pickles, no code, no subfolders.
_CONFIG_FILES = ["*.json", "*.jinja", "merges.txt", "tokenizer.model"]
_WEIGHT_FILES = ["model*.safetensors"]


class ModelError(ValueError):
    """A model can't be found, read or supported. The message says what was wrong and what to do."""


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def resolve_model(model: str | Path, weights: bool = True) -> Path:
    """The directory of a checkpoint, or the JSON file of a preset.

    `model` is "tiny" (the embedded model), a preset's name, a directory or a hub name ("Qwen/Qwen3-8B"),
    tried in this order; a Path is a directory. The network is used for hub names only; `weights=False` fetches
    the configuration and the tokenizer alone.

    Raises:
        ModelError: nothing is there under this name, or it could not be fetched.
    """
    name = str(model)
    if name == "tiny" and isinstance(model, str):
        return _tiny()
    if name in preset_names() and isinstance(model, str):
        return PRESETS / f"{name}.json"
    if name and Path(name).expanduser().is_dir():  # Path("") would be the working directory
        return Path(name).expanduser()
    if isinstance(model, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise ModelError(f"no model {name!r}: it is not a directory on this machine, and not a preset "
                         f"(tiny, {', '.join(preset_names())}); a hub name looks like 'Qwen/Qwen3-8B'")
    return _fetch(name, weights)


def _tiny() -> Path:
    if not (TINY / "config.json").is_file():
        raise ModelError(f"the embedded model 'tiny' is missing from this installation (looked in {TINY}): "
                         "install nanopd again")
    return TINY


def _fetch(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _CONFIG_FILES + (_WEIGHT_FILES if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # offline, no such repository, gated, disk full: the cure is the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"no directory {name!r} on this machine, and the Hugging Face hub did not give it: {reason}. "
            "Check the name and the connection (for a gated model, log in with `hf auth login`), or give a "
            f"local directory; without network there are the presets: tiny, {', '.join(preset_names())}"
        ) from error
