"""`swiftkernels doctor`: what it tells, and its exit status."""

from __future__ import annotations

import pytest
import torch

from swiftkernels import cli, compat
from tests.builds import build_in_place, copy_project, needs_compiler, run

no_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.xpu.is_available(), reason="tells about the GPU as well"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    project = copy_project(tmp_path_factory.mktemp("built") / "project")
    build_in_place(project)
    return project


@no_gpu
@needs_compiler
def test_all_is_well_after_a_build(built):
    said = run(built, "-m", "swiftkernels", "doctor").stdout
    assert "All that should work here does." in said
    assert "built, in use" in said
    for name in ("swiftkernels", "torch", "triton", "python", "platform", "processor", "threads"):
        assert f"\n  {name} " in said
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert f"\n  cpu {dtype}" in said
    assert "backend='triton' needs" in said


@pytest.mark.parametrize("environment", [{"PATH": "/nonexistent", "CXX": ""}, {"CXX": "/no/c++"}])
def test_a_missing_compiler_is_told_with_its_remedy(tmp_path, environment):
    project = copy_project(tmp_path / "project")
    build_in_place(project, **environment)
    said = run(project, "-m", "swiftkernels", "doctor", status=1, **environment).stdout
    assert "To mend:" in said
    assert "apt install g++" in said
    assert "reinstall: pip install" in said


@needs_compiler
def test_a_compilation_that_failed_is_shown(tmp_path):
    project = copy_project(tmp_path / "project")
    source = next((project / "swiftkernels").rglob("features.cpp"))
    source.write_text("#error on purpose\n")
    build_in_place(project)
    said = run(project, "-m", "swiftkernels", "doctor", status=1).stdout
    assert "#error on purpose" in said
    assert "apt install" not in said  # it is there


@needs_compiler
@pytest.mark.parametrize("isa", ["none", "nonsense"])
def test_a_choice_by_the_environment_is_told(built, isa):
    said = run(built, "-m", "swiftkernels", "doctor", status=1, SWIFTKERNELS_CPU_ISA=isa).stdout
    assert "SWIFTKERNELS_CPU_ISA" in said[said.index("To mend:") :]
    assert isa in said


def test_a_gpu_without_triton_is_a_fault(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_gpu_devices", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(compat, "has_triton", lambda: False)
    faults = list(cli._faults())
    assert any("pip install swiftkernels[triton]" in fault for fault in faults)


def test_a_subcommand_is_asked_for(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    assert "doctor" in capsys.readouterr().out
