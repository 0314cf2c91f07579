"""What a learner sees from `predict` and `check`."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from solved import append_slot

import nanopd
from nanopd.widgets.strings import set_language
from nanopd.workbook.check import CheckFailed, UnknownExercise, check
from nanopd.workbook.predict import predict


@pytest.fixture(autouse=True, params=["en", "zh"])
def language(request, monkeypatch):
    for variable in ("NANOPD_STRICT_CHECKS", "NBGRADER_EXECUTION"):
        monkeypatch.delenv(variable, raising=False)
    set_language(request.param)
    yield request.param
    set_language(None)


# -------------------------------------------------------------------------------------------------- predict


def test_a_guess_is_noted_and_revealed(capsys):
    guess = predict("01.4", before=252, after=66)
    comparison = guess.reveal(63, 66)
    assert comparison == {"before": {"guess": 252, "measured": 63, "ratio": 4.0},
                          "after": {"guess": 66, "measured": 66, "ratio": 1.0}}
    printed = capsys.readouterr().out
    assert "252" in printed and "63" in printed and "01.4" in printed


def test_a_guess_left_out_earns_a_nudge_and_does_not_stop(capsys, language):
    guess = predict("01.4", before=..., after=...)
    nudge = capsys.readouterr().out
    assert "before" in nudge and "after" in nudge
    assert ("no guess yet" if language == "en" else "还没有猜") in nudge
    assert guess.reveal(63, 66)["before"] == {"guess": ..., "measured": 63, "ratio": None}


def test_values_may_be_named():
    guess = predict("01.4", before=1, after=2)
    assert guess.reveal(after=2, before=1) == guess.reveal(1, after=2) == guess.reveal(1, 2)


@pytest.mark.parametrize(("values", "named"), [((1,), {}), ((1, 2, 3), {}), ((1, 2), {"before": 1}), ((), {"before": 1, "x": 2})])
def test_measured_values_must_match_the_guesses(values, named):
    with pytest.raises(TypeError, match="one measured value for each of before, after"):
        predict("01.4", before=1, after=2).reveal(*values, **named)


def test_a_prediction_without_a_guess_is_refused():
    with pytest.raises(TypeError, match="at least one named guess"):
        predict("01.4")


@pytest.mark.parametrize(("guess", "measured", "verdict"), [
    (63, 63, "spot on"),
    (95, 100, "within 5%"),
    (105.1, 100, "within 6%"),
    (150, 100, "50% too high"),
    (60, 100, "40% too low"),
    (400, 100, "4 times what was measured"),
    (25, 100, "measured 4 times as much"),
    (3, 0, "off by 3"),
    (-3, 5, "off by 8"),
    ("decode", "decode", "spot on"),
    ("prefill", "decode", "not this time"),
    (True, False, "not this time"),
    (math.inf, 5, "times what was measured"),
])
def test_verdicts(capsys, language, guess, measured, verdict):
    predict("00.1", x=guess).reveal(measured)
    if language == "en":
        assert verdict in capsys.readouterr().out


def test_numbers_of_torch_and_numpy_are_numbers(capsys):
    numpy = pytest.importorskip("numpy")
    assert predict("00.1", x=2).reveal(numpy.float32(1.0))["x"]["ratio"] == 2


def test_reveal_echoes_nothing_as_a_cells_last_line():
    assert predict("00.1", x=2).reveal(1)._ipython_display_() is None


# ---------------------------------------------------------------------------------------------------- check


def forgets_to_release(pool, table, num_computed):
    copies = append_slot(pool, table, num_computed)
    for source, _ in copies:
        pool.share(source)
    return copies


def drops_the_copies(pool, table, num_computed):
    append_slot(pool, table, num_computed)
    return []


def writes_anyway(pool, table, num_computed):
    if num_computed == len(table) * pool.block_size:
        table.append(pool.allocate())
    return []


def copies_always(pool, table, num_computed):
    copies = append_slot(pool, table, num_computed)
    if not copies and num_computed % pool.block_size:
        last = table[-1]
        table[-1] = pool.allocate()
        pool.release(last)
        return [(last, table[-1])]
    return copies


def returns_a_dict(pool, table, num_computed):
    return dict(append_slot(pool, table, num_computed))


def crashes(pool, table, num_computed):
    return table[num_computed]


def is_a_stub(pool, table, num_computed):
    # YOUR CODE HERE
    raise NotImplementedError()


def test_the_solution_passes(language):
    result = check("01.4", append_slot)
    assert result and result.passed and not result.failures and result.hint == ""
    assert "✓" in repr(result) and "✓" in result._repr_html_()
    assert ("all checks pass" if language == "en" else "全部通过") in repr(result)


@pytest.mark.parametrize("theirs", [forgets_to_release, drops_the_copies, writes_anyway, copies_always, returns_a_dict, crashes])
def test_a_wrong_one_gets_an_answer_and_a_hint(theirs, language):
    result = check("01.4", theirs)
    assert not result and result.failures and result.hint
    assert result.failures[0].message in repr(result).replace("\n    ", "\n")
    assert result.hint in repr(result)
    assert language == "en" or any("\u4e00" <= character <= "\u9fff" for character in result.hint)


def test_what_the_learner_raised_is_shown_and_not_raised():
    result = check("01.4", crashes)
    assert "IndexError: list index out of range" in result.failures[0].message
    assert "crashes, line" in result.failures[0].message and "return table[num_computed]" in result.failures[0].message
    assert repr(result).count("IndexError") == 1, "one mistake that trips every check is told once"


@pytest.mark.parametrize("theirs", [is_a_stub, ..., None])
def test_an_unfinished_one_is_told_so(theirs, language):
    result = check("01.4", theirs)
    assert result.unfinished and not result.passed and not result.failures
    assert ("not written yet" if language == "en" else "还没有写") in repr(result)


def test_html_escapes_what_the_learner_wrote():
    def theirs(pool, table, num_computed):
        raise ValueError("<script>")

    assert "<script>" not in check("01.4", theirs)._repr_html_()


@pytest.mark.parametrize("variable, value", [("NANOPD_STRICT_CHECKS", "1"), ("NBGRADER_EXECUTION", "autograde")])
@pytest.mark.parametrize("theirs", [drops_the_copies, is_a_stub])
def test_strict_raises(monkeypatch, theirs, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(CheckFailed, match=r"01\.4"):
        check("01.4", theirs)
    assert check("01.4", append_slot)


@pytest.mark.parametrize("id", ["01.999", "77.1", "four", "1.4"])
def test_an_unknown_exercise_names_the_known(id):
    with pytest.raises(UnknownExercise, match=r"01\.4|01"):
        check(id, append_slot)


def test_every_registered_check_has_both_hints():
    from importlib import import_module
    from pathlib import Path

    from nanopd.workbook import check as module

    for path in Path(module.__file__).parent.glob("checks/ch[0-9][0-9].py"):
        import_module(f"nanopd.workbook.checks.{path.stem}")
    for id, checks in module._registry.items():
        for name, one in checks.items():
            assert one.hint_en.strip() and one.hint_zh.strip(), f"{id} {name}"


# -------------------------------------------------------------------------------------------------- surface


def test_they_are_in_the_public_face():
    assert nanopd.check is check and nanopd.predict is predict


def test_they_load_neither_torch_nor_plotly():
    code = ("import sys, nanopd; nanopd.predict('00.1', x=1); nanopd.check('01.4', None); "
            "print([name for name in ('torch', 'plotly', 'jupytext') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
