"""The panels are loaded when they are first named, and none of these brings torch in."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import nanopd.widgets
assert not {"plotly", "ipywidgets", "torch"} & set(sys.modules), "import nanopd.widgets is not cheap"
light = ["BatchTimeline", "BlockMap", "ClusterTimeline", "KernelExplorer", "KernelTimes", "Roofline", "SweepExplorer", "TransferTimes"]
assert set(light) <= set(dir(nanopd.widgets))
for name in light:
    getattr(nanopd.widgets, name)
assert "torch" not in sys.modules
"""


def test_widgets_load_lazily_and_without_torch():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)
