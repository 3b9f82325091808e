"""Counts the kernels that torch.compile would launch on a CUDA GPU, and their bytes, without a GPU.

Inductor gets fake tensors on a simulated H100 and writes the code that it would run there; nothing
is compiled further or run. The launches are counted in that code. The bytes are Inductor's own
count of the buffers that each kernel reads and writes.

    python -m benchmarks.gpu.inductor '[[8, 3136, 48, "float16", false]]'

takes cases [batch, tokens, width, dtype, backward, layer] and prints one JSON object per case. It
patches much of PyTorch and must not see Triton's interpreter, so `count` runs it in a new process.
A forward and its backward are compiled as one graph. The graph need not write and read again what a
backward keeps of a forward, so the counts are underestimates.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from swiftkernels import AdditiveAttention, ConvMlp, models
from swiftkernels.ops.plan import KeepsPlans


class Case(NamedTuple):
    """A call of a layer; arguments of the command in this order."""

    batch: int
    tokens: int
    width: int
    dtype: str
    backward: bool
    layer: str = "attention"
    """A key of `LAYERS`. All but attention take square images, of as many pixels as `tokens`."""


def _network(name: str, _: int, dtype: torch.dtype) -> nn.Module:
    """A whole network in PyTorch's operators; its width is the 3 channels of its images."""
    with torch.device("meta"):
        network: nn.Module = getattr(models, name)()
    for part in network.modules():
        if isinstance(part, KeepsPlans):
            part.backend = "reference"
    return network.to(dtype).eval()


LAYERS: dict[str, Callable[[int, torch.dtype], nn.Module]] = {
    "attention": lambda width, dtype: AdditiveAttention(
        width, width, 1, backend="reference", device="meta", dtype=dtype
    ),
    "encoder": lambda width, dtype: ConvMlp(
        width, backend="reference", device="meta", dtype=dtype
    ).eval(),
    "mlp": lambda width, dtype: ConvMlp(
        width, kernel_size=None, norm=False, layer_scale=None, backend="reference", device="meta",
        dtype=dtype,
    ),
    **{
        f"swiftformer_{size}": functools.partial(_network, f"swiftformer_{size}")
        for size in ("xs", "s", "l1", "l3")
    },
}  # fmt: skip
"""Makes the eager layer of a width, in eval mode if it has a BatchNorm."""


def layer_and_input(case: Case) -> tuple[nn.Module, Tensor]:
    """The eager layer of a case and its input, on the device "meta"."""
    dtype = getattr(torch, case.dtype)
    layer = LAYERS[case.layer](case.width, dtype)
    if case.layer == "attention":
        return layer, torch.empty(case.batch, case.tokens, case.width, dtype=dtype, device="meta")
    side = math.isqrt(case.tokens)
    x = torch.empty(case.batch, case.width, side, side, dtype=dtype, device="meta")
    return layer, x.contiguous(memory_format=torch.channels_last)


class Counted(NamedTuple):
    """What Inductor would launch in a case."""

    launches: int
    matmuls: int
    """How many of the launches are matrix products of a library."""
    bytes: int


def count(cases: Iterable[Case]) -> Iterator[tuple[Case, Counted]]:
    """What Inductor would launch for the layer's eager definition, case by case as they finish.

    Raises:
        RuntimeError: the process failed; with its error output.
    """
    cases = list(cases)
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.inductor", json.dumps(cases)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        counted = 0
        for line in process.stdout:
            yield cases[counted], Counted(**json.loads(line))
            counted += 1
        errors = process.stderr.read()
    if process.returncode or counted < len(cases):
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors[-4000:]}")


def _count(case: Case) -> Counted:
    graph, shapes = _traced(case)
    found: list[Counted] = []
    with _simulated_gpu(), _counting(found):
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [FakeTensor(mode, t, torch.device("cuda", 0)) for t in shapes]
        torch._dynamo.reset()
        compiled = torch.compile(lambda *tensors: graph(*tensors))
        with mode, torch.no_grad(), contextlib.suppress(_CodeIsWritten):
            compiled(*fakes)
    (counted,) = found
    return counted


def _traced(case: Case) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The eager layer as a graph of operators, and its inputs as meta tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    module, x = layer_and_input(case)
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    tensors |= {name: t for name, t in module.named_buffers() if t.is_floating_point()}
    names = list(tensors)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x,)
        )
        return out

    def call_and_differentiate(dout: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = call(*leaves)
            return out, *torch.autograd.grad(out, leaves, dout)

    inputs = [x, *(t.detach() for t in tensors.values())]
    if case.backward:
        inputs = [torch.empty_like(x), *inputs]
    with torch.no_grad():
        graph = make_fx(call_and_differentiate if case.backward else call)(*inputs)
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    return graph, inputs


class _CodeIsWritten(BaseException):
    """Stops Inductor. It is not an `Exception`, which Inductor would wrap."""


@contextlib.contextmanager
def _counting(found: list[Counted]) -> Iterator[None]:
    """Record the counts as soon as the code is written, and stop Inductor there."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    codegen = GraphLowering.codegen

    def count_and_leave(self: Any) -> Any:
        written = codegen(self)
        code: Any = getattr(written[0], "value", written[0])
        body = code.split("def call(", 1)[1]
        kernels = re.findall(r"^\s+triton_\w+\.run\(", body, re.M)
        libraries = re.findall(r"^\s+(?:\w+ = )?extern_kernels\.\w+\(", body, re.M)
        others = re.findall(r"^\s+(?:\w+ = )?torch\.ops\.(?!inductor)\S+\(", body, re.M)
        launches = len(kernels) + len(libraries) + len(others)
        found.append(Counted(launches, len(libraries), int(self.count_bytes()[0])))
        raise _CodeIsWritten

    quiet = config.patch(
        fx_graph_cache=False,
        fx_graph_remote_cache=False,
        compile_threads=1,
        joint_graph_constant_folding=False,
    )
    with mock.patch.object(GraphLowering, "codegen", count_and_leave), quiet:
        yield


@contextlib.contextmanager
def _simulated_gpu() -> Iterator[None]:
    """Simulate an H100 for PyTorch and Triton, as far as they need it to write code."""
    import torch._dynamo.device_interface as device_interface
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    properties = SimpleNamespace(
        name="NVIDIA H100",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 << 30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )

    def always(value: Any) -> Any:
        return staticmethod(lambda *_, **__: value)

    no_context = type(
        "device",
        (),
        {"__init__": lambda *_: None, "__enter__": lambda *_: None, "__exit__": lambda *_: None},
    )
    worker = type(
        "Worker",
        (),
        {
            "set_device": always(None),
            "current_device": always(0),
            "get_device_properties": always(properties),
        },
    )
    interface = type(
        "SimulatedCuda",
        (device_interface.DeviceInterface,),
        {
            "device": no_context,
            "Worker": worker,
            "Event": object,
            "current_device": always(0),
            "set_device": always(None),
            "device_count": always(1),
            "is_available": always(True),
            "synchronize": always(None),
            "get_device_properties": always(properties),
            "get_compute_capability": always(90),
            "is_bf16_supported": always(True),
            "is_triton_capable": always(True),
            "raise_if_triton_unavailable": always(None),
            "get_raw_stream": always(0),
            "exchange_device": always(0),
            "maybe_exchange_device": always(0),
            "current_stream": always(None),
            "memory_allocated": always(0),
        },
    )
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda *_: 0,
            set_current_device=lambda *_: None,
            get_active_torch_device=lambda: torch.device("cuda", 0),
        )
    )
    device_interface.get_interface_for_device("cpu")  # registers the real ones first
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, interface)

    answers: dict[str, dict[str, Any]] = {
        "torch.cuda": {
            "is_available": True,
            "get_device_properties": properties,
            "get_device_capability": (9, 0),
            "current_device": 0,
            "device_count": 1,
            "_lazy_init": None,
            "is_initialized": False,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": None,
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
            "synchronize": None,
        },
        "torch.utils._triton": {
            "has_triton": True,
            "has_triton_package": True,
            "has_triton_tma": False,
            "has_triton_tma_device": False,
            "has_triton_stable_tma_api": False,
        },
        "torch._inductor.scheduler": {"has_triton": True},
        "torch._inductor.codecache": {"has_triton": True},
        "torch._inductor.compile_fx": {"has_triton": True},
        "torch._inductor.utils": {"has_triton": True},
        # Patterns that are traced on the device at their first use.
        "torch._inductor.fx_passes.fuse_attention": {"_sfdp_init": None},
        "torch._inductor.fx_passes.misc_patterns": {"_misc_patterns_init": None},
        "torch._inductor.fx_passes.pad_mm": {"_pad_mm_init": None},
    }
    with contextlib.ExitStack() as patches:
        for module_name, names in answers.items():
            module = importlib.import_module(module_name)
            for name, value in names.items():
                if hasattr(module, name):
                    answer = mock.Mock(return_value=value)
                    patches.enter_context(mock.patch.object(module, name, answer))
        yield


if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        print(json.dumps(_count(Case(*arguments))._asdict()), flush=True)
