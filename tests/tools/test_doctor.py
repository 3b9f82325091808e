"""`swiftkernels doctor`: output and exit status."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from swiftkernels.backends import devices, torch_state
from swiftkernels.tools import cli, verify
from tests.builds import build_in_place, copy_project, needs_compiler, run

no_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.xpu.is_available(), reason="the output depends on the GPU"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    project = copy_project(tmp_path_factory.mktemp("built") / "project")
    build_in_place(project)
    return project


@no_gpu
@needs_compiler
def test_no_problems_after_a_build(built):
    text = run(built, "-m", "swiftkernels", "doctor").stdout
    assert "No problems found." in text
    assert "built, in use" in text
    for name in ("swiftkernels", "torch", "triton", "python", "platform", "processor", "threads"):
        assert f"\n  {name} " in text
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert f"\n  cpu {dtype}" in text
    assert text.count("backend='triton' needs") == 1


@pytest.mark.parametrize("environment", [{"PATH": "/nonexistent", "CXX": ""}, {"CXX": "/no/c++"}])
def test_missing_compiler_is_reported_with_a_remedy(tmp_path, environment):
    project = copy_project(tmp_path / "project")
    build_in_place(project, **environment)
    text = run(project, "-m", "swiftkernels", "doctor", status=1, **environment).stdout
    assert "To fix:" in text
    assert "apt install g++" in text
    assert "reinstall: pip install" in text


@needs_compiler
def test_failed_compilation_is_shown(tmp_path):
    project = copy_project(tmp_path / "project")
    source = next((project / "swiftkernels").rglob("features.cpp"))
    source.write_text("#error on purpose\n")
    build_in_place(project)
    text = run(project, "-m", "swiftkernels", "doctor", status=1).stdout
    assert "#error on purpose" in text
    assert "apt install" not in text  # a compiler is installed


@needs_compiler
@pytest.mark.parametrize("isa", ["none", "nonsense"])
def test_wrong_instruction_set_in_the_environment_is_reported(built, isa):
    text = run(built, "-m", "swiftkernels", "doctor", status=1, SWIFTKERNELS_CPU_ISA=isa).stdout
    assert "SWIFTKERNELS_CPU_ISA" in text[text.index("To fix:") :]
    assert isa in text


@pytest.fixture
def gpu(monkeypatch):
    """Mocks a GPU."""
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


def test_gpu_without_triton_is_a_problem(monkeypatch, gpu):
    monkeypatch.setattr(torch_state, "has_triton", lambda: False)
    problems = list(cli._problems())
    assert any("pip install '.[triton]'" in problem for problem in problems)


def trial_that(failure: str):
    def trial(case, backend, dtype, device):
        return verify.Result(backend, dtype, case, 0.0, 0.0, failure)

    return trial


def test_gpu_is_described_and_its_kernels_are_run(monkeypatch, gpu):
    monkeypatch.setattr(torch_state, "has_triton", lambda: True)
    monkeypatch.setattr(verify, "verify_case", trial_that(""))
    ((name, text),) = cli._gpus()
    assert name == "cuda:0"
    assert [line.strip() for line in text.splitlines()] == [
        "Some GPU",
        "compute capability 9.0, 132 multiprocessors, 80.0 GiB of memory, 5.0 free",
        "the kernels compile and run on it, with correct results",
    ]
    assert not list(cli._gpu_problems())


def test_amd_gpu_shows_its_architecture(monkeypatch, gpu):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.facts(gpu).startswith("gfx942, ")
    assert devices.built_for().endswith("ROCm 6.4")


def test_too_old_gpu_is_reported_and_not_used(monkeypatch, gpu):
    monkeypatch.setattr(torch_state, "too_old_for_triton", lambda d: "7.5")
    monkeypatch.setattr(verify, "verify_case", None)
    ((_, text),) = cli._gpus()
    assert "compute capability 7.5: too old" in text


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
def test_failing_kernels_are_a_problem_with_a_remedy(monkeypatch, gpu, failure, remedy):
    monkeypatch.setattr(torch_state, "has_triton", lambda: True)
    monkeypatch.setattr(verify, "verify_case", trial_that(failure))
    ((_, text),) = cli._gpus()
    assert failure in text
    (problem,) = cli._gpu_problems()
    assert problem.startswith(f"backend='triton' fails on cuda:0: {failure}")
    assert remedy in problem


def test_gpu_without_properties_does_not_stop_doctor(monkeypatch, gpu):
    def broken(device):
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert list(cli._gpus()) == [
        ("cuda:0", "cannot be used: CUDA error: unspecified launch failure")
    ]


@no_gpu
def test_driver_of_a_gpu_that_torch_does_not_find_is_a_problem(monkeypatch, tmp_path):
    for name in cli.HIDING:
        monkeypatch.delenv(name, raising=False)
    node = tmp_path / "nvidiactl"
    monkeypatch.setattr(cli, "DRIVERS", {str(node): "an NVIDIA"})
    assert not list(cli._gpu_problems())
    node.touch()
    (problem,) = cli._gpu_problems()
    assert "driver of an NVIDIA GPU, which torch does not find" in problem
    assert "https://pytorch.org/get-started/locally" in problem
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert not list(cli._gpu_problems())


@no_gpu
def test_reason_for_no_gpu_is_reported(monkeypatch):
    for name in cli.HIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    ((_, text),) = cli._gpus()
    assert f"it was built for {devices.built_for()}" in text

    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    ((_, text),) = cli._gpus()
    assert text.endswith("(Found no NVIDIA driver on your system.)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    ((_, text),) = cli._gpus()
    assert "CUDA_VISIBLE_DEVICES=7 may hide it" in text


def test_subcommand_is_required(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("doctor", "verify", "bench"))
