"""The kernels compile for GPUs that are not there, with the arguments they are launched with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swiftkernels.reference import Options
from tests.cases import make_tensors

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from swiftkernels.triton import launch  # noqa: E402

SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448}
"""Bytes a block may use, by compute capability (CUDA C programming guide)."""

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}
COMPILE_OPTIONS = ("num_warps", "num_stages")


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[JITFunction, dict[str, Any]]]:
    """Every launch becomes an entry (kernel, arguments by name) instead of running."""
    launches: list[tuple[JITFunction, dict[str, Any]]] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}))

    monkeypatch.setattr(JITFunction, "run", record)
    return launches


def compile_launch(kernel: JITFunction, arguments: dict[str, Any], capability: int) -> Any:
    """What the just-in-time compiler would make of this launch."""
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: arguments[name] for name in COMPILE_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("width", [24, 80, 264])
def test_every_promised_alignment_holds(monkeypatch, width, images):
    """Of a slice of wider tokens, whose gradient is narrower; a GPU would fault or write astray."""
    launches = record_launches(monkeypatch)
    tensors = make_tensors(2, 21, width + 8, width, 1, dtype=torch.float16)
    x = tensors[0].transpose(1, 2).contiguous().transpose(1, 2) if images else tensors[0]
    tensors[0] = x[..., :width]
    tensors[1], tensors[3] = tensors[1][:, :width], tensors[3][:, :width]
    options = Options("l2", True, width**-0.5, 1e-12)
    out, *saved = launch.additive_self_attention_forward(*tensors, None, options)
    launch.additive_self_attention_backward(
        torch.ones_like(out), *tensors, None, tuple(saved), options, True, True
    )
    assert launches
    for kernel, arguments in launches:
        for prefix, align in (("", "ALIGN"), ("dx_", "ALIGN"), ("dout_", "DOUT_ALIGN")):
            for name in (f"{prefix}stride_b", f"{prefix}stride"):
                assert arguments.get(name, 0) % arguments.get(align, 1) == 0, (kernel, name)


@pytest.mark.parametrize(
    ("width", "dtype", "pooling", "images", "capability"),
    [
        (48, torch.float16, "l2", True, 80),
        (56, torch.bfloat16, "softmax", False, 90),
        (112, torch.float32, "sum", False, 80),
        (220, torch.float16, "l2", False, 80),
        (512, torch.bfloat16, "softmax", False, 90),
        (512, torch.float32, "l2", False, 86),
        (1024, torch.float16, "l2", False, 86),
    ],
)
def test_every_kernel_compiles_for_a_gpu(
    monkeypatch, tmp_path, width, dtype, pooling, images, capability
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = record_launches(monkeypatch)
    tensors = make_tensors(2, 49, width, width, 1, dtype=dtype)
    if images:
        tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.ones(2, 49, dtype=torch.bool)
    options = Options(pooling, True, width**-0.5, 1e-12)
    out, *saved = launch.additive_self_attention_forward(*tensors, mask, options)
    launch.additive_self_attention_backward(
        torch.ones_like(out), *tensors, mask, tuple(saved), options, True, True
    )
    assert len(launches) == (4 if width <= 64 else 5)
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, arguments in launches:
        compiled = compile_launch(kernel, arguments, capability)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], kernel.__name__
        # Half precision runs on tensor cores, by the instructions of Ampere or of Hopper.
        assert dtype == torch.float32 or "mma" in compiled.asm["ptx"], kernel.__name__
