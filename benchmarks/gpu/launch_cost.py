"""What a call costs the host until its kernels are launched, measured without a GPU.

    python -m benchmarks.gpu.launch_cost

Triton gets a driver of a simulated H100: kernels are compiled as usual, and the launcher, which
would pass a kernel to the GPU, does nothing. The result is the time of Python, PyTorch and Triton
on this machine's CPU, with tensors in its memory. The GEMMs on the layer's weights do run, but the
layer is so narrow that they take almost no time. The query of CUDA's current device and stream, the
launcher, and CUDA's allocator are not included.

For comparison: a module that does nothing, `nn.Linear`, an autograd function with the same inputs
and gradients that computes nothing, and the same kernels launched by Triton's own lookup. All are
measured in turn, in process time on one thread. Writes gpu_launch_cost.csv and the page
docs/gpu_evidence.md.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

from benchmarks.gpu import report
from benchmarks.gpu.report import LAUNCH_COST_CSV
from swiftkernels import AdditiveAttention
from swiftkernels.backends import devices, torch_state
from swiftkernels.ops.additive_attention.triton import launch
from swiftkernels.testing.timing import Stopwatch, interleave
from swiftkernels.utils import command
from swiftkernels.utils.files import make_folder, write_csv

WIDTH = 16
SHAPES = {"tokens": (1, 49, WIDTH), "image": (1, WIDTH, 7, 7)}
CALLS = 50
"""Calls in a turn."""

LOOKING_UP = "the same by Triton's lookup"


@dataclass(frozen=True)
class Cost:
    """One row of gpu_launch_cost.csv."""

    what: str
    input: str
    dtype: str
    direction: str
    microseconds: float
    """Median of the turns."""
    spread: float
    """Interquartile range."""
    fastest: float
    device: str
    torch: str
    triton: str


class Utils:
    """The utilities of a driver that loads no binaries."""

    def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
        return None, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}


class Driver:
    """Like Triton's driver for CUDA, with a launcher that launches nothing."""

    utils = Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None


class _Nothing(torch.autograd.Function):
    """An autograd function with the inputs and gradients of a layer, and no computation."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return tuple([torch.empty_like(t) for t in ctx.saved_tensors])


Calls = dict[tuple[str, str], Callable[[], object]]
"""The calls by name and direction."""


def measure(seconds: float) -> list[Cost]:
    """All rows; `seconds` for each direction, input and dtype."""
    costs = []
    for name, shape in SHAPES.items():
        for dtype in (torch.float16, torch.float32):
            calls = _calls(torch.randn(shape, dtype=dtype))
            for direction in ("forward", "forward+backward"):
                turns = {
                    what: _turn(what, call) for (what, d), call in calls.items() if d == direction
                }
                with torch.set_grad_enabled(direction != "forward"):
                    timings = interleave(turns, Stopwatch("cpu"), seconds)
                costs += [
                    Cost(
                        what=what,
                        input=name,
                        dtype=str(dtype).removeprefix("torch."),
                        direction=direction,
                        microseconds=_microseconds(timing.median),
                        spread=_microseconds(timing.spread),
                        fastest=_microseconds(timing.minimum),
                        device=devices.name(torch.device("cpu")),
                        torch=torch.__version__,
                        triton=triton.__version__,
                    )
                    for what, timing in timings.items()
                ]
    return costs


def _microseconds(turn: float) -> float:
    return round(1e6 * turn / CALLS, 1)


def _calls(x: Tensor) -> Calls:
    """The calls for x, with all kernels compiled."""
    linear = nn.Linear(WIDTH, WIDTH, dtype=x.dtype)
    identity = nn.Identity()
    leaf = x.clone().requires_grad_()
    dout = torch.ones_like(x)

    def make_layer() -> AdditiveAttention:
        return AdditiveAttention(WIDTH, WIDTH, 1, backend="triton", dtype=x.dtype)

    parameters = tuple(make_layer().parameters())

    def step(call: Callable[[Tensor], Tensor], parameters: tuple[Tensor, ...]) -> object:
        return torch.autograd.grad(call(leaf), (leaf, *parameters), dout)

    def step_of_nothing() -> object:
        return step(lambda x: _Nothing.apply(x, *parameters), parameters)

    calls: Calls = {("nn.Identity", "forward"): lambda: identity(x)}
    for what in ("AdditiveAttention", LOOKING_UP):
        layer = make_layer()  # each has its own plans
        calls[what, "forward"] = functools.partial(layer, x)
        calls[what, "forward+backward"] = functools.partial(step, layer, tuple(layer.parameters()))
    if x.dim() == 3:
        calls["nn.Linear", "forward"] = lambda: linear(x)
        calls["nn.Linear", "forward+backward"] = lambda: step(linear, tuple(linear.parameters()))
    calls["empty autograd function", "forward+backward"] = step_of_nothing
    for (what, direction), call in calls.items():
        with torch.set_grad_enabled(direction != "forward"):
            _turn(what, call, 2)()
    return calls


def _never(*_: object) -> bool:  # a mock would take longer than the function it replaces
    return False


def _turn(what: str, call: Callable[[], object], calls: int = CALLS) -> Callable[[], None]:
    def turn() -> None:
        with contextlib.ExitStack() as stack:
            if what == LOOKING_UP:  # as for tensors with unusual strides
                stack.enter_context(mock.patch.object(launch, "fits_kernels", _never))
            for _ in range(calls):
                call()

    return turn


def main() -> None:
    parser = command.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results"), help="folder to write to (%(default)s)")
    add("--seconds", type=float, default=3.0, help="for each measurement (%(default)s)")
    given = parser.parse_args()
    make_folder("--out", given.out)
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    with mock.patch.object(torch_state, "triton_takes", return_value=True):
        costs = measure(given.seconds)
    for cost in costs:
        print(
            f"{cost.what:29}{cost.input:8}{cost.dtype:9}{cost.direction:18}"
            f"{cost.microseconds:8.1f} us"
        )
    write_csv(given.out / LAUNCH_COST_CSV, [asdict(cost) for cost in costs], digits=6)
    print(f"wrote {given.out / LAUNCH_COST_CSV} and {report.write(given.out)}")


if __name__ == "__main__":
    sys.exit(command.run(main))
