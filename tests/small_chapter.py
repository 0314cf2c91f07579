"""A chapter for the tests of the gallery: a panel that a later cell changes, one that is played, a plain figure, an exercise."""

from __future__ import annotations

from pathlib import Path

from solved import APPEND_SLOT_CELL

from nanopd.workbook import builder

SMALL_CHAPTER = '''# %%
3 + 4

# %% [markdown] lang="en"
# # 99 A small chapter
#
# Go on in [the next](98_next.ipynb).

# %% [markdown] lang="zh"
# # 99 小小一章
#
# 接着看[下一章](98_next.ipynb)。

# %%
import nanopd
import plotly.graph_objects as go
from nanopd import widgets
from nanopd.block_manager import BlockSpaceManager
from nanopd.core import Sequence

roof = widgets.Roofline(1e12, 1e9)
roof

# %%
roof.add_point("after", 1e9, 1e8, 1.0)
for line in range(300):
    print("one of many lines", line, flush=True)

# %%
manager, sequence = BlockSpaceManager(num_blocks=32, block_size=4), Sequence(range(10))
manager.allocate(sequence)
widgets.BlockMap(manager, watch=[sequence], actions=[("give back", lambda: manager.free(sequence))])

# %%
go.Figure(go.Bar(y=[3, 1, 2]))

# %% nbgrader={"grade_id": "ex", "solution": true}
''' + APPEND_SLOT_CELL + '''
# %% nbgrader={"grade_id": "check", "points": 1}
nanopd.check("01.4", append_slot)

# %% tags=["raises-exception"]
1 / 0
'''


def build_small_chapter(root: Path, text: str = SMALL_CHAPTER) -> None:
    """Its notebooks below `root`, which is made."""
    (root / "src").mkdir(parents=True)
    (root / "src" / "99_small.py").write_text(text, encoding="utf-8")
    assert builder.main(["--notebooks", str(root)]) == 0
