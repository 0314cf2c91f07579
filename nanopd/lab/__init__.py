"""What a course needs: a learner's set of notebooks, nbgrader assignments made of them, and their marks.

`books` finds the built notebooks, `new` copies a set, `course` releases assignments, `submissions` looks at what was
handed in, and `grading` has nbgrader grade it.
"""


class LabError(ValueError):
    """Something the user can put right. The message says what was wrong, what is allowed and what to do."""
