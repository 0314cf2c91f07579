"""The strings are the same in both languages but for their words, and the language is found as promised."""

from __future__ import annotations

import string
from pathlib import Path

import pytest

from nanopd.widgets import strings
from nanopd.widgets.strings import STRINGS, current_language, set_language, t


@pytest.fixture(autouse=True)
def language_left_as_found(monkeypatch):
    monkeypatch.delenv("NANOPD_LANG", raising=False)
    yield
    set_language(None)


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("key", STRINGS)
def test_both_languages_have_the_text_and_the_same_fields(key):
    en, zh = STRINGS[key]
    assert en.strip() and zh.strip()
    assert fields(en) == fields(zh)


def test_no_key_is_written_twice():
    """A dict display would keep the last silently."""
    lines = Path(strings.__file__).read_text(encoding="utf-8").splitlines()
    keys = [line.split('"')[1] for line in lines if line.startswith('    "') and '": (' in line]
    assert sorted(keys) == sorted(STRINGS)


def test_t_fills_in_the_fields_in_the_current_language():
    set_language("en")
    assert t("predict.title", id="01.4") == "Prediction 01.4"
    set_language("zh")
    assert t("predict.title", id="01.4") == "预测 01.4"


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="known are en, zh"):
        set_language("fr")


@pytest.mark.parametrize(("folder", "expected"), [
    ("notebooks/zh", "zh"),
    ("notebooks/en", "en"),
    ("notebooks/solutions/zh", "zh"),
    ("zh/somebody/notebooks/en", "en"),  # the innermost counts
    ("course/release/01_block_manager_zh", "zh"),
    ("zh/course/release/01_block_manager_en", "en"),
    ("elsewhere", "en"),
    ("zh_cn_notes", "en"),
])
def test_the_folder_tells_the_language(tmp_path, monkeypatch, folder, expected):
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    assert current_language() == expected


@pytest.mark.parametrize(("value", "expected"), [("zh", "zh"), ("en", "en"), ("zh_CN.UTF-8", "zh"), ("fr", "zh"), ("", "zh")])
def test_the_environment_goes_before_the_folder(tmp_path, monkeypatch, value, expected):
    (tmp_path / "zh").mkdir()
    monkeypatch.chdir(tmp_path / "zh")
    monkeypatch.setenv("NANOPD_LANG", value)
    assert current_language() == expected


def test_set_language_goes_before_all(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOPD_LANG", "zh")
    set_language("en")
    assert current_language() == "en"
