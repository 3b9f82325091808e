"""`swiftkernels doctor`: what it tells, and its exit status."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from swiftkernels.backends import devices, torch_state
from swiftkernels.tools import cli, verify
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
    assert said.count("backend='triton' needs") == 1


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


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that there is not: what it says of itself can be set as attributes of the result."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(devices, "gpus", lambda: [device])
    monkeypatch.setattr(devices, "name", lambda d: "Some GPU")
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, gcnArchName="gfx942"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (5 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch_state, "too_old_for_triton", lambda d: "")
    cli._trial.cache_clear()
    yield device
    cli._trial.cache_clear()


def test_a_gpu_without_triton_is_a_fault(monkeypatch, gpu):
    monkeypatch.setattr(torch_state, "has_triton", lambda: False)
    faults = list(cli._faults())
    assert any("pip install swiftkernels[triton]" in fault for fault in faults)


def trial_that(failure: str):
    def trial(case, backend, dtype, device):
        return verify.Result(backend, dtype, case, 0.0, 0.0, failure)

    return trial


def test_a_gpu_tells_what_it_has_and_that_the_kernels_run(monkeypatch, gpu):
    monkeypatch.setattr(torch_state, "has_triton", lambda: True)
    monkeypatch.setattr(verify, "verify_case", trial_that(""))
    ((name, said),) = cli._gpus()
    assert name == "cuda:0"
    assert [line.strip() for line in said.splitlines()] == [
        "Some GPU",
        "compute capability 9.0, 132 multiprocessors, 80.0 GiB of memory, 5.0 free",
        "the kernels compile and run there, and give the right numbers",
    ]
    assert not list(cli._gpu_faults())


def test_an_amd_gpu_tells_its_architecture(monkeypatch, gpu):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.facts(gpu).startswith("gfx942, ")
    assert devices.built_for().endswith("ROCm 6.4")


def test_a_gpu_that_is_too_old_is_told_and_not_tried(monkeypatch, gpu):
    monkeypatch.setattr(torch_state, "too_old_for_triton", lambda d: "7.5")
    monkeypatch.setattr(verify, "verify_case", None)
    ((_, said),) = cli._gpus()
    assert "compute capability 7.5: too old" in said


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        ("RuntimeError: Failed to find C compiler. Please specify via CC", "apt install gcc"),
        ("CalledProcessError: Command '['/usr/bin/gcc', ...", "apt install python3-dev"),
        ("AssertionError: libcuda.so cannot found!", "--gpus all"),
        ("RuntimeError: 0 active drivers ([]). There should only be one.", "reinstall both"),
        ("AcceleratorError: CUDA error: no kernel image is available", "pytorch.org"),
        ("gradient of x: error 0.1, budget 1e-06", "swiftkernels verify"),
        ("OutOfResources: shared memory", "swiftkernels verify"),
    ],
)
def test_kernels_that_fail_on_a_gpu_are_a_fault_with_a_remedy(monkeypatch, gpu, failure, remedy):
    monkeypatch.setattr(torch_state, "has_triton", lambda: True)
    monkeypatch.setattr(verify, "verify_case", trial_that(failure))
    ((_, said),) = cli._gpus()
    assert failure in said
    (fault,) = cli._gpu_faults()
    assert fault.startswith(f"backend='triton' fails on cuda:0: {failure}")
    assert remedy in fault


def test_a_gpu_that_cannot_be_asked_does_not_end_the_doctor(monkeypatch, gpu):
    def broken(device):
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert list(cli._gpus()) == [
        ("cuda:0", "cannot be used: CUDA error: unspecified launch failure")
    ]


@no_gpu
def test_a_driver_whose_gpu_torch_does_not_see_is_a_fault(monkeypatch, tmp_path):
    for name in cli.HIDING:
        monkeypatch.delenv(name, raising=False)
    node = tmp_path / "nvidiactl"
    monkeypatch.setattr(cli, "DRIVERS", {str(node): "an NVIDIA"})
    assert not list(cli._gpu_faults())
    node.touch()
    (fault,) = cli._gpu_faults()
    assert "driver of an NVIDIA GPU, which torch does not see" in fault
    assert "https://pytorch.org/get-started/locally" in fault
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert not list(cli._gpu_faults())


@no_gpu
def test_why_torch_sees_no_gpu_is_told(monkeypatch):
    for name in cli.HIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    ((_, said),) = cli._gpus()
    assert f"it is built for {devices.built_for()}" in said

    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    ((_, said),) = cli._gpus()
    assert said.endswith("(Found no NVIDIA driver on your system.)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    ((_, said),) = cli._gpus()
    assert "CUDA_VISIBLE_DEVICES=7 may hide it" in said


def test_a_subcommand_is_asked_for(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("doctor", "verify", "bench"))
