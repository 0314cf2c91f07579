'''The workbook: what builds its notebooks (`builder`, `source`), what its cells call (`predict`, `check`), and what shows
them executed (`gallery`).

Writing a chapter
-----------------
A chapter is one file, notebooks/src/NN_topic.py, in jupytext's percent format. Comments above the first cell are
yours and go nowhere.

    # %% [markdown] lang="en"
    # ## 1.4 Four answers from one prompt
    # ...

    # %% [markdown] lang="zh"
    # ## 1.4 一个提示，四个回答
    # ...

    # %%
    guess = nanopd.predict("01.4", before_first_token=..., after_one_token=...)

    # %% nbgrader={"grade_id": "ex-1-4", "solution": true}
    def append_slot(pool, table, num_computed):
        """Return [(source, destination), ...] to copy before the next token is written."""
        ### BEGIN SOLUTION
        ...
        ### END SOLUTION

    # %% nbgrader={"grade_id": "check-1-4", "points": 2}
    nanopd.check("01.4", append_slot)

- Markdown: every `lang="en"` cell is followed at once by its `lang="zh"` twin. Without `lang`, it goes to both.
- Code: once, for both languages. At most 12 lines (25 with `nbgrader`), blank lines and comments not counted,
  nor what a solution or hidden-test region holds. Text that code shows comes from `nanopd.widgets.strings`.
- A solution cell has a `grade_id` and `"solution": true` and no points; what stands from `### BEGIN SOLUTION` to
  `### END SOLUTION` becomes nbgrader's stub in the learner's notebook. The check is a cell of its own with a
  `grade_id` and `points`, and may hold `### BEGIN HIDDEN TESTS`. The builder fills in the rest of the metadata.
- No cell without `nbgrader` may depend on what the learner wrote: go on with the engine's own. CI runs the
  learner's notebook as it is, and allows an error only in cells with `nbgrader`; each check cell must fail there.
- A cell that is meant to fail carries `tags=["raises-exception"]`. No other metadata is allowed.
- Leave guesses as `...`. Their names are shown to readers of both languages.
- The checks of exercise "01.4" live in `nanopd/workbook/checks/ch01.py`; see `nanopd.workbook.check`.

Then `python -m nanopd.workbook.builder 01` writes notebooks/{en,zh}/ and notebooks/solutions/{en,zh}/; commit
them. When you have compared the Chinese with the English, `--stamp 01` writes the hash of each English cell to its
Chinese twin (`en_hash="..."`); from then on `--check` names the twins whose English has changed.

The builder never writes over a notebook that somebody has worked in (unless given --force).

Running it
----------
Jupyter starts a kernel in its notebook's folder, and by that folder's name, `en` or `zh`, code knows what to
speak; NANOPD_LANG=zh says otherwise. A failed check raises under NANOPD_STRICT_CHECKS=1, which CI sets, and where
nbgrader grades or validates, for it takes a check cell without an error as solved.
'''
