"""The benchmark harness: it verifies before it times. Nothing here judges a time."""

from __future__ import annotations

import pytest
import torch

from swiftkernels.ops import benchmarks
from swiftkernels.ops.additive_attention import eager
from swiftkernels.ops.additive_attention.benchmark import BENCHMARK as ADDITIVE_ATTENTION
from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.benchmark import Size
from swiftkernels.testing import engines, harness, ratios
from swiftkernels.testing.engines import ENGINES, OURS, Problem
from swiftkernels.testing.timing import Stopwatch
from swiftkernels.testing.tolerance import relative_errors

SMALL = Size(9, 16, "small")
UNCOMPILED = tuple(
    name for name, e in ENGINES.items() if e.build is Problem.call and name not in ("mdta",)
)


def small_problem(backward: bool = False, batch: int = 2, dtype=torch.float32) -> Problem:
    return Problem(SMALL, batch, dtype, backward)


def compare(problem: Problem, *names: str) -> dict[str, harness.Row]:
    return {row["engine"]: row for row in harness.compare(problem, names, Stopwatch("cpu"), 0.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_every_eager_engine_is_right_and_timed(backward, dtype):
    rows = compare(small_problem(backward, dtype=dtype), *UNCOMPILED)
    assert tuple(rows) == UNCOMPILED
    for row in rows.values():
        assert tuple(row) == harness.COLUMNS
        assert row["note"] == ""
        assert row["rounds"] >= 9
        assert 0 <= row["min_seconds"] <= row["median_seconds"]
        assert (row["gradient_error"] == "") == (not backward)
        assert row["gigabytes_per_second"] > 0
    assert rows["eager"]["ratio_to_eager"] == 1
    assert rows[OURS]["backend"] == SELF_ATTENTION.choose_backend("auto", torch.zeros(2, 9, 16), 16)


def test_onnx_runtime_gives_what_the_operator_gives():
    if ENGINES["onnxruntime"].missing():
        pytest.skip("needs onnx, onnxscript and onnxruntime")
    assert compare(small_problem(), "onnxruntime")["onnxruntime"]["note"] == ""


@pytest.mark.parametrize(("factor", "said"), [(1.001, "0.001 > "), (float("nan"), "nan > ")])
def test_an_engine_that_is_wrong_is_not_timed(monkeypatch, factor, said):
    forward = eager.forward
    monkeypatch.setattr(
        eager,
        "forward",
        lambda *args: (forward(*args)[0] * factor, *forward(*args)[1:]),
    )
    monkeypatch.setattr(SELF_ATTENTION, "_automatic_backend", lambda *args: "aten")
    rows = compare(small_problem(), OURS, "eager")
    assert rows[OURS]["note"].startswith(f"wrong: relative error of the output {said}")
    assert rows[OURS]["median_seconds"] == ""
    assert harness.is_error(rows[OURS])
    assert rows["eager"]["median_seconds"]


def test_an_operator_that_raises_has_failed_and_other_engines_are_absent(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(SELF_ATTENTION, "_automatic_backend", lambda *args: "aten")
    monkeypatch.setattr(eager, "backward", broken)
    monkeypatch.setattr(torch, "compile", broken)
    rows = compare(small_problem(backward=True), OURS, "compile", "eager")
    assert rows[OURS]["note"] == "failed: RuntimeError: out of registers"
    assert rows["compile"]["note"] == "absent: RuntimeError: out of registers"
    assert [harness.is_error(row) for row in rows.values()] == [True, False, False]


def test_slow_engines_are_absent(monkeypatch):
    large = Problem(Size(65536, 64), 1, torch.float32, backward=False)
    slow = [name for name, engine in ENGINES.items() if engine.too_slow(large)]
    assert slow == ["mhsa"]
    monkeypatch.setattr(harness, "LONGEST_CALL", -1.0)
    note = compare(small_problem(), "eager")["eager"]["note"]
    assert note.startswith("absent: a call takes")


@pytest.mark.parametrize("name", ["eager", "mhsa"])
def test_exact_results_do_not_depend_on_the_chunks_of_the_batch(monkeypatch, name):
    whole, chunked = (small_problem(backward=True, batch=5) for _ in range(2))
    expected = ENGINES[name].exact(whole)
    monkeypatch.setattr(engines, "EXACT_SCORES", 2 * 9**2)
    assert max(relative_errors(ENGINES[name].exact(chunked), expected)) < 1e-14
    module = whole.module(ENGINES[name].layer)
    assert [t.shape for t in expected] == [t.shape for t in whole.call(module)()]


@pytest.mark.parametrize("backward", [False, True])
def test_bytes_that_must_move_count_each_tensor_once(backward):
    module = AdditiveAttention(16, 16, 1)
    weights = 4 * sum(p.numel() for p in module.parameters())
    tokens = 4 * 2 * 9 * 16
    expected = (weights + 2 * tokens) * (1 + backward)
    assert small_problem(backward).least_bytes(module) == expected


@pytest.mark.parametrize("name", benchmarks())
def test_the_published_layer_of_an_operator_has_its_weights_and_results(name):
    problem = Problem(SMALL, 2, torch.float64, backward=False, benchmark=benchmarks()[name])
    layers = [problem.module(ENGINES[e].layer) for e in ("eager", "published")]
    ours, published = (problem.call(layer)()[0] for layer in layers)
    assert torch.allclose(ours, published, rtol=1e-12, atol=1e-12)


def test_the_sizes_are_those_of_swiftformers():
    sizes = ADDITIVE_ATTENTION.sizes
    assert len(sizes) == 14
    assert {(3136, 48), (784, 56), (196, 320), (49, 512)} <= {(s.tokens, s.width) for s in sizes}
    assert [s.name for s in ADDITIVE_ATTENTION.quick_sizes] == ["XS-1/S-1/L1-1", "XS-3", "XS-4"]


def test_only_times_of_one_comparison_are_divided():
    row = {"device": "", "threads": "", "dtype": "float32", "direction": "forward", "batch": 1}
    rows = [
        row
        | {"tokens": tokens, "width": 8, "started": started, "engine": engine}
        | {"median_seconds": seconds, "min_seconds": seconds}
        for tokens, started, engine, seconds in (
            (49, "first", OURS, 2.0),
            (49, "first", "eager", 3.0),
            (49, "second", "eager", 9.0),
            (7, "third", "eager", 9.0),
            (49, "first", "compile", ""),
        )
    ]
    found = ratios.speedups(rows)
    assert [(s.engine, s.shape.tokens, s.by_median) for s in found] == [("eager", 49, 1.5)]
    assert "| eager  |      1 | 1.50 |" in ratios.ratio_table(found)


def test_a_further_operator_is_a_fused_peer_by_one_entry(monkeypatch):
    """Judged against its own definition, with the same weights."""

    def layer(width: int, backend: str) -> AdditiveAttention:
        return AdditiveAttention(width, width, num_heads=1, pooling="softmax", backend=backend)

    made = [lambda p, b=b: layer(p.size.width, b) for b in ("aten", "reference")]
    monkeypatch.setitem(ENGINES, "other-fused", engines.Engine(*made, fused=True))
    monkeypatch.setitem(ENGINES, "other", engines.Engine(made[1]))
    rows = compare(small_problem(backward=True), OURS, "other", "other-fused")
    assert [row["note"] for row in rows.values()] == ["", "", ""]
    monkeypatch.setitem(ENGINES, "mixed-up", engines.Engine(made[0], ENGINES["eager"].layer))
    assert harness.is_error(compare(small_problem(), "mixed-up")["mixed-up"])
