"""`python -m nanopd` is the `nanopd` command."""

from nanopd.cli import app

if __name__ == "__main__":
    app()
