"""`swiftkernels verify`: what it covers, that it passes here, and that it sees broken kernels."""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftkernels.backends import devices
from swiftkernels.backends.cpu import library
from swiftkernels.ops.additive_attention import eager
from swiftkernels.ops.additive_attention.cpu import config
from swiftkernels.ops.additive_attention.cpu.plan import PackedPlan
from swiftkernels.tools import cli, verify
from tests.builds import ROOT, run

CPU = torch.device("cpu")
SMALL = tuple(case for case in verify.CASES if case.batch * case.n_tokens * case.width < 3000)

needs_kernels = pytest.mark.skipif(library.loaded() is None, reason="needs the CPU kernels")


@pytest.fixture
def few_cases(monkeypatch):
    """Few cases, and one thread, which is faster for small work next to other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(verify, "CASES", SMALL)
    yield
    torch.set_num_threads(before)


def test_the_cases_cover_every_pair_of_variants():
    variants = {
        "pooling": verify.POOLINGS,
        "qk_norm": (False, True),
        "masked": (False, True),
        "bias": (False, True),
        "layout": verify.LAYOUTS,
    }
    cases = [case for case in verify.CASES if case.from_tokens]
    for one, other in combinations(variants, 2):
        found = {(getattr(case, one), getattr(case, other)) for case in cases}
        assert found == set(product(variants[one], variants[other])), (one, other)
    for pooling in verify.POOLINGS:
        of_pooling = [case for case in cases if case.pooling == pooling]
        for lower, upper in ((0, 64), (64, 256), (256, 512)):
            assert any(lower < case.width <= upper for case in of_pooling)
        assert any(not case.from_tokens and case.pooling == pooling for case in verify.CASES)
    sizes = {case.n_tokens for case in cases}
    assert sizes >= {1, 7, 49, 65, 784}
    assert {case.width for case in cases} >= {37, 48, 56, 220, 512}


def test_a_gpu_compiles_few_variants_that_cover_what_there_is():
    runs = verify.plan("triton", torch.device("cuda", 0))
    cases = [case for case, _ in runs]
    assert len(set(cases)) == len(cases) <= 14
    assert {dtype for case, dtype in runs if not case.from_tokens} <= set(verify.DTYPES)
    for lower, upper in ((0, 64), (64, 256), (256, 512)):
        own = [run for run in runs if lower < run[0].width <= upper and run[0].from_tokens]
        assert {dtype for _, dtype in own} == set(verify.DTYPES)
        assert {case.pooling for case, _ in own} == set(verify.POOLINGS)
        assert {case.qk_norm for case, _ in own} == {False, True}
        assert {case.layout for case, _ in own} == set(verify.LAYOUTS)
    for pooling in verify.POOLINGS:
        own = [run for run in runs if run[0].pooling == pooling and run[0].from_tokens]
        assert {dtype for _, dtype in own} == set(verify.DTYPES)
        assert {case.masked for case, _ in own} == {False, True}
        assert {case.qk_norm for case, _ in own} == {False, True}
    assert {case.n_tokens for case in cases} >= {1, 7, 49, 65, 784, 5000}
    assert {case.width for case in cases} >= {37, 48, 220, 512}
    quick = verify.plan("triton", torch.device("cuda", 0), quick=True)
    assert set(quick) < set(runs)
    assert {dtype for _, dtype in quick} == set(verify.DTYPES)


def test_every_form_of_the_cpu_kernels_is_among_the_cases():
    forms = {
        config.form(case.n_tokens, case.in_dims, case.width, case.qk_norm)
        for case, _ in verify.plan("cpu", CPU, quick=True)
    }
    assert len(forms) >= 2  # the plain form is chosen for widths below 8 only


@pytest.mark.parametrize("layout", verify.LAYOUTS)
def test_the_tokens_are_the_same_in_every_layout(layout):
    case = verify.Case(2, 35, 6, 6, 1, layout=layout)
    x = case.tensors(torch.float32)[0]
    tokens = x if layout == "tokens" else x.flatten(2).transpose(1, 2)
    assert torch.equal(tokens, verify.Case(2, 35, 6, 6, 1).tensors(torch.float32)[0])
    if layout == "channels_last":
        assert x.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
def test_all_is_well_here(few_cases, capsys):
    assert verify.run("cpu") == 0
    said = capsys.readouterr().out
    assert f"PASS: all {6 * len(SMALL)} cases" in said  # two backends, three types
    for backend in ("cpu", "aten"):
        for dtype in ("float32", "float16", "bfloat16"):
            assert f"\n{backend:<10}{dtype:<10}" in said


def slightly_wrong(outputs: tuple[Tensor, ...], factor: float = 1.0001) -> tuple[Tensor, ...]:
    return (outputs[0] * factor, *outputs[1:])


def test_a_wrong_output_is_seen(few_cases, monkeypatch, capsys):
    forward = eager.forward
    monkeypatch.setattr(eager, "forward", lambda *args: slightly_wrong(forward(*args)))
    assert verify.run("cpu", "aten", quick=True) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said
    assert "output: error" in said


@pytest.mark.parametrize(("which", "name"), [(0, "x"), (5, "w_g"), (8, "final.weight")])
def test_a_wrong_gradient_is_seen(few_cases, monkeypatch, capsys, which, name):
    backward = eager.backward

    def broken(*args: object) -> list[Tensor | None]:
        grads = backward(*args)
        grads[which] = grads[which] * 1.0001
        return grads

    monkeypatch.setattr(eager, "backward", broken)
    assert verify.run("cpu", "aten") == 1
    assert f"gradient of {name}: error" in capsys.readouterr().out


@needs_kernels
def test_one_wrong_number_of_a_compiled_kernel_is_seen(few_cases, monkeypatch, capsys):
    call = PackedPlan.__call__

    def broken(*args: Any) -> Tensor | None:
        out = call(*args)
        if out is not None and out.is_contiguous():
            out.view(-1)[-1:] += 0.1
        return out

    monkeypatch.setattr(PackedPlan, "__call__", broken)
    assert verify.run("cpu", "cpu") == 1
    assert "output" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_results_that_are_not_finite_are_wrong(monkeypatch, value):
    forward = eager.forward
    monkeypatch.setattr(
        eager,
        "forward",
        lambda *args: slightly_wrong(forward(*args), value),
    )
    result = verify.verify_case(SMALL[0], "aten", torch.float32, CPU)
    assert result.output == math.inf
    assert result.failure.startswith("output")


def test_a_kernel_that_raises_has_failed_and_the_others_go_on(few_cases, monkeypatch, capsys):
    def broken(*args: object) -> None:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(eager, "backward", broken)
    assert verify.run("cpu", "aten") == 1
    said = capsys.readouterr().out
    assert "RuntimeError: no such instruction\nand more" in said
    assert f"FAIL: {3 * len(SMALL)} of {3 * len(SMALL)}" in said


def test_what_cannot_run_is_reported(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["verify", "--device", "cpu", "--backend", "triton"]) == 2
    said = capsys.readouterr().out
    assert "not run: backend='triton' needs" in said
    assert "Nothing to verify could run here" in said


@pytest.mark.parametrize("name", ["cuda:99", "cpu:1", "gpu", ""])
def test_a_device_that_is_not_there_is_refused(capsys, name):
    assert cli.main(["verify", "--device", name]) == 2
    said = capsys.readouterr().err
    assert "device must be one of" in said
    assert f"cpu; got {name!r}" in said


def test_the_first_gpu_is_taken_unless_another_is_named(monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: [torch.device("cuda", i) for i in range(2)])
    assert devices.find(None) == devices.find("cuda") == torch.device("cuda", 0)
    assert devices.find("cuda:1") == torch.device("cuda", 1)
    assert devices.find("cpu") == CPU


def test_the_triton_kernels_pass_under_the_interpreter():
    pytest.importorskip("triton")
    code = (
        "from swiftkernels.tools import verify;"
        "verify.CASES = [verify.Case(2, 7, 24, 12, 2, 'softmax', masked=True, layout='nchw')];"
        "raise SystemExit(verify.run('cpu', 'triton'))"
    )
    said = run(ROOT, "-c", code, TRITON_INTERPRET="1", OMP_NUM_THREADS="1").stdout
    assert "interpreter" in said
    assert "\ntriton    float32" in said
    assert "PASS" in said
