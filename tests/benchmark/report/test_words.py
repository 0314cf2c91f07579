"""Words in both languages, with the same fields, and none that nobody says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanopd.benchmark.report import words
from nanopd.benchmark.report.words import WORDS, named, w
from nanopd.widgets.strings import set_language

SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in Path(words.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("key", WORDS)
def test_both_languages_have_the_same_fields(key):
    english, chinese = WORDS[key]
    assert sorted(re.findall(r"{(\w+)}", english)) == sorted(re.findall(r"{(\w+)}", chinese)) and english and chinese


def test_what_is_said_is_there():
    said = set(re.findall(r'\bw\(["\']([\w.]+)["\']', SOURCES))
    assert len(said) > 40 and said <= set(WORDS)


def test_names_without_a_word_stay_as_they_are():
    assert named("64-256/128") == "64-256/128" and named("mixed") == "mixed prompts"
    set_language("zh")
    assert w("collocated") == "混部"
