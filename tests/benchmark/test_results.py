from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanopd.benchmark.results import RECORDED, Report, load, slug

ROOT = Path(__file__).parents[2]


def report(bench="decode", name="NVIDIA H200", date="2026-01-02T03:04:05+00:00", **changes):
    values = dict(
        bench=bench, date=date, command="nanopd bench decode", commit="0123456789abcdef", dirty=False,
        device={"kind": "cpu" if name == "cpu" else "cuda", "name": name}, versions={"torch": "2.11.0", "driver": None},
        ceilings={"read_gb_s": 4339.0}, rows=[{"batch": 1, "ms": 3.9}])
    return Report(**(values | changes))


def test_what_was_saved_is_loaded(tmp_path):
    path = report().save(tmp_path)
    assert path == tmp_path / "nvidia-h200" / "decode.json"
    assert load("decode", folder=tmp_path) == report()
    assert list(tmp_path.rglob("*.part")) == []


def test_the_latest_of_a_gpu_comes_before_any_of_a_cpu(tmp_path):
    report(date="2026-01-01T00:00:00+00:00").save(tmp_path)
    report(name="NVIDIA GeForce RTX 4090", date="2026-01-03T00:00:00+00:00").save(tmp_path)
    report(name="cpu", date="2026-01-04T00:00:00+00:00").save(tmp_path)
    assert load("decode", folder=tmp_path).device["name"] == "NVIDIA GeForce RTX 4090"
    assert load("decode", "H200", tmp_path).device["name"] == "NVIDIA H200"
    assert load("decode", "cpu", tmp_path).device["name"] == "cpu"


def test_nothing_recorded_says_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="recorded: nothing"):
        load("decode", folder=tmp_path)
    report().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="'serve'; recorded: decode on nvidia-h200"):
        load("serve", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="'decode' on 'A100'"):
        load("decode", "A100", tmp_path)


def test_another_schema_is_refused(tmp_path):
    path = report().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        load("decode", folder=tmp_path)


def test_a_source_says_what_the_figures_stand_on():
    assert report().source == "NVIDIA H200, 2026-01-02, commit 0123456"
    assert report(dirty=True).source.endswith("commit 0123456 with changes")
    assert report(commit=None, dirty=None).source.endswith("no commit")


def test_slugs():
    assert slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
    assert slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


def test_reading_needs_no_torch():
    code = "import sys, nanopd.benchmark.results; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_is_recorded_here_can_be_read(path):
    found = load(path.stem, path.parent.name)
    assert found.slug == path.parent.name
    assert found.rows
    assert found.versions["torch"]
