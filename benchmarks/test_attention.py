"""The operator beside the eager layer, torch.compile and its peers, on tokens of photographs.

`pytest benchmarks/ --benchmark-only` verifies every layer against float64 and times it in turn with
the eager layer, for the printed table and results/attention.csv; then once more alone, for what
pytest-benchmark saves and compares (`--benchmark-json`, `--benchmark-autosave`), where the times of
the first are in extra_info. `--benchmark-disable` only verifies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks import timing, verification
from benchmarks.workloads import STAGES, Stage, stage_tokens
from swiftkernels import AdditiveAttention
from swiftkernels.testing.peers import PEERS

LAYERS = (*PEERS, "additive", "eager", "compiled")
"""The peers; the operator with the backend "auto"; its definition, as it is and compiled."""


@dataclass(frozen=True)
class Case:
    """Input and direction of one comparison."""

    stage: Stage
    batch: int
    backward: bool

    @property
    def name(self) -> str:
        return f"{self.stage.name}-batch{self.batch}-{self.direction}"

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"


XS = STAGES[:4]
CASES = (
    *(Case(stage, batch, backward=False) for batch in (1, 8) for stage in XS),
    *(Case(stage, 8, backward=True) for stage in XS),
)
# Compiling takes longer than all the timing: the longest and the shortest input do.
COMPILED = tuple(
    Case(XS[i], b, backward) for i in (0, 3) for b, backward in ((1, False), (8, True))
)

SHAPES = [(stage.tokens, stage.width) for stage in STAGES]
ALL_CASES = tuple(
    Case(stage, batch, backward)
    for backward in (False, True)
    for batch in (1, 8)
    for i, stage in enumerate(STAGES)
    if SHAPES.index(SHAPES[i]) == i  # models share shapes
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-shapes")
    pairs = [
        (case, layer)
        for case in (ALL_CASES if everything else CASES)
        for layer in LAYERS
        if layer != "compiled" or everything or case in COMPILED
    ]
    ids = [f"{case.name}-{layer}" for case, layer in pairs]
    metafunc.parametrize(("case", "layer"), pairs, ids=ids)


def test_attention(
    case: Case,
    layer: str,
    benchmark: BenchmarkFixture,
    rows: list[dict[str, Any]],
    pytestconfig: pytest.Config,
) -> None:
    device = torch.device(pytestconfig.getoption("--device"))
    dtype = getattr(torch, pytestconfig.getoption("--dtype"))
    if layer == "compiled" and device.type == "cpu" and not has_cpp_compiler():
        pytest.skip("torch.compile needs a C++ compiler on a CPU")

    run = Pass(layer, case, dtype, device)
    eager = Pass("eager", case, dtype, device)
    verify(run, eager, dtype)
    if benchmark.disabled:
        benchmark(run)
        return

    timings = timing.interleave({"eager": eager, "this": run}, device)
    # Inductor's kernels carry out the FLOPs of the eager layer, where a counter does not see them.
    counted = eager if layer == "compiled" else run
    row: dict[str, Any] = {
        "case": case.name,
        "layer": layer,
        "stage": case.stage.name,
        "tokens": case.stage.tokens,
        "width": case.stage.width,
        "batch": case.batch,
        "direction": case.direction,
        "dtype": str(dtype).removeprefix("torch."),
        "median_seconds": timings["this"].median,
        "spread_seconds": timings["this"].spread,
        "ratio_to_eager": timings["this"].median / timings["eager"].median,
        "rounds": len(timings["this"].samples),
        "saved_bytes": timing.saved_bytes(run.forward, [run.x, *run.module.parameters()]),
        "flops": timing.flops(counted),
        "device": timing.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.group = f"{case.name} (N={case.stage.tokens}, C={case.stage.width})"
    benchmark.pedantic(run, rounds=min(row["rounds"], 100))


class Pass:
    """One layer at one case; calling it gives the output and, with a backward, all gradients."""

    def __init__(self, layer: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.layer, self.case = layer, case
        self.module = make_module(layer, case.stage.width).to(device, dtype)
        self.module.requires_grad_(case.backward)
        tokens = stage_tokens(case.stage, case.batch, dtype, device)
        # No leaf of autograd, as in a network.
        self.x = tokens.clone().requires_grad_(case.backward).clone()
        self.dout = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(1)).to(tokens)
        self.forward: Callable[[], Tensor] = lambda: self.module(self.x)
        if layer == "compiled":
            # One graph for this shape alone; old ones would use up the limit of recompilations.
            torch.compiler.reset()
            compiled = torch.compile(self.module, dynamic=False, fullgraph=True)
            self.forward = lambda: compiled(self.x)

    def __call__(self) -> list[Tensor]:
        out = self.forward()
        if not self.case.backward:
            return [out]
        return [out, *torch.autograd.grad(out, [self.x, *self.module.parameters()], self.dout)]

    def exact(self) -> list[Tensor]:
        """The same in float64, from the same rounded weights and tokens, by the definition."""
        layer = self.layer if self.layer in PEERS else "eager"
        double = Pass(layer, self.case, torch.float64, self.x.device)
        double.module.load_state_dict(self.module.state_dict())
        with torch.no_grad():
            double.x.copy_(self.x)
        double.dout.copy_(self.dout)
        return double()


def make_module(layer: str, width: int) -> nn.Module:
    """A layer with weights that depend on nothing but its kind and width."""
    torch.manual_seed(0)
    if layer in PEERS:
        return PEERS[layer](width)
    backend = "auto" if layer == "additive" else "reference"
    return AdditiveAttention(width, width, num_heads=1, backend=backend)


def verify(run: Pass, eager: Pass, dtype: torch.dtype) -> None:
    """Fail unless every output and gradient is as near to float64 as the type allows."""
    names = ["the output"]
    if run.case.backward:
        names += [f"the gradient of {n}" for n in ("x", *dict(run.module.named_parameters()))]
    exact = run.exact()
    errors = verification.relative_errors(run(), exact)
    if run.layer == "additive":
        eager_errors = verification.relative_errors(eager(), exact)
        bounds = [verification.operator_bound(error, dtype) for error in eager_errors]
    else:
        length = max(run.case.stage.width, run.case.stage.tokens)
        bounds = [verification.type_bound(dtype, length)] * len(names)
    for name, error, bound in zip(names, errors, bounds, strict=True):
        # Written so that a NaN fails.
        assert error <= bound, f"{name} is wrong: relative error {error:.2g} > {bound:.2g}"


def has_cpp_compiler() -> bool:
    return any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))
