"""What decides and simulates is loaded in no time: numpy and scipy only where something is fitted, torch never."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "nanopd" / "cost_model").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", [*MODULES, "presets"])
def test_importing_is_light(module):
    code = f"import sys, nanopd.cost_model.{module}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "numpy", "scipy"} & set(ran.stdout.split())


def test_predicting_needs_no_numpy_either():
    code = ("import sys; from nanopd.cost_model.seed import seed_preset; seed_preset('h20').collocated_seconds(9, 9, 9, 9); "
            "sys.path.insert(0, 'tests'); from cost_model.models import MODEL; MODEL.request(5000, 9, 99, chunk_tokens=512); "
            "assert not {'numpy', 'scipy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
