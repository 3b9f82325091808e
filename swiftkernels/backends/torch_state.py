"""Everything that is private in PyTorch or depends on its version."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_NO_GUARD: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def device_guard(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of `t` the current one for launches; does nothing if it is already."""
    device = t.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu" and device.index != torch.xpu.current_device():
        return torch.xpu.device(device)
    return _NO_GUARD


def allow_tf32(convolution: bool = False) -> bool:
    """Whether the user allows TF32 for the operands of float32 matrix products or convolutions.

    PyTorch's own default is no for products, and yes for convolutions.
    """
    # torch.backends.cuda.matmul.allow_tf32 raises once the newer setting has been used.
    kind = "conv" if convolution else "matmul"
    return bool(torch._C._get_fp32_precision_getter("cuda", kind) == "tf32")


def numerics() -> tuple[object, ...]:
    """PyTorch's settings that decide which kernels compute an operator on a GPU."""
    precision = torch._C._get_fp32_precision_getter
    return (
        precision("cuda", "matmul"),
        precision("cuda", "conv"),
        torch._C._get_deterministic_algorithms(),
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
    )


def why_not_graphs(device: torch.device) -> str:
    """Why there are no CUDA graphs on that device; empty if there are."""
    return "" if device.type == "cuda" else f"CUDA graphs need a CUDA device; got {device}"


@contextlib.contextmanager
def new_workspaces() -> Iterator[None]:
    """Inside, and afterwards, cuBLAS allocates its workspaces anew.

    A graph that is captured inside has workspaces in its own memory. Otherwise graphs that were
    captured in one stream would share workspaces, wherever they are replayed.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # only in CUDA builds
    clear()
    try:
        yield
    finally:
        clear()


def fits_kernels(*tensors: Tensor | None) -> bool:
    """Whether tensors fit kernels that were compiled for aligned tensors of ordinary size.

    Triton compiles different kernels for addresses that are multiples of 16 and for others and, on
    AMD's GPUs, for tensors within the reach of 32-bit offsets and for larger ones.
    """
    for t in tensors:  # a generator takes twice as long
        if t is not None and (
            t.data_ptr() % 16 or not (_ANY_SIZE or t.untyped_storage().nbytes() < 2**31)
        ):
            return False
    return True


_ANY_SIZE = torch.version.hip is None


@functools.cache
def has_triton() -> bool:
    """Whether the triton package is installed (it is not imported)."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors, under TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_takes(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of that device."""
    if not has_triton():
        return False
    if device.type == "cpu":
        return interpreting()
    return device.type in ("cuda", "xpu")


@functools.cache
def too_old_for_triton(device: torch.device) -> str:
    """The compute capability of a CUDA device that is too old for Triton's tensor cores, or ""."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"{major}.{minor}"


def transforming() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode AD is running."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_under_compile(function: _Function) -> _Function:
    """Let torch.compile call `function` while it traces, and use the result as a constant.

    `torch.compiler.assume_constant_result` does the same, but imports half of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_LISTS_ATTRIBUTES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


def lists_attributes() -> bool:
    """Whether torch.compile, where it traces, can list the attributes of a module.

    Those of torch 2.10 and 2.11 can only read an attribute by its name.
    """
    return _LISTS_ATTRIBUTES or not torch.compiler.is_compiling()


@constant_under_compile  # torch 2.10 cannot trace it
def _autocast_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for that type of device."""
    return _autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast casts x to for a linear layer; None if it does not cast x."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not autocasts(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def autocast_off(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off where it is on: inside an operator the types are final."""
    if (torch.compiler.is_compiling() or any_autocast()) and autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NO_GUARD


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call on these may skip PyTorch's dispatcher, because nothing listens there.

    Pass the input, or the gradient of the output, first. It may be zeros without memory, which
    autograd makes and only the dispatcher reads; the others are not tested for that.
    """
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return False
    for t in tensors:  # called at every call: a generator takes twice as long as a loop
        # Only the dispatcher negates tensors that are negated lazily.
        if t is not None and (type(t) not in _PLAIN or t.is_meta or t.is_neg()):
            return False
    return tensors[0] is None or not tensors[0]._is_zerotensor()


def nothing_listens() -> bool:
    """Whether no transform, mode, trace or forward-mode AD has to see the operators.

    It is cheap, because every call needs it. Under torch.compile it is a constant.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a hook runs before or after a call of the module, or in its backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_GLOBAL_HOOKS = (
    _modules._global_forward_hooks,
    _modules._global_forward_pre_hooks,
    _modules._global_backward_hooks,
    _modules._global_backward_pre_hooks,
)


def has_global_hooks() -> bool:
    """Whether hooks of all modules are registered, as by FLOP counters and module trackers."""
    return any(_GLOBAL_HOOKS)


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """Inside, calls of modules do not run the hooks of all modules."""
    before = [dict(hooks) for hooks in _GLOBAL_HOOKS]
    for hooks in _GLOBAL_HOOKS:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, old in zip(_GLOBAL_HOOKS, before, strict=True):
            hooks.update(old)


def default_in_trace(argument: object, name: str, default: object) -> object:
    """The value of a module's argument while `torch.fx` traces the module.

    torch.fx passes a proxy for every argument of the root module. An argument with that default is
    replaced by the default; the traced module raises if it is called with another value.
    """
    if not (isinstance(argument, fx.Proxy) and argument.node.op == "placeholder"):
        return argument
    if argument.node.args != (default,):
        return argument
    argument.tracer.create_proxy("call_function", _check_default, (argument, name, default), {})
    return default


def _check_default(argument: object, name: str, default: object) -> None:
    if argument is not default:
        raise ValueError(
            f"{name} must be {default}, as it was when torch.fx traced the module; got a "
            f"{type(argument).__name__}. Trace a module that calls this one with {name}."
        )


def in_batched_backward() -> bool:
    """Whether gradients are batched, as by `is_grads_batched` and vectorised Jacobians.

    Tensors may then be batches without memory of their own.
    """
    nesting = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return bool(nesting > 1)


def any_autocast() -> bool:
    """Whether autocast is on for any device."""
    return torch._C._is_any_autocast_enabled()


def register_flops(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Register formulas, by operator, with the FLOP counter, if that has been imported.

    The import takes 0.2 s, so the formulas are registered when an operator is called while
    something listens in the dispatcher. Active counters have copies of the registry, which get the
    formulas too.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    for op, formula in formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            own = mode.counter.flop_registry
            for op in formulas:
                own.setdefault(op, counter.flop_registry[op])


def triton_is_automatic(x: Tensor) -> bool:
    """Whether backend="auto" may choose Triton kernels for x."""
    # float64 is for checking gradients: its tiles need more memory on chip than many GPUs have. For
    # a CPU tensor under torch.compile the answer is constant, and nothing else is traced.
    return x.dtype != torch.float64 and (
        x.device.type != "cpu" or not torch.compiler.is_compiling()
    )


def why_not_triton(device: torch.device) -> str:
    """Why Triton kernels cannot run on tensors of that device; empty if they can."""
    if not has_triton():
        return "needs the package triton, which is not installed (pip install '.[triton]')"
    if not triton_takes(device):
        return f"needs a tensor on a CUDA, ROCm or XPU device; got one on {device}"
    if old := too_old_triton():
        return f"needs triton 3.6 or newer, which newer builds of torch bring; got {old}"
    if old := too_old_for_triton(device):
        return f"needs compute capability 8.0 or newer; {device} has {old}"
    return ""


@constant_under_compile
def too_old_triton() -> str:
    """The version of the installed Triton if it is older than 3.6, or ""."""
    return _too_old_triton()


@functools.cache
def _too_old_triton() -> str:
    for name in ("triton", *(f"pytorch-triton{suffix}" for suffix in ("", "-rocm", "-xpu"))):
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            numbers = re.match(r"(\d+)\.(\d+)", version)
            old = numbers is not None and tuple(map(int, numbers.groups())) < (3, 6)
            return version if old else ""
    return ""


@constant_under_compile  # in torch 2.10 is_exporting() is always true under compile
def being_exported() -> bool:
    """Whether the model is being exported: by TorchScript, ONNX or torch.export."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()
