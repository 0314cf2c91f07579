"""What the system says of processes, for tests that start some."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def _stat(pid):
    """Fields of /proc/PID/stat from the state on; None where there is no such process. A thread is PID/task/ID."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def children(pid=None):
    """Process ids of the children, zombies included."""
    parent = str(pid or os.getpid())
    return sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit() and (_stat(entry) or ["", ""])[1] == parent)


def is_alive(pid):
    """There is such a process, and it is no zombie."""
    return (_stat(pid) or "Z")[0] != "Z"


def stop(pid):
    """With all of its threads: the signal alone lets the others go on until one of them has taken it."""
    os.kill(pid, signal.SIGSTOP)
    tasks = [f"{pid}/task/{task}" for task in os.listdir(f"/proc/{pid}/task")]
    assert wait_until(lambda: all((_stat(task) or "Z")[0] in "TZ" for task in tasks))


def cpu_seconds(pid):
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait_until(condition, timeout=90.0, pause=0.01):
    """Whether it came true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def what_is_held():
    """What a process could leave behind: children, open files, shared memory with a name."""
    return children(), len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))
