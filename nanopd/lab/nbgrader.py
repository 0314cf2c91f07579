"""nbgrader's API, called in a process of its own: `python -m nanopd.lab.nbgrader STEP ASSIGNMENT [STUDENT]`.

`run` starts it in the course directory, so that nbgrader_config.py there counts and an interrupt reaches the kernel in which a
student's code runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from nanopd.lab import LabError

STEPS = {"release": ["generate_assignment"], "grade": ["autograde", "generate_feedback"]}
PATIENCE = 10.0  # seconds that nbgrader has to stop its kernel when interrupted
LINES = 12  # of its log, shown where it fails


class NbgraderError(LabError):
    """One of its steps failed."""


def need_nbgrader() -> None:
    if find_spec("nbgrader") is None:
        raise LabError("releasing and grading are done by nbgrader, which is not installed here: pip install 'nanopd[course]'")


def run(course: Path, step: str, *arguments: str) -> None:
    """Carry out a step ("release" an assignment, "grade" an assignment of a student). Raises NbgraderError with the last it said.

    Its log goes to a file and not to a pipe, which a process that a student's code leaves behind could keep open for ever.
    """
    programs = Path(sys.executable).parent  # nbgrader looks for alembic on PATH
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryFile() as log:
        # In a session of its own: Ctrl-C at the terminal comes to us alone, and goes on by _stop.
        process = subprocess.Popen([sys.executable, "-m", __name__, step, *arguments], cwd=course, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            failed = process.wait() != 0
        except BaseException:
            _stop(process)
            raise
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    if failed:
        raise NbgraderError(f"nbgrader could not {step} {' of '.join(arguments)}. The last it said:\n" + "\n".join(said[-LINES:]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asked, it takes its kernel with it; where it has to be killed, the kernel ends by itself a second later."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(step: str, *arguments: str) -> int:
    from nbgrader.apps import NbGrader, NbGraderAPI

    settings = NbGrader()
    settings.load_config_file()
    api = NbGraderAPI(config=settings.config)
    for name in STEPS[step]:
        result = getattr(api, name)(*arguments)
        if not result["success"]:
            print(result.get("log") or result["error"])  # the log ends with the cause, the error with nbgrader's own words on it
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
