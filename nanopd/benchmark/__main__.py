"""`python -m nanopd.benchmark` is `nanopd bench`, for machines without typer."""

import sys

from nanopd.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
