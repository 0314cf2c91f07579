"""What the commands share at the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def plain_errors() -> Iterator[None]:
    """What the user can put right is said in one line: bad options and requests, models that aren't there."""
    try:
        yield
    except (ValueError, OSError) as error:  # ConfigError, InvalidRequest, ModelError and LabError are ValueErrors
        typer.secho(f"nanopd: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.secho("nanopd: interrupted", err=True)
        raise typer.Exit(130) from None
