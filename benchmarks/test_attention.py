"""The operator compared with eager PyTorch, torch.compile and its peers, on tokens of photographs.

`pytest benchmarks/ --benchmark-only` verifies every layer against float64. It times each in turn
with the eager layer, for the printed table and results/attention.csv. pytest-benchmark then times
the layer once more, for what it saves and compares (`--benchmark-json`, `--benchmark-autosave`);
the first times are in extra_info. `--benchmark-disable` only verifies.
"""

from __future__ import annotations

import os
import shutil
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.workloads import size_tokens
from swiftkernels.ops.additive_attention.benchmark import BENCHMARK as ADDITIVE_ATTENTION
from swiftkernels.ops.benchmark import Size
from swiftkernels.testing import costs, harness
from swiftkernels.testing.engines import ENGINES, OURS, Problem
from swiftkernels.testing.peers import PEERS
from swiftkernels.testing.timing import Stopwatch

LAYERS = {name: name for name in PEERS} | {
    "additive": OURS,
    "eager": "eager",
    "compiled": "compile",
}
"""The engines by their names in the tests."""


class Case(NamedTuple):
    """Input and direction of one comparison."""

    size: Size
    batch: int
    backward: bool

    @property
    def stage(self) -> str:
        assert self.size.stage
        return self.size.stage.name

    @property
    def name(self) -> str:
        return f"{self.stage}-batch{self.batch}-{harness.direction_name(self.backward)}"


ALL_CASES = tuple(
    Case(size, batch, backward)
    for backward in (False, True)
    for batch in (1, 8)
    for size in ADDITIVE_ATTENTION.sizes
)
CASES = tuple(
    case
    for case in ALL_CASES
    if case.stage.startswith("XS") and (case.batch == 8 or not case.backward)
)
COMPILED = tuple(
    f"{stage}-{case}"
    for stage in ("XS-1", "XS-4")
    for case in ("batch1-forward", "batch8-forward+backward")
)
"""Compiling takes longer than all timing: the longest and the shortest input are enough."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-shapes")
    pairs = [
        (case, layer)
        for case in (ALL_CASES if everything else CASES)
        for layer in LAYERS
        if layer != "compiled" or everything or case.name in COMPILED
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

    torch.compiler.reset()  # old graphs would count for the limit of recompilations
    tokens = size_tokens(case.size, case.batch, dtype, device)
    problem = Problem(case.size, case.batch, dtype, case.backward, device, tokens=tokens)
    engine = ENGINES[LAYERS[layer]]
    module, eager = (problem.module(e.layer) for e in (engine, ENGINES["eager"]))
    with torch.set_grad_enabled(case.backward):
        call, eager_call = engine.build(problem, module), problem.call(eager)
        errors: harness.Row = {}
        wrong = harness.check(problem, engine, call(), errors)
        assert not wrong, wrong
        if benchmark.disabled:
            benchmark(call)
            return
        common = harness.common_columns(problem) | {"least_bytes": problem.least_bytes(module)}
        timed = {name: dict(common) for name in ("eager", "this")}
        calls = {"eager": eager_call, "this": call}
        harness.time_calls(timed, calls, Stopwatch(device), seconds=0.5)
        # A FLOP counter does not see Inductor's kernels, which need the FLOPs of the eager layer.
        flops = costs.flops(eager_call if layer == "compiled" else call)
        kept = costs.saved_bytes(lambda: call()[0], [problem.x, *module.parameters()])
        names = {"case": case.name, "layer": layer, "engine": LAYERS[layer]}
        row = timed["this"] | errors | names | {"saved_bytes": kept, "flops": flops}
        rows.append(row)
        benchmark.extra_info.update(row)
        benchmark.group = f"{case.name} (N={case.size.tokens}, C={case.size.width})"
        benchmark.pedantic(call, rounds=min(row["rounds"], 100))


def has_cpp_compiler() -> bool:
    return any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))
