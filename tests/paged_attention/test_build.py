"""Finding a compiler, keeping what was compiled, and what happens where there is none."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from nanopd.paged_attention import build, cuda
from nanopd.paged_attention.build import BuildError

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOPD_CACHE", str(tmp_path / "cache"))
    build.load_kernels.cache_clear()
    build.nvcc_version.cache_clear()
    yield tmp_path / "cache"
    build.load_kernels.cache_clear()
    build.nvcc_version.cache_clear()


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A small folder of sources in place of csrc/."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name in ("a.cu", "b.cu", "bindings.cpp", "kernels.h"):
        (folder / name).write_text(name)
    monkeypatch.setattr(build, "cuda_sources", lambda: sorted(folder.iterdir()))
    return folder


@pytest.fixture
def compiler(tmp_path, monkeypatch, sources):
    """An nvcc that takes what it compiles from no one: its output is its input, and a word `wrong` is an error."""
    log = tmp_path / "nvcc.log"
    home = tmp_path / "cuda"
    script(home / "bin" / "nvcc", f"""
        import sys
        if "--version" in sys.argv:
            print("Cuda compilation tools, release 13.0, V13.0.48")
            sys.exit()
        open({str(log)!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
        output = sys.argv[sys.argv.index("-o") + 1]
        for path in sys.argv[1:]:
            if path.endswith((".cu", ".cpp")) and "wrong" in open(path).read():
                sys.exit(f'{{path}}(7): error: identifier "wrong" is undefined')
        open(output, "w").write("compiled")
    """)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return log


def gpus(monkeypatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])


def test_nvcc_is_looked_for_in_the_usual_places(tmp_path, monkeypatch):
    for variable in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        monkeypatch.setenv(variable, "")
    for variable, folder in (("PATH", "on_path"), ("CUDA_PATH", "by_path/bin"), ("CUDA_HOME", "by_home/bin")):
        found = script(tmp_path / folder / "nvcc", "")
        monkeypatch.setenv(variable, str(tmp_path / folder.removesuffix("/bin")))
        assert build.find_nvcc() == found


def test_the_cache_folder(tmp_path, monkeypatch):
    assert build.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NANOPD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert build.cache_folder() == Path("/some/cache/nanopd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert build.cache_folder() == Path("/home/somebody/.cache/nanopd")


def test_each_source_is_compiled_once_and_the_progress_is_shown(compiler, cache_folder, capsys):
    library = build.build(["80", "90a"])
    assert library.parent == cache_folder / "kernels"
    assert library.name.startswith("sm_80_90a-torch2.") and "cuda13.0" in library.name
    assert library.read_text() == "compiled"
    calls = compiler.read_text().splitlines()
    assert len(calls) == 4  # three sources and the link
    assert all("-gencode=arch=compute_90a,code=sm_90a" in call and "-gencode=arch=compute_80,code=sm_80" in call for call in calls)
    assert ["TORCH_TARGET_VERSION" in call for call in calls].count(True) == 1
    assert "Building CUDA kernels for sm_80, sm_90a" in (said := capsys.readouterr().err)
    assert said.endswith("4/4\n")
    assert build.build(["80", "90a"]) == library
    assert len(compiler.read_text().splitlines()) == 4
    assert capsys.readouterr().err == ""
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".lock", ".so"]


def test_another_source_or_gpu_is_another_library(compiler, sources):
    first = build.build(["80"])
    assert build.build(["89"]) != first
    (sources / "kernels.h").write_text("changed")
    assert build.build(["80"]) != first
    assert first.exists()


def test_a_compile_error_reaches_the_user_without_the_noise(compiler, sources, cache_folder):
    (sources / "b.cu").write_text("wrong")
    with pytest.raises(BuildError) as raised:
        build.build(["80"])
    lines = str(raised.value).splitlines()
    assert lines[0] == "the CUDA kernels did not compile:"
    assert lines[1].endswith('b.cu(7): error: identifier "wrong" is undefined')
    assert "-gencode" not in str(raised.value)
    assert [path.suffix for path in (cache_folder / "kernels").iterdir()] == [".lock"]  # nothing half done is left
    (sources / "b.cu").write_text("right")
    assert build.build(["80"]).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
def test_two_processes_that_want_it_at_once_build_it_once(compiler, sources, tmp_path):
    code = ("from pathlib import Path; import nanopd.paged_attention.build as build; "
            f"build.cuda_sources = lambda: sorted(Path({str(sources)!r}).iterdir()); print(build.build(['80']))")
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                  cwd=build.PACKAGE.parent, env=os.environ.copy()) for _ in range(2)]
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert len(answers) == 1 and answers.pop().strip().endswith(".so")
    assert len(compiler.read_text().splitlines()) == 4


# ------------------------------------------------------------------------------------------ where it can't be done


def said_when_loading() -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not build.load_kernels()
        assert not build.load_kernels()  # said once
    assert len(caught) <= 1
    return str(caught[0].message) if caught else ""


def test_without_a_gpu_there_is_nothing_to_say(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said_when_loading() == ""


@pytest.mark.parametrize("missing", ["nvcc", "ninja"])
def test_without_a_compiler_a_warning_says_what_to_do(monkeypatch, missing, compiler):
    gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(build, f"find_{missing}", lambda: None)
    said = said_when_loading()
    assert "runs without its CUDA kernels" in said
    assert f"{missing} was not found: " in said and "install" in said


def test_an_old_gpu_is_named(monkeypatch, compiler):
    gpus(monkeypatch, (9, 0), (7, 5))
    assert "GPU 1 has compute capability 7.5, below 8.0; CUDA_VISIBLE_DEVICES can hide it" in said_when_loading()


def test_a_failed_compile_is_no_end_of_the_engine(monkeypatch, compiler, sources):
    gpus(monkeypatch, (8, 9))
    (sources / "a.cu").write_text("wrong")
    assert 'identifier "wrong" is undefined' in said_when_loading()


def test_a_library_that_does_not_load_is_no_end_of_the_engine(monkeypatch, compiler):
    gpus(monkeypatch, (8, 9))
    assert "kernels, slowly, by plain torch: " in said_when_loading()  # it holds the word `compiled`


def test_a_cache_that_cannot_be_written(monkeypatch, compiler, tmp_path):
    gpus(monkeypatch, (9, 0))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOPD_CACHE", str(tmp_path / "file"))
    assert "Not a directory" in said_when_loading()


def test_cpu_tensors_take_the_reference_path():
    assert not cuda.usable(torch.zeros(1))
    assert not cuda.supports_attention(torch.zeros(1, 16, 4, 64))


def test_targets_are_those_of_the_gpus(monkeypatch):
    gpus(monkeypatch, (9, 0), (8, 0), (9, 0), (12, 0))
    assert build.gpu_targets() == ["80", "90a", "120"]


def test_status_for_the_doctor(monkeypatch, compiler):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build.kernels_status() == "not compiled"
    gpus(monkeypatch, (9, 0))
    assert build.kernels_status() == "compiled at first use, in about a minute"
    build.build(["90a"])
    assert build.kernels_status() == "compiled"


# ---------------------------------------------------------------------------------------------------------- a cell


@needs_nvcc
def test_a_cell_of_cuda(cache_folder):
    source = '#include "common.cuh"\nextern "C" int answer(int x) { return 2 * x; }\n__global__ void kernel() {}\n'
    assert build.compile_shared(source).answer(21) == 42
    (library,) = (cache_folder / "cells").iterdir()
    written = library.stat().st_mtime_ns
    assert build.compile_shared(source).answer(4) == 8
    assert library.stat().st_mtime_ns == written


@needs_nvcc
def test_an_error_in_a_cell_has_the_cell_s_lines(cache_folder):
    with pytest.raises(BuildError, match=r'^exercise\.cu did not compile:\nexercise\.cu\(3\): error: identifier "oops" is undefined'):
        build.compile_shared('extern "C" int f() {\n  // a comment\n  return oops;\n}\n', name="exercise")
    assert not list((cache_folder / "cells").iterdir())


def test_a_cell_without_nvcc(monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(BuildError, match="CUDA_HOME"):
        build.compile_shared("")
