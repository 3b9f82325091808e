"""Every lane of every load and store: inside its tensors, free of races, nothing left unwritten.

First the trace itself, on small kernels that are right and on ones that are wrong on purpose; then
the library's kernels; then each of them with one mask removed, which must be found.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import swiftkernels.backends.triton
import swiftkernels.fusion.triton
import swiftkernels.ops.additive_attention.triton
import swiftkernels.ops.conv_mlp.triton
from swiftkernels.fusion.steps import Convolution
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.conv_mlp import weights as conv_mlp
from swiftkernels.ops.operator import Needs
from swiftkernels.testing.cases import (
    backward_by,
    convert,
    forward_by,
    make_mask,
    make_query_key_tensors,
    make_tensors,
)
from swiftkernels.testing.triton_trace import Launch, MemoryFaultError, trace
from tests.ops.conv_mlp.cases import make_tensors as make_conv_mlp_tensors

BLOCK = 16


@triton.jit
def _scale_kernel(x_ptr, out_ptr, n, stride, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets * stride, mask=mask) * 2, mask=mask)


@triton.jit
def _load_everything(ptr, BLOCK: tl.constexpr):
    return tl.load(ptr + tl.arange(0, BLOCK))


@triton.jit
def _unmasked_load_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, _load_everything(x_ptr, BLOCK), mask=cols < n)


@triton.jit
def _unmasked_store_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, tl.load(x_ptr + cols, mask=cols < n))


@triton.jit
def _before_the_start_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, tl.load(x_ptr + cols - 1))


@triton.jit
def _overlapping_programs_kernel(out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, offsets.to(tl.float32))


@triton.jit
def _read_of_a_neighbour_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + BLOCK - 1 - tl.arange(0, BLOCK)))


@triton.jit
def _colliding_lanes_kernel(out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols // 2, cols.to(tl.float32))


@triton.jit
def _overwriting_kernel(out_ptr, shift, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, cols.to(tl.float32))
    tl.store(out_ptr + shift + cols, cols.to(tl.float32))


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + offsets))


@triton.jit
def _lock_kernel(lock_ptr, shift):
    tl.atomic_cas(lock_ptr + shift, 0, 1)


@triton.jit
def _descriptor_kernel(x_descriptor, out_ptrs, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    values = tl.reshape(x_descriptor.load([row, 0]), [BLOCK])
    tl.store(out_ptrs[0] + row * BLOCK + tl.arange(0, BLOCK), values)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    offsets = rows * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets))
    tl.store(out_ptr + offsets, product)


def findings(run: Callable[[], object], **options: bool) -> list[Any]:
    """What the trace finds."""
    with trace(check=False, **options) as launches:
        run()
    return [finding for one in launches for finding in one.findings]


def only_finding(run: Callable[[], object]) -> Any:
    (finding,) = findings(run)
    return finding


def test_a_right_kernel_computes_as_ever_and_is_counted():
    x, out = torch.arange(40.0), torch.empty(40)
    with trace() as launches:
        _scale_kernel[(3,)](x, out, 40, 1, BLOCK=BLOCK)
    assert torch.equal(out, 2 * x)
    (one,) = launches
    assert (one.kernel, one.grid, one.programs) == ("_scale_kernel", (3, 1, 1), 3)
    assert (one.loads.requested, one.loads.distinct) == (160, 160)
    assert (one.requested, one.distinct) == (320, 320)


def test_distinct_bytes_are_whole_sectors_once():
    """Every eighth float32 fills a sector of its own; what all programs read counts once."""
    x, out = torch.arange(320.0)[::8], torch.empty(40)
    with trace() as launches:
        _scale_kernel[(3,)](x, out, 40, 8, BLOCK=BLOCK)
        _atomic_kernel[(2,)](torch.ones(32), torch.zeros(16), BLOCK=BLOCK)
    strided, atomic = launches
    assert (strided.loads.requested, strided.loads.distinct) == (160, 40 * 32)
    # Atomics load and store: 2 programs x 16 lanes on the 64 bytes of the sum.
    assert (atomic.stores.requested, atomic.stores.distinct) == (128, 64)
    assert (atomic.loads.requested, atomic.loads.distinct) == (256, 192)


def test_sectors_begin_where_a_gpu_has_them():
    """16 floats from the middle of a sector on touch three, wherever the host keeps them."""
    whole = torch.zeros(64)
    with trace(complete=False) as launches:
        _scale_kernel[(1,)](whole[4:], torch.empty(16), 16, 1, BLOCK=BLOCK)
    assert launches[0].loads.distinct == 96


def test_dot_products_are_counted():
    a, b, out = torch.ones(16, 16), torch.ones(16, 16), torch.empty(16, 16)
    with trace() as launches:
        _dot_kernel[(1,)](a, b, out, BLOCK=BLOCK)
    assert launches[0].dot_flops == 2 * 16**3


def test_a_load_out_of_bounds_is_described():
    x, out = torch.ones(10), torch.empty(10)
    finding = only_finding(lambda: _unmasked_load_kernel[(1,)](x, out, 10, BLOCK=BLOCK))
    assert (finding.rule, finding.kernel) == ("out of bounds", "_unmasked_load_kernel")
    assert (finding.argument, finding.offset, finding.count) == ("x_ptr", 10, 6)
    # The line of the kernel, and the line of the helper that it calls.
    kernel_line, helper_line = finding.place.split("\n")
    assert "in _unmasked_load_kernel: tl.store(out_ptr" in kernel_line
    assert "in _load_everything: return tl.load(ptr" in helper_line
    assert Path(__file__).name in kernel_line
    assert torch.equal(out, x)


def test_findings_are_raised():
    x, out = torch.ones(10), torch.empty(10)
    expected = r"out of bounds.*'x_ptr', element 10; 6 in all"
    with pytest.raises(MemoryFaultError, match=expected), trace():
        _unmasked_load_kernel[(1,)](x, out, 10, BLOCK=BLOCK)


def test_a_store_out_of_bounds_does_no_harm():
    whole = torch.zeros(30)
    run = _unmasked_store_kernel[(1,)]
    finding = only_finding(lambda: run(torch.ones(10), whole[:10], 10, BLOCK=BLOCK))
    assert (finding.rule, finding.argument, finding.count) == ("out of bounds", "out_ptr", 6)
    assert whole.sum() == 10


def test_an_access_before_the_start_is_found():
    run = _before_the_start_kernel[(1,)]
    finding = only_finding(lambda: run(torch.ones(16), torch.empty(16), BLOCK=BLOCK))
    assert (finding.rule, finding.argument, finding.offset) == ("out of bounds", "x_ptr", -1)


def test_gaps_of_a_slice_are_out_of_bounds():
    """Of [16, 1] out of [16, 2] a kernel that forgets the stride reads the other column."""
    whole = torch.ones(16, 2)
    run = _scale_kernel[(1,)]
    finding = only_finding(lambda: run(whole[:, 0], torch.empty(16), 16, 1, BLOCK=BLOCK))
    assert (finding.rule, finding.argument) == ("out of bounds", "x_ptr")
    assert findings(lambda: run(whole[:, 0], torch.empty(16), 16, 2, BLOCK=BLOCK)) == []


def test_neighbours_in_one_buffer_are_kept_apart():
    """Past the end of one half of a buffer begins the other half, another argument."""
    both = torch.ones(2, 10)
    run = _unmasked_load_kernel[(1,)]
    finding = only_finding(lambda: run(both[0], both[1], 10, BLOCK=BLOCK))
    assert (finding.rule, finding.argument, finding.offset) == ("out of bounds", "x_ptr", 10)


def test_programs_that_write_one_element_are_found():
    out = torch.empty(31)
    finding = only_finding(lambda: _overlapping_programs_kernel[(2,)](out, BLOCK=BLOCK))
    assert (finding.rule, finding.argument, finding.offset) == ("race", "out_ptr", 15)


def test_a_read_of_what_another_program_wrote_is_found():
    x = torch.ones(32)
    finding = only_finding(lambda: _read_of_a_neighbour_kernel[(2,)](x, BLOCK=BLOCK))
    assert (finding.rule, finding.argument, finding.offset) == ("race", "x_ptr", 15)


def test_an_alias_does_not_hide_a_race():
    """The same memory as two arguments: program 1 writes what program 0 read."""
    x = torch.ones(48)
    found = findings(lambda: _scale_kernel[(2,)](x[:32], x[16:], 32, 1, BLOCK=BLOCK))
    assert {finding.rule for finding in found} == {"race"}


def test_atomics_do_not_race_with_each_other():
    out = torch.zeros(16)
    assert findings(lambda: _atomic_kernel[(3,)](torch.ones(48), out, BLOCK=BLOCK)) == []
    assert torch.equal(out, torch.full((16,), 3.0))


def test_a_lock_out_of_bounds_is_described():
    """The interpreter cannot leave it out: the kernel ends there, and the finding says why."""
    with pytest.raises(MemoryFaultError, match=r"out of bounds.*'lock_ptr', element 1;"), trace():
        _lock_kernel[(1,)](torch.zeros(1, dtype=torch.int32), 1)
    lock = torch.zeros(1, dtype=torch.int32)
    assert findings(lambda: _lock_kernel[(2,)](lock, 0)) == []
    assert lock == 1


def test_lanes_that_collide_are_found():
    run = _colliding_lanes_kernel[(1,)]
    finding = only_finding(lambda: run(torch.empty(8), BLOCK=BLOCK))
    assert (finding.rule, finding.argument, finding.count) == ("lanes collide", "out_ptr", 8)


def test_a_second_store_from_another_lane_is_found():
    """Another lane may be another thread, and nothing orders the two; the same lane is ordered."""
    run = _overwriting_kernel[(1,)]
    finding = only_finding(lambda: run(torch.empty(28), 12, BLOCK=BLOCK))
    assert (finding.rule, finding.argument) == ("overwritten", "out_ptr")
    assert (finding.offset, finding.count) == (12, 4)
    assert findings(lambda: run(torch.empty(16), 0, BLOCK=BLOCK)) == []


def test_elements_left_unwritten_are_found():
    x, out = torch.ones(40), torch.empty(40)

    def run() -> None:
        _scale_kernel[(2,)](x, out, 40, 1, BLOCK=BLOCK)

    finding = only_finding(run)
    assert (finding.rule, finding.argument) == ("not written", "out_ptr")
    assert (finding.offset, finding.count) == (32, 8)
    assert findings(run, complete=False) == []


def test_empty_tensors_are_no_trouble():
    nothing = torch.empty(0)
    run = _scale_kernel[(1,)]
    assert findings(lambda: run(nothing, torch.empty(0), 0, 1, BLOCK=BLOCK)) == []
    finding = only_finding(lambda: _overlapping_programs_kernel[(1,)](nothing, BLOCK=BLOCK))
    assert (finding.rule, finding.argument, finding.count) == ("out of bounds", "out_ptr", 16)


def test_tensors_in_descriptors_and_tuples_are_followed():
    x, out = torch.randn(3, 16), torch.empty(3, 16)
    descriptor = TensorDescriptor.from_tensor(x, [1, 16])
    with trace() as launches:
        _descriptor_kernel[(3,)](descriptor, (out,), BLOCK=BLOCK)
    assert torch.equal(out, x)
    assert (launches[0].loads.distinct, launches[0].stores.distinct) == (192, 192)


def test_reinterpreted_tensors_are_followed():
    bits, out = torch.arange(16, dtype=torch.int32), torch.empty(16)
    with trace() as launches:
        _scale_kernel[(1,)](triton.reinterpret(bits, tl.float32), out, 16, 1, BLOCK=BLOCK)
    assert torch.equal(out, 2 * bits.view(torch.float32))
    assert launches[0].loads.distinct == 64


def test_outside_a_trace_nothing_is_replaced():
    before = triton.runtime.interpreter.GridExecutor.__call__
    with trace():
        assert triton.runtime.interpreter.GridExecutor.__call__ is not before
    assert triton.runtime.interpreter.GridExecutor.__call__ is before


# The library.

Run = Callable[[ModuleType], None]
"""Runs forward and backward by the given `triton/launch.py`, or a mutant of it."""


def layer_run(
    n_tokens: int,
    in_dims: int,
    token_dim: int,
    heads: int = 1,
    *,
    pooling: str = "l2",
    masked: bool = False,
    images: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """The layer on two sequences of tokens or, transposed in memory, images."""
    tensors = make_tensors(2, n_tokens, in_dims, token_dim, heads, dtype=dtype)
    if images:
        tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    options = Options(pooling, True, token_dim**-0.5, 1e-12)
    mask = make_mask(2, n_tokens) if masked else None

    def run(module: ModuleType) -> None:
        out, saved = forward_by(module, tensors, mask, options)
        backward_by(module, torch.ones_like(out), tensors, mask, saved, options)

    return run


def residual_run(n_tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Run:
    """The layer in inference, with its residual branch."""
    x, *weights = make_tensors(2, n_tokens, width, width, dtype=dtype)
    assert x is not None
    options = Options("l2", True, width**-0.5, 1e-12)

    def run(module: ModuleType) -> None:
        given, residual = Weights(*weights), module.Residual(x, torch.rand(width))
        if module.is_wide(width):
            module.wide.infer(x, module.wide.pack(given), options, residual)
        else:
            module.forward((x,), given, None, options, "", residual)

    return run


def query_key_run(n_tokens: int, width: int, pooling: str, masked: bool) -> Run:
    """From given queries and keys, two halves of one buffer."""
    q, k, *weights = make_query_key_tensors(2, n_tokens, 8, width, 1, dtype=torch.float32)
    both = torch.cat([q, k], dim=2)
    tensors = [*both.chunk(2, dim=2), *weights]
    options = Options(pooling, True, width**-0.5, 1e-12)
    mask = make_mask(2, n_tokens) if masked else None

    def run(module: ModuleType) -> None:
        out, saved = forward_by(module, tensors, mask, options)
        backward_by(module, torch.ones_like(out), tensors, mask, saved, options)

    return run


RUNS: dict[str, Run] = {
    "one token": layer_run(1, 24, 24),
    "E 24, images, masked": layer_run(67, 24, 24, images=True, masked=True, pooling="softmax"),
    "E 37, C 20, float16": layer_run(35, 20, 37, dtype=torch.float16),
    "E 48": layer_run(33, 48, 48),
    "E 72, not fused": layer_run(37, 72, 72),
    "E 72, images, float16": layer_run(
        70, 72, 72, images=True, masked=True, pooling="softmax", dtype=torch.float16
    ),
    "two heads, D 40": layer_run(17, 30, 40, 2, pooling="linear"),
    "queries and keys": query_key_run(35, 24, "softmax", masked=True),
    "residual branch": residual_run(35, 20),
    "E 132, wide, float16": layer_run(37, 132, 132, dtype=torch.float16),
    "residual branch, wide, float16": residual_run(35, 132, torch.float16),
}


def conv_mlp_run(
    channels: int,
    kernel: int | None,
    image: tuple[int, int] = (5, 4),
    out_dims: int = 0,
    images: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """conv_mlp in training and, with a BatchNorm, in inference."""
    D = out_dims or channels
    x, *tensors = convert(make_conv_mlp_tensors((3, channels, *image), 40, kernel, D), dtype)
    assert x is not None
    if not images:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = conv_mlp.Weights(*tensors)
    options = conv_mlp.Options("gelu", channels == D)
    norm = [torch.rand(channels) for _ in range(4)]

    def run(module: ModuleType) -> None:
        out, saved = module.forward((x,), weights, None, options, "statistics")
        if kernel is None:
            module.backward(out, (x,), weights, None, saved, options, Needs(True, True))
        module.infer(x, weights, module.Norm(*norm), 1e-5, options)
        if weights.depthwise_weight is not None:
            packed = module.taps_first(weights.depthwise_weight)
            first = weights._replace(depthwise_weight=packed)
            module.infer(x, first, module.Norm(), 0.0, options)

    return run


CONV_MLP_RUNS: dict[str, Run] = {
    "3 x 3": conv_mlp_run(20, 3),
    "5 x 5, images": conv_mlp_run(37, 5, images=True, dtype=torch.float16),
    "pointwise": conv_mlp_run(24, None, (1, 3)),
    "pointwise, images, D 70, splits": conv_mlp_run(12, None, (7, 19), 70, images=True),
    "3 x 3, wide, float16": conv_mlp_run(132, 3, dtype=torch.float16),
    "pointwise, images, wide, float16": conv_mlp_run(
        132, None, (7, 10), images=True, dtype=torch.float16
    ),
}


def convolution_run(
    channels: int, out_channels: int, kernel: int, image: tuple[int, int], channels_last: bool
) -> Run:
    """A convolution of stride 2 with ReLU."""
    weight = torch.randn(out_channels, channels, kernel, kernel)
    step = Convolution(weight, torch.randn(out_channels), 2, kernel // 2, "relu")
    x = torch.randn(2, channels, *image)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def run(module: ModuleType) -> None:
        module.ConvolutionPlan(x, step)(x, module.pack(step), None, None)

    return run


CONVOLUTION_RUNS: dict[str, Run] = {
    "3 x 3": convolution_run(6, 20, 3, (5, 8), True),
    "5 x 5, images": convolution_run(3, 70, 5, (9, 4), False),
}


class Library(NamedTuple):
    """The Triton kernels of an operator, and runs of them."""

    package: ModuleType
    runs: dict[str, Run]

    @property
    def sources(self) -> list[Path]:
        return sorted(p for package in (self.package, SHARED) for p in _modules(package))


def _modules(package: ModuleType) -> Iterable[Path]:
    return Path(package.__path__[0]).glob("[!_]*.py")


SHARED = swiftkernels.backends.triton
LIBRARIES = {
    "additive_attention": Library(swiftkernels.ops.additive_attention.triton, RUNS),
    "conv_mlp": Library(swiftkernels.ops.conv_mlp.triton, CONV_MLP_RUNS),
    "fusion": Library(swiftkernels.fusion.triton, CONVOLUTION_RUNS),
}


@pytest.mark.parametrize(
    ("library", "name"), [(key, name) for key, one in LIBRARIES.items() for name in one.runs]
)
def test_the_kernels_are_clean(library, name):
    one = LIBRARIES[library]
    with trace() as launches:
        one.runs[name](importlib.import_module(f"{one.package.__name__}.launch"))
    assert launches


# Mutants: the library's kernels with one mask removed.


class _DropMask(ast.NodeTransformer):
    """Removes the mask of the call at one place (with `other`, which needs a mask)."""

    def __init__(self, place: tuple[int, int]) -> None:
        self.place = place

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if (node.lineno, node.col_offset) == self.place:
            node.keywords = [k for k in node.keywords if k.arg not in ("mask", "other")]
        return node


Mask = tuple[str, str, int, int]
"""Of a load or store with a mask: library, file, line, column."""


def masks() -> list[Mask]:
    """All of them; those of the files that the libraries share only once."""
    found: dict[tuple[str, int, int], str] = {}
    for key, library in LIBRARIES.items():
        for source in library.sources:
            for node in ast.walk(ast.parse(source.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and any(k.arg == "mask" for k in node.keywords)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in ("load", "store")
                ):
                    found.setdefault((str(source), node.lineno, node.col_offset), key)
    return [(key, Path(file).name, *place) for (file, *place), key in found.items()]


MASKS = masks()
SOME_MASKS = [
    mask
    for key, count in zip(LIBRARIES, (4, 3, 2), strict=True)
    for own in [[mask for mask in MASKS if mask[0] == key]]
    for mask in own[:: max(len(own) // count, 1)]
]
_numbers = itertools.count()


@pytest.fixture
def mutate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Makes copies of the Triton code without one mask, and imports their `launch`."""
    names: list[str] = []

    def make(key: str, file: str, line: int, column: int) -> ModuleType:
        name = f"mutant_{next(_numbers)}"
        names.append(name)
        folder = tmp_path / name
        folder.mkdir()
        for source in LIBRARIES[key].sources:
            text = source.read_text()
            if source.name == file:
                tree = _DropMask((line, column)).visit(ast.parse(text))
                text = ast.unparse(tree)
            for package in (LIBRARIES[key].package, SHARED):
                text = text.replace(package.__name__, name)
            (folder / source.name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.launch")

    yield make
    for module in [m for m in sys.modules if m.split(".")[0] in names]:
        del sys.modules[module]
    shutil.rmtree(tmp_path)


def faults(module: ModuleType, runs: dict[str, Run]) -> Iterator[Launch]:
    """Launches with findings, of all runs, one after the other."""
    for run in runs.values():
        with trace(check=False) as launches:
            run(module)
        yield from (one for one in launches if one.findings)


def check_mutant(mutate: Callable[..., ModuleType], mask: Mask) -> None:
    fault = next(faults(mutate(*mask), LIBRARIES[mask[0]].runs), None)
    assert fault is not None, "no run of {} needs the mask at {}:{}:{}".format(*mask)


@pytest.mark.parametrize("mask", SOME_MASKS, ids="{0[0]}:{0[1]}:{0[2]}".format)
def test_some_missing_masks_are_found(mutate, mask):
    check_mutant(mutate, mask)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS, ids="{0[0]}:{0[1]}:{0[2]}:{0[3]}".format)
def test_every_missing_mask_is_found(mutate, mask):
    check_mutant(mutate, mask)


@pytest.mark.parametrize(
    ("library", "name"),
    [("additive_attention", "E 24, images, masked"), ("conv_mlp", "3 x 3"), ("fusion", "3 x 3")],
)
def test_a_mutant_without_mutation_is_clean(mutate, library, name):
    with trace():
        LIBRARIES[library].runs[name](mutate(library, "", 0, 0))
