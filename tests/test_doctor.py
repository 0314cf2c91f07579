from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from nanopd import doctor
from nanopd.doctor import GIB, Finding, Report, State, what_runs


def fake_torch(gpus=(), cuda="13.0", apart=(), version="2.13.0"):
    """A torch with these GPUs, each (name, free GiB, total GiB, (major, minor)); `apart`: pairs without P2P."""

    def properties(index):
        name, _, _, (major, minor) = gpus[index]
        return SimpleNamespace(name=name, major=major, minor=minor)

    return SimpleNamespace(
        __version__=version,
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus),
            get_device_properties=properties,
            mem_get_info=lambda index: (gpus[index][1] * GIB, gpus[index][2] * GIB),
            can_device_access_peer=lambda a, b: (a, b) not in apart,
        ),
    )


H200 = ("H200", 130, 140, (9, 0))
T4 = ("T4", 14, 15, (7, 5))


@pytest.mark.parametrize("version, state", [
    ((3, 9, 18), State.LIMITED), ((3, 10, 0), State.OK), ((3, 13, 7), State.OK), ((3, 14, 0), State.LIMITED),
])
def test_python_range(version, state):
    assert doctor.check_python(version).state is state


def test_python_range_is_the_package_s():
    pyproject = (doctor.PACKAGE.parent / "pyproject.toml").read_text()
    (major, oldest), (_, newest) = doctor.PYTHONS
    assert f'requires-python = ">={major}.{oldest},<{major}.{newest + 1}"' in pyproject


def test_torch_that_does_not_import_says_why():
    finding = doctor.check_torch(None, "does not import: libcudart.so.13 not found")
    assert finding.state is State.MISSING
    assert "libcudart" in finding.found
    assert "pip install" in finding.advice


def test_cpu_torch_is_fine_unless_the_machine_has_a_gpu():
    torch = fake_torch(cuda=None)
    assert doctor.check_torch(torch).state is State.OK
    assert doctor.check_torch(torch, has_nvidia_driver=True).state is State.LIMITED
    assert "CUDA 13.0" in doctor.check_torch(fake_torch()).found


def test_gpus():
    rows = doctor.check_gpus(fake_torch([H200, T4, ("H200", 10, 140, (9, 0))]))
    assert [row.name for row in rows] == ["GPU 0", "GPU 1", "GPU 2"]
    assert [row.state for row in rows] == [State.OK, State.LIMITED, State.LIMITED]
    assert "130.0 of 140.0 GiB free, compute capability 9.0" in rows[0].found
    assert "bfloat16" in rows[1].advice
    assert "nvidia-smi" in rows[2].advice


@pytest.mark.parametrize("torch", [None, fake_torch()])
def test_no_gpu_is_one_row_that_says_it_is_not_needed(torch):
    (row,) = doctor.check_gpus(torch)
    assert row.state is State.MISSING
    assert "not needed" in row.advice


def test_a_gpu_that_fails_leaves_the_others_readable():
    torch = fake_torch([H200, H200])
    answer = torch.cuda.mem_get_info

    def mem_get_info(index):
        if index == 0:
            raise RuntimeError("CUDA error: uncorrectable ECC error")
        return answer(index)

    torch.cuda.mem_get_info = mem_get_info
    rows = doctor.check_gpus(torch)
    assert [row.state for row in rows] == [State.MISSING, State.OK]
    assert "ECC" in rows[0].found


@pytest.mark.parametrize("count, apart, state, found", [
    (0, (), State.MISSING, "no pair"),
    (1, (), State.MISSING, "1 GPU, so no pair"),
    (2, (), State.OK, "0-1"),
    (4, (), State.OK, "all 6 pairs"),
    (3, ((2, 0),), State.LIMITED, "2 of 3 pairs; not 0-2"),
    (2, ((0, 1), (1, 0)), State.MISSING, "0 of 1 pairs; not 0-1"),
])
def test_p2p(count, apart, state, found):
    finding = doctor.check_p2p(fake_torch([H200] * count, apart=apart))
    assert finding.state is state
    assert found in finding.found


def test_nvcc():
    text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.48\n"
    assert doctor.check_nvcc("/usr/local/cuda/bin/nvcc", text).found == "release 13.0 (/usr/local/cuda/bin/nvcc)"
    assert "version unknown" in doctor.check_nvcc("/bin/nvcc", "").found
    assert doctor.check_nvcc(None).state is State.MISSING


def test_cuda_sources_and_whether_they_are_compiled():
    assert doctor.check_kernels(["a.cu", "b.cu"], "compiled").found == "2 .cu files, compiled"
    assert doctor.check_kernels([], "not compiled").state is State.MISSING
    assert "layer.cu" in doctor._cuda_sources()


def test_memory_cores_disk():
    assert doctor.check_memory(16 * GIB, 12 * GIB) == Finding("Host memory", State.OK, "12.0 of 16.0 GiB free")
    assert doctor.check_memory(16 * GIB, None).found == "16.0 GiB"
    assert doctor.check_memory(16 * GIB, GIB).state is State.LIMITED
    assert doctor.check_memory(None, None).state is State.LIMITED
    assert doctor.check_cores(1).state is State.LIMITED
    assert doctor.check_cores(2).state is State.OK
    assert doctor.check_disk(GIB, "/home").state is State.LIMITED
    assert doctor.check_disk(50 * GIB, "/home").found == "50.0 GiB free at /home"


# ------------------------------------------------------------------------------------ the embedded model

WEIGHTS = doctor.PACKAGE / "tiny" / "weights"


@pytest.fixture
def weights(tmp_path):
    return shutil.copytree(WEIGHTS, tmp_path / "weights")


def test_embedded_model_is_whole():
    assert doctor.check_embedded_model(WEIGHTS).state is State.OK


def test_embedded_model_that_lacks_a_file(weights):
    (weights / "tokenizer.json").unlink()
    finding = doctor.check_embedded_model(weights)
    assert finding.state is State.MISSING
    assert "tokenizer.json" in finding.found


@pytest.mark.parametrize("size", [0, 4, 100, 100_000])
def test_embedded_model_cut_short(weights, size):
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    finding = doctor._guarded("Embedded model", lambda: doctor.check_embedded_model(weights))
    assert finding.state is State.MISSING
    assert finding.found


# ------------------------------------------------------------------------------------------ what runs here


def findings(torch=None, **states):
    """A machine on which all is well, but for `states` (name -> state, with _ for a space)."""
    torch = torch or fake_torch(cuda=None)
    names = [*doctor.REQUIRED, "Embedded model", "nvcc", "ninja", "CUDA sources", *doctor.LAB]
    changed = {name.replace("_", " "): state for name, state in states.items()}
    made = [Finding(name, changed.get(name, State.OK), "found", f"install {name}") for name in names]
    return [*made, *doctor.check_gpus(torch), doctor.check_p2p(torch)]


def states(rows):
    return [row.state for row in rows]


def test_a_machine_without_a_gpu_runs_the_engine_and_the_notebooks():
    rows = what_runs(findings(CUDA_sources=State.MISSING))
    assert [row.name for row in rows] == ["Engine on the CPU", "Engine on a GPU", "Compiled kernels", "P2P between GPUs",
                                          "Notebooks"]
    assert states(rows) == [State.OK, State.MISSING, State.MISSING, State.MISSING, State.OK]


def test_a_machine_with_two_gpus_runs_everything():
    assert set(states(what_runs(findings(fake_torch([H200, H200]))))) == {State.OK}


def test_kernels_can_be_compiled_without_a_gpu_but_not_run():
    assert what_runs(findings())[2].state is State.LIMITED
    assert "nvcc" in what_runs(findings(nvcc=State.MISSING))[2].found


def test_without_torch_nothing_runs_and_only_then_the_exit_code_says_so():
    rows = what_runs(findings(torch=None) + [Finding("torch", State.MISSING, "not installed", "pip install torch")])
    assert rows[0] == Finding("Engine on the CPU", State.MISSING, "needs torch", "pip install torch")
    assert Report([], rows).exit_code == 1
    without_model = what_runs(findings(Embedded_model=State.MISSING))
    assert without_model[0].state is State.LIMITED
    assert Report([], without_model).exit_code == 0


def test_notebooks_name_what_is_missing():
    row = what_runs(findings(plotly=State.MISSING, anywidget=State.MISSING))[-1]
    assert row.state is State.MISSING
    assert row.found == "needs plotly, anywidget"


# ------------------------------------------------------------------------------------------- this machine


def test_examine_this_machine():
    report = doctor.examine()
    assert report.exit_code == 0
    assert len({finding.name for finding in report.findings}) == len(report.findings)
    data = json.loads(report.to_json())
    assert data["runs"][0] == {"name": "Engine on the CPU", "state": "ok", "found": "yes: nanopd demo", "advice": ""}
    assert {row["state"] for row in data["findings"]} <= {"ok", "limited", "missing"}


def test_examine_survives_a_machine_where_nothing_answers(monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no such device")

    for name in ("_nvcc", "_memory", "_cores", "_cuda_sources"):
        monkeypatch.setattr(doctor, name, broken)
    for name in ("find_ninja", "kernels_status"):
        monkeypatch.setattr(doctor.build, name, broken)
    monkeypatch.setattr(doctor, "_import_torch", lambda: (None, "does not import: broken"))
    monkeypatch.setattr(doctor, "PACKAGE", doctor.PACKAGE / "nowhere")
    report = doctor.examine()
    assert report.exit_code == 1
    assert len(report.runs) == 5
    assert json.loads(report.to_json())


def test_a_row_s_text_is_never_read_as_markup():
    from rich.console import Console

    console = Console(record=True, width=100)
    console.print(doctor.render(Report([Finding("torch", State.MISSING, "[bold]libc[/] [/oops]", "x")], [])))
    assert "[/oops]" in console.export_text()
