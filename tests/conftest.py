"""For all tests: one thread for each process, no network, and little time spent on what libraries bring along."""

import gc
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is not yet
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# For the processes that tests start; for this one, pyproject.toml says it.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent / "quick"), os.environ.get("PYTHONPATH")]))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a shell's background jobs: tests of Ctrl-C would wait for ever
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each core takes a file at a time: whoever came to a long one last would work on alone.
LONGEST_FIRST = ("workbook/test_notebooks.py", "browser/", "paged_attention/test_csrc_compiles.py", "workers/", "engine/test_equality.py",
                 "test_commands.py", "engine/", "workbook/", "test_docs.py", "lab/", "server/", "tiny/", "cost_model/test_profiler.py",
                 "benchmark/", "test_demo.py")


def pytest_collection_modifyitems(items):
    """For `pytest --no-loadscope-reorder`, which keeps this order; without it the files with the most tests come first."""
    def rank(item):
        path = item.nodeid.partition("tests/")[2]
        return next((place for place, name in enumerate(LONGEST_FIRST) if path.startswith(name)), len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.fixture(autouse=True, scope="module")
def only_young_objects_are_looked_at():
    """Every engine that is shut down collects garbage, and would look at the million objects of the libraries each time."""
    gc.collect()
    gc.freeze()
