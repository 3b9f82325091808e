"""Cross-compile every Triton kernel, and read what the binaries use. Needs neither GPU nor driver.

`python -m benchmarks.gpu.cross_compile` records the launches of additive attention, of conv_mlp and
of fused networks for each width and dtype, and compiles them for each architecture with Triton's
own ptxas and LLVM.
It writes the results to docs/results/gpu_kernels.json: registers, spills, shared memory,
tensor-core instructions, the widest loads and stores. A second run compiles only what has changed.
From that file it writes the tables of docs/gpu_kernels.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from benchmarks.gpu import calls
from swiftkernels.backends.triton import linear
from swiftkernels.backends.triton.sizes import power_of_two
from swiftkernels.backends.triton.tensors import has_tensor_cores, precision
from swiftkernels.fusion.steps import Convolution
from swiftkernels.fusion.triton import launch as convolution_launch
from swiftkernels.ops.additive_attention.triton import config, launch
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.conv_mlp.triton import launch as conv_mlp_launch
from swiftkernels.ops.types import Pooling
from swiftkernels.testing.cases import make_mask, make_tensors
from swiftkernels.utils import command
from swiftkernels.utils.files import write_text
from swiftkernels.utils.progress import Progress, track

Facts = dict[str, Any]
"""What a compiled kernel uses; `facts` explains the keys."""

DOCS = Path(__file__).parents[2] / "docs"


class Architecture(NamedTuple):
    """A GPU architecture to compile for."""

    name: str
    sold_as: str
    shared_memory: int
    """Bytes a block may use. NVIDIA: CUDA C++ programming guide, table of technical specifications
    by compute capability; AMD: the LDS of a compute unit, CDNA 2, 3 and 4 ISA guides."""

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("sm_")

    @property
    def class_(self) -> str:
        """As `sizes.architecture` has it."""
        if not self.is_cuda:
            return "amd"
        return "small" if self.shared_memory < 150_000 else "large"

    @property
    def target(self) -> GPUTarget:
        if self.is_cuda:
            return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.name, 64)


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", "A100", 166_912),
        Architecture("sm_90", "H100", 232_448),
        Architecture("gfx942", "MI300X", 65_536),
        Architecture("sm_86", "A10, RTX 30", 101_376),
        Architecture("sm_89", "L4, RTX 40", 101_376),
        Architecture("sm_100", "B200", 232_448),
        Architecture("sm_103", "B300", 232_448),
        Architecture("sm_120", "RTX 50", 101_376),
        Architecture("gfx90a", "MI200", 65_536),
        Architecture("gfx950", "MI350", 163_840),
        Architecture("sm_75", "T4", 65_536),
    )
}
"""In the order in which they are compiled."""

UNSUPPORTED = ("sm_75",)
"""Compiled only to show why they are unsupported; there the library uses other backends."""

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}

WIDTHS = (48, 56, 64, 96, 112, 128, 168, 192, 220, 224, 320, 384, 512)
"""Of the public SwiftFormers and of the usual transformers; 220 is no multiple of 8."""

ODD_WIDTHS = (37, 40)
"""For sm_80 only, to show the cost of an odd width: one, and a similar even width."""

UNSUPPORTED_WIDTHS = (48, 128)

BLOCK_ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""For which conv_mlp and fused networks are compiled; the others are alike."""


class Launch(NamedTuple):
    """A launch with its arguments."""

    kernel: JITFunction
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel; those of conv_mlp begin with "block", or "mlp" without a depthwise
        convolution. Convolutions and linear layers have their channels in it."""
        name: str = self.kernel.__name__
        name = name.removeprefix("_").removesuffix("_kernel")
        if name in ("convolution", "linear"):
            name = f"{name}_{self.arguments['C']}_{self.arguments['D']}"
        if self.arguments.get("residual_ptr") is not None:
            name = f"residual_{name}"
        if name.startswith("residual_linear") and self.arguments["scale_ptr"] is not None:
            name = f"scaled_{name}"
        if ".conv_mlp." not in self.kernel.fn.__module__:
            return name
        return f"block_{name}" if self.arguments.get("KERNEL") else f"mlp_{name}"


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, launches are appended to this list instead of run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(self, arguments))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def _on(class_: str) -> Iterator[None]:
    """Kernels are launched as on a GPU of that class."""

    def forget() -> None:
        # The keys of the launches have the device, which is always the CPU here.
        launch.forget_launches()
        conv_mlp_launch.forget_launches()

    forget()
    with contextlib.ExitStack() as stack:
        stack.callback(forget)
        for module in (launch, launch.wide, conv_mlp_launch, linear):
            stack.enter_context(mock.patch.object(module, "architecture", return_value=class_))
        yield


@functools.cache
def launches_of(
    width: int,
    dtype: torch.dtype,
    *,
    class_: str = "large",
    pooling: Pooling = "l2",
    images: bool = False,
    masked: bool = False,
) -> list[Launch]:
    """The launches of a forward and a backward with all gradients, C = E = D = width.

    `class_` is the class of the GPU: see `sizes.architecture`. The tokens are [2, 64, width],
    contiguous or, with `images`, a transposed [2, width, 64]. The kernels do not depend on the 2
    and the 64.
    """

    tensors = make_tensors(2, 64, width, width, dtype=dtype)
    x = tensors[0]
    assert x is not None
    if images:
        tensors[0] = x.transpose(1, 2).contiguous().transpose(1, 2)
    mask = make_mask(2, 64) if masked else None
    with _on(class_), recorded_launches() as launches:
        calls.forward(tensors, mask, pooling)()
    return launches


@functools.cache
def block_launches_of(
    width: int, dtype: torch.dtype, *, class_: str = "large", images: bool = False
) -> list[Launch]:
    """The launches of conv_mlp with 4 x width hidden channels: in inference with a 3 x 3 depthwise
    convolution and BatchNorm, and a forward and backward without.

    The images are [8, width, 14, 14] in channels_last memory format or, with `images`, contiguous.
    """
    x = torch.zeros(8, width, 14, 14, dtype=dtype)
    if not images:
        x = x.contiguous(memory_format=torch.channels_last)
    with _on(class_), recorded_launches() as launches:
        calls.block(x, 4 * width, 3, infer=True)
        calls.block(x, 4 * width, None)()
    return launches


@functools.cache
def fused_launches_of(width: int, dtype: torch.dtype, *, class_: str = "large") -> list[Launch]:
    """The launches that only fused networks have, whose first stage has this width.

    They are the convolutions of the stem, on contiguous images, and of the first downsampling, as
    far as the kernel takes them, and the last kernel of attention.
    """
    convolutions = [
        (3, width // 2, "relu"),
        (width // 2, width, "relu"),
        (width, 2 * width, "none"),
    ]
    x, *weights = make_tensors(2, 64, width, width, dtype=dtype)
    assert x is not None
    residual = launch.Residual(x, x.new_ones(width))
    options, given = Options("l2", True, width**-0.5, 1e-12), Weights(*weights)  # type: ignore[arg-type]
    with _on(class_), recorded_launches() as attention:
        if not launch.is_wide(width):
            launch.forward((x,), given, None, options, "", residual)
        elif has_tensor_cores(dtype, precision(dtype)):
            launch.wide.infer(x, launch.wide.pack(given), options, residual)
    with recorded_launches() as launches:
        for channels, out_channels, activation in convolutions:
            weight = x.new_zeros(out_channels, channels, 3, 3)
            step = Convolution(weight, x.new_zeros(out_channels), 2, 1, activation)
            images = x.new_zeros(2, channels, 14, 14)
            if channels > 3:
                images = images.contiguous(memory_format=torch.channels_last)
            if convolution_launch.takes(step):
                plan = convolution_launch.ConvolutionPlan(images, step)
                plan(images, convolution_launch.pack(step), None, None)
    return [*launches, attention[-1]] if attention else launches


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}
COMPILE_OPTIONS = ("num_warps", "num_stages")


def compile_launch(recorded: Launch, architecture: Architecture) -> Any:
    """The kernel as the just-in-time compiler would make it for this launch on that GPU."""
    backend = make_backend(architecture.target)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(recorded.kernel.params):
        value = recorded.arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            described = backend.get_tensor_specialization(value, align=True)
            attributes[(i,)] = backend.parse_attr(described)
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(recorded.kernel, signature, constants, attributes)
    options = {name: recorded.arguments[name] for name in COMPILE_OPTIONS}
    return triton.compile(source, target=architecture.target, options=options)


def digest(recorded: Launch) -> str:
    """A hash of what the result depends on: sources, constants, dtypes, alignments, Triton."""
    text = [triton.__version__, *_sources(recorded.kernel)]
    for name, value in sorted(recorded.arguments.items()):
        if isinstance(value, Tensor):
            text.append(f"{name}: {value.dtype} {value.data_ptr() % 16 == 0}")
        elif value is None or name in COMPILE_OPTIONS or _is_constexpr(recorded.kernel, name):
            text.append(f"{name}={value!r}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]


def _is_constexpr(kernel: JITFunction, name: str) -> bool:
    return any(p.is_constexpr for p in kernel.params if p.name == name)


def _sources(kernel: JITFunction) -> list[str]:
    """The sources of a kernel and of the functions that it calls."""
    found: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        found[function.__name__] = function.src
        for name in function.fn.__code__.co_names:
            called = function.fn.__globals__.get(name)
            if isinstance(called, JITFunction) and called.__name__ not in found:
                visit(called)

    visit(kernel)
    return [found[name] for name in sorted(found)]


def facts(compiled: Any, architecture: Architecture) -> Facts:
    """What the binary uses.

    shared: bytes of shared memory. registers: of a thread (AMD: vector registers, both kinds).
    spills: instructions that touch local memory (AMD: spilled registers). stack: bytes of local
    memory (AMD: scratch) of a thread. tensor: the kinds of tensor-core instructions. load, store:
    widest access of global memory in bits. warps: of a block.
    """
    read = _cuda_facts if architecture.is_cuda else _amd_facts
    common = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    return common | read(compiled)


def _cuda_facts(compiled: Any) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    counts = collections.Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    )
    tensor = {op.split(".")[0] for op in counts if re.match(r"[A-Z]*MMA\b", op)}
    return {
        "registers": int(numbers["REG"]),
        "spills": sum(n for op, n in counts.items() if re.match("LDL|STL", op)),
        "stack": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "tensor": sorted(tensor),
        "load": max((_cuda_bits(op) for op in counts if re.match("LDG", op)), default=0),
        "store": max((_cuda_bits(op) for op in counts if re.match(r"STG\b", op)), default=0),
    }


def _cuda_bits(op: str) -> int:
    """Bits of one lane's access: LDG.E.128.CONSTANT -> 128, LDG.E -> 32, LDG.E.U16 -> 16."""
    explicit = re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", op)
    return max(map(int, explicit), default=32)


def _cuobjdump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def _amd_facts(compiled: Any) -> Facts:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, f"no {name} in the kernel's metadata"
        return int(found[1])

    ops = set(re.findall(r"^\s+((?:v|global|buffer|flat)_[a-z0-9_]+)", text, re.M))
    tensor = {op.split("_")[1].upper() for op in ops if re.match("v_(mfma|smfmac|wmma)", op)}
    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, not into memory.
        "spills": number("vgpr_spill_count"),
        "stack": number("private_segment_fixed_size"),
        "tensor": sorted(tensor),
        "load": max((_amd_bits(op) for op in ops if "_load_" in op), default=0),
        "store": max((_amd_bits(op) for op in ops if "_store_" in op), default=0),
    }


def _amd_bits(op: str) -> int:
    """Bits of one lane's access: global_load_dwordx4 -> 128, buffer_store_short -> 16."""
    words = re.search(r"_dword(?:x(\d))?(?:_|$)", op)
    if words:
        return 32 * int(words[1] or 1)
    return 16 if "short" in op or "b16" in op else 8


OPERATORS = {
    "additive_attention": launches_of,
    "conv_mlp": block_launches_of,
    "fusion": fused_launches_of,
}


class Cell(NamedTuple):
    """All launches of an operator, which are compiled and judged together."""

    architecture: Architecture
    dtype: str
    width: int
    operator: str = "additive_attention"

    @property
    def launches(self) -> list[Launch]:
        launches = OPERATORS[self.operator]
        return launches(self.width, DTYPES[self.dtype], class_=self.architecture.class_)

    def key(self, recorded: Launch) -> str:
        return f"{recorded.name} {self.architecture.name} {self.dtype} {self.width}"


def grid(
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    dtypes: Sequence[str] = tuple(DTYPES),
    widths: Sequence[int] = (*WIDTHS, *ODD_WIDTHS),
) -> list[Cell]:
    """All combinations of these that are compiled."""
    return [
        Cell(ARCHITECTURES[architecture], dtype, width, operator)
        for operator, architecture, dtype, width in itertools.product(
            OPERATORS, architectures, dtypes, widths
        )
        if (architecture not in UNSUPPORTED or (width in UNSUPPORTED_WIDTHS and dtype != "bf16"))
        and (architecture == "sm_80" or width not in ODD_WIDTHS)
        and (operator == "additive_attention" or architecture in BLOCK_ARCHITECTURES)
    ]


def examine(recorded: Launch, architecture: Architecture) -> Facts:
    """The facts of one launch; {"error": first line} where it does not compile."""
    try:
        return facts(compile_launch(recorded, architecture), architecture)
    except Exception as error:  # any error of the compiler is a result
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def problems(cell: Cell, recorded: Launch, found: Facts) -> list[str]:
    """The problems of a compiled kernel.

    It has to compile, to fit into shared memory, and to keep everything in registers. In half
    precision it has to use tensor cores. It has to read tokens 128 bits at a time, or as their
    alignment allows.
    """
    if "error" in found:
        return ["does not compile"]
    wrong = []
    if found["shared"] > cell.architecture.shared_memory:
        wrong.append("over shared memory")
    if found["spills"] or found["stack"]:
        wrong.append("spills")
    # Those of wide layers are surrounded by PyTorch's products.
    multiplies = not recorded.name.endswith(
        ("finish_backward", "operands", "wide_backward", "block_input")
    ) and recorded.arguments.get("PROJECT", True)
    if cell.dtype != "fp32" and not found["tensor"] and multiplies:
        wrong.append("no tensor cores")
    convolution = recorded.name.startswith("convolution")
    channels = recorded.arguments["C"] if convolution else cell.width
    if found["load"] < row_alignment(channels, cell.dtype):
        wrong.append("narrow loads")
    return wrong


def row_alignment(width: int, dtype: str) -> int:
    """Bits that every row of a contiguous [N, width] tensor is aligned to, at most 128."""
    size = width * DTYPES[dtype].itemsize
    return 8 * min(16, size & -size)


class Known(NamedTuple):
    """A problem that is accepted for some kernels, and the reason."""

    problem: str
    kernels: tuple[str, ...]
    architectures: tuple[str, ...]
    reason: str
    dtypes: tuple[str, ...] = tuple(DTYPES)
    widths: tuple[int, ...] = (*WIDTHS, *ODD_WIDTHS)

    def covers(self, problem: str, cell: Cell, recorded: Launch) -> bool:
        return (
            problem == self.problem
            and recorded.name in self.kernels
            and cell.architecture.name in self.architectures
            and cell.dtype in self.dtypes
            and cell.width in self.widths
        )


CUDA = tuple(name for name in ARCHITECTURES if name.startswith("sm_"))

KNOWN = (
    Known(
        "spills",
        ("pool_backward", "rows_backward", "mlp_forward"),
        ("sm_86", "sm_89", "sm_120"),
        "two to eighteen instructions; the tiles are those that are fastest on an H100",
        ("fp16", "bf16"),
        (96, 112, 128),
    ),
    Known(
        "spills",
        ("block_input",),
        CUDA,
        "two to six instructions, above the 80 registers that ptxas keeps to there",
        ("fp32",),
    ),
    Known(
        "spills",
        ("rows_backward",),
        CUDA,
        "tiles of 32 tokens: on an H100 they are faster than tiles of 16, which fit",
        ("fp16", "bf16"),
        (37, 40, 48, 56, 64),
    ),
    Known(
        "spills",
        ("pool_forward", "output_forward", "residual_output_forward"),
        CUDA,
        "the tiles are those that are fastest on an H100; smaller ones fit",
        ("fp16", "bf16"),
        (37, 40, 48, 56, 64, 112, 128),
    ),
    Known(
        "spills",
        ("mlp_input_backward", "mlp_weights_backward"),
        CUDA,
        "two to eight instructions; the tiles are those that are fastest on an H100",
        ("fp16", "bf16"),
        (40, 48, 56, 64, 96, 112, 128),
    ),
    Known(
        "spills",
        ("pool_backward", "rows_backward"),
        ("sm_90",),
        "two to five instructions, a few registers too many",
        ("fp16", "bf16"),
        (112, 128),
    ),
    Known(
        "spills",
        ("operands",),
        ("sm_120",),
        "a few registers above the 128 that ptxas keeps to there",
        ("fp32",),
        (512,),
    ),
    Known(
        "spills",
        ("rows_backward",),
        ("sm_100", "sm_103", "sm_120"),
        "the tiles are those that fit on sm_80 and sm_90; here they take some registers more",
        ("fp16", "bf16"),
        (64,),
    ),
    Known(
        "spills",
        ("pool_forward", "pool_backward", "residual_output_forward"),
        ("sm_86", "sm_89", "sm_100", "sm_103", "sm_120"),
        "two to seven instructions, above the 80 to 168 registers that ptxas keeps to there",
        widths=(56, 96, 168, 220, 512),
    ),
    Known(
        "spills",
        ("pool_backward", "rows_backward"),
        CUDA,
        "rows of an odd width are loaded one number at a time, each with an address of its own",
        widths=(37,),
    ),
    Known(
        "spills",
        (
            "block_forward",
            "mlp_forward",
            "mlp_input_backward",
            "mlp_weights_backward",
            "convolution_37_74",
        ),
        CUDA,
        "rows of an odd width are loaded one number at a time, each at an address of its own",
        widths=(37,),
    ),
    Known(
        "spills",
        ("mlp_weights_backward", "mlp_finish_backward"),
        ("sm_100",),
        "two to ten instructions, above the 128 registers that ptxas keeps to there",
    ),
    Known(
        "spills",
        ("mlp_input_backward", "mlp_weights_backward"),
        ("sm_120",),
        "two to nine instructions; the tiles are those that fit on sm_80 and sm_90",
    ),
)


def unexpected(cell: Cell, recorded: Launch, found: Facts) -> list[str]:
    """The problems that are not in `KNOWN`."""
    return [
        problem
        for problem in problems(cell, recorded, found)
        if cell.architecture.name not in UNSUPPORTED
        and not any(known.covers(problem, cell, recorded) for known in KNOWN)
    ]


class Results:
    """The facts of all compiled kernels, in a JSON file with a line for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Facts] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, cell: Cell, recorded: Launch) -> Facts | None:
        """The facts of this launch; None if it has changed or was never compiled."""
        entry = self.entries.get(cell.key(recorded))
        return entry if entry and entry["digest"] == digest(recorded) else None

    def put(self, cell: Cell, recorded: Launch, found: Facts) -> None:
        entry = {"digest": digest(recorded), "triton": triton.__version__}
        self.entries[cell.key(recorded)] = entry | found

    def save(self) -> None:
        """Write the complete file, so that an interrupted run leaves a readable one."""
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(self.entries.items()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "{\n" + ",\n".join(lines) + "\n}\n")


def compile_all(cells: Sequence[Cell], results: Results) -> None:
    """Compile what has changed, cell by cell, and save the facts."""
    pending = [
        (cell, [recorded for recorded in cell.launches if results.get(cell, recorded) is None])
        for cell in track(cells, "cells", "looking for changes")
    ]
    with Progress(sum(len(launches) for _, launches in pending), "kernels") as bar:
        for cell, launches in pending:
            for recorded in launches:
                bar.show(cell.key(recorded))
                found = examine(recorded, cell.architecture)
                results.put(cell, recorded, found)
                for problem in unexpected(cell, recorded, found):
                    bar.write(f"{cell.key(recorded)}: {problem}: {found}")
                bar.advance()
            if launches:
                results.save()


def report(results: Results) -> str:
    """docs/gpu_kernels.md from what is in the file, judged by the kernels as they are now."""
    everything = [
        (cell, recorded, results.get(cell, recorded))
        for cell in grid()
        for recorded in cell.launches
    ]
    judged, blocks, fused = (
        [one for one in everything if one[0].operator == operator] for operator in OPERATORS
    )
    verdicts = _verdict_table(judged)
    deepest = convolution_launch.MAX_DEPTH // 9
    versions = sorted({found["triton"] for _, _, found in everything if found}) or ["none"]
    return f"""\
# What the compiled GPU kernels use

Written by `python -m benchmarks.gpu.cross_compile` from
[results/gpu_kernels.json](results/gpu_kernels.json); do not edit it. The kernels are cross-compiled
by Triton {", ".join(versions)}, with the arguments that the library launches them with. Nothing
here ran on a GPU, and nothing here is a time. The first sections are about additive attention:
forward and backward of a layer with C = E = D = width, tokens [B, N, C], pooling l2, no mask, all
gradients. The last two are about `conv_mlp` and about fused networks.

## Which form a width takes

Up to E = {config.MAX_PROJECTED_WIDTH} the kernels multiply by the weights themselves, above it
PyTorch does. Up to E = {config.MAX_FUSED_WIDTH} the rows kernel also sums the moments for the
gradients of the weights. Launches are forward + backward, without those of PyTorch. A kernel fits
if it stays within shared memory and registers. The counts are of compiled kernels on all GPUs from
sm_80 on; those that do not fit are under "Exceptions".

{_form_table(judged)}

## Verdicts

"compiled" counts the kernels that were compiled, of all there are; the rest were not compiled yet,
or changed since. The other columns count those that spill registers or use local memory, exceed the
shared memory of a block, use no tensor cores, or read tokens by less than 128 bits although their
rows are aligned. float32 is computed in float32 (`ieee`) unless PyTorch allows TF32: without tensor
cores on NVIDIA's GPUs; AMD's have them for float32 too. The last kernel of a backward, which only
adds partial sums, and the kernels of wide layers have nothing for a tensor core to do.

{verdicts}

## Exceptions

{_exceptions(judged)}

## Widths that are no multiple of 8

A row of such a width does not start at a multiple of 16 bytes, so that loads are narrower. Every
width is padded to the next power of two inside the tiles, and the padding is computed too.

{_odd_table(judged)}

## GPUs before sm_80

The library uses its other backends there. Compiled for sm_75 (T4) nevertheless:

{_old_gpus(judged)}

## Convolutional blocks and MLPs

`conv_mlp` with 4 C hidden channels, GELU and a residual branch, images in channels_last memory
format. `block_forward` is a block in inference, with a 3 x 3 depthwise convolution and BatchNorm;
`mlp_forward` and the three kernels of the backward are without these.

{_verdict_table(blocks)}

{_exceptions(blocks)}

## Fused networks

What `fuse_for_inference` launches besides: `convolution_C_D` are the 3 x 3 convolutions from C to D
channels of the stem and of the first downsampling of a network of this width, up to {deepest}
channels; `residual_output_forward` is the last kernel of attention with the residual branch.

{_verdict_table(fused)}

{_exceptions(fused)}
"""


Judged = list[tuple[Cell, Launch, Facts | None]]


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _verdict_table(judged: Judged) -> str:
    kinds = ("does not compile", "spills", "over shared memory", "no tensor cores", "narrow loads")
    rows = []
    for architecture, dtype in itertools.product(ARCHITECTURES.values(), DTYPES):
        of_these = [
            (cell, recorded, found)
            for cell, recorded, found in judged
            if cell.architecture is architecture and cell.dtype == dtype
        ]
        if not of_these or architecture.name in UNSUPPORTED:
            continue
        done = [(cell, recorded, found) for cell, recorded, found in of_these if found]
        counts = collections.Counter(
            problem for cell, recorded, found in done for problem in problems(cell, recorded, found)
        )
        name = f"{architecture.name} ({architecture.sold_as})"
        if done:
            numbers = [counts[kind] for kind in kinds]
            rows.append([name, dtype, f"{len(done)} of {len(of_these)}", *numbers])
        else:
            rows.append([name, dtype, "not yet", *[""] * len(kinds)])
    return _table(["GPU", "type", "compiled", *kinds], rows)


UNFIT = {"does not compile", "over shared memory", "spills"}


def _form_table(judged: Judged) -> str:
    rows = []
    for width in WIDTHS:
        names = [recorded.name for recorded in launches_of(width, torch.float16)]
        forward = next(i for i, name in enumerate(names) if name.endswith("backward"))
        fits = []
        for dtype in DTYPES:
            wrong = [
                problems(cell, recorded, found)
                for cell, recorded, found in judged
                if (cell.width, cell.dtype) == (width, dtype) and found
                if cell.architecture.name not in UNSUPPORTED
            ]
            fit = sum(not set(of_one) & UNFIT for of_one in wrong)
            fits.append(f"{fit} of {len(wrong)}" if wrong else "not compiled")
        rows.append(
            [
                width,
                "PyTorch" if launch.is_wide(width) else "kernels",
                "kernels" if "finish_backward" in names else "PyTorch",
                f"{forward} + {len(names) - forward}",
                *fits,
            ]
        )
    kernels = (f"{dtype} kernels that fit" for dtype in DTYPES)
    return _table(["width", "products", "weight gradients", "launches", *kernels], rows)


def _exceptions(judged: Judged) -> str:
    """Every kernel with a problem, by name, under the reason if it has one."""
    lines = []
    for cell, recorded, found in judged:
        if not found or cell.architecture.name in UNSUPPORTED:
            continue
        for problem in problems(cell, recorded, found):
            known = [known for known in KNOWN if known.covers(problem, cell, recorded)]
            reason = known[0].reason if known else "not explained"
            lines.append((problem, reason, cell, recorded, found))
    if not lines:
        return "None."
    text = []
    for (problem, reason), group in itertools.groupby(
        sorted(lines, key=lambda line: line[:2]), key=lambda line: line[:2]
    ):
        text.append(f"**{problem}**: {reason}\n")
        for _, _, cell, recorded, found in group:
            detail = {
                "spills": lambda f: f"{f['spills']} spills, {f['stack']} bytes of local memory",
                "over shared memory": lambda f: f"{f['shared']} bytes",
                "narrow loads": lambda f: f"{f['load']} bits",
                "no tensor cores": lambda f: f"{f['registers']} registers",
                "does not compile": lambda f: f["error"],
            }[problem](found)
            text.append(f"* {cell.key(recorded)}: {detail}")
        text.append("")
    return "\n".join(text).rstrip()


def _odd_table(judged: Judged) -> str:
    rows = []
    for width in (37, 40, 220, 224):
        tile = power_of_two(width)
        for dtype in ("fp16", "fp32"):
            found = {
                recorded.name: facts_
                for cell, recorded, facts_ in judged
                if cell.architecture.name == "sm_80" and (cell.width, cell.dtype) == (width, dtype)
                if facts_
            }
            loads = [f["load"] for name, f in found.items() if name == "pool_forward"]
            stores = [f["store"] for name, f in found.items() if name == "output_forward"]
            rows.append(
                [
                    width,
                    dtype,
                    f"{row_alignment(width, dtype) // 8} bytes",
                    f"{loads[0]} bits" if loads else "not compiled",
                    f"{stores[0]} bits" if stores else "not compiled",
                    f"{tile} ({tile / width:.2f} x, products of E x E {(tile / width) ** 2:.2f} x)",
                ]
            )
    header = ["width", "type", "rows aligned to", "widest load", "widest store of the output"]
    return _table([*header, "computed as"], rows)


def _old_gpus(judged: Judged) -> str:
    rows = [
        [
            cell.key(recorded),
            *([found["error"], "", ""] if "error" in found else _old_facts(found)),
        ]
        for cell, recorded, found in judged
        if cell.architecture.name in UNSUPPORTED and found
    ]
    if not rows:
        return "Not compiled yet."
    return _table(["kernel", "tensor cores", "spills", "shared memory"], rows)


def _old_facts(found: Facts) -> list[object]:
    return [", ".join(found["tensor"]) or "none", found["spills"], found["shared"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what has changed, write both files; 1 if a kernel has a problem that is not known."""
    parser = command.Parser(
        prog="python -m benchmarks.gpu.cross_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arch", nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES], help="default: all")
    add("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES], help="default: all")
    widths = (*WIDTHS, *ODD_WIDTHS)
    add("--width", nargs="+", type=int, choices=widths, default=[*widths], help="default: all")
    add("--report", action="store_true", help="compile nothing, write the tables again")
    add("--docs", type=Path, default=DOCS, help="folder of gpu_kernels.md (default: %(default)s)")
    options = parser.parse_args(arguments)
    results = Results(options.docs / "results" / "gpu_kernels.json")
    cells = grid(options.arch, options.dtype, options.width)
    if not options.report:
        with (
            tempfile.TemporaryDirectory() as cache,
            mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        ):
            compile_all(cells, results)
    text = options.docs / "gpu_kernels.md"
    write_text(text, report(results))
    print(f"Written: {results.path}, {text}")
    wrong = [
        f"{cell.key(recorded)}: {problem}"
        for cell in cells
        for recorded in cell.launches
        if (found := results.get(cell, recorded))
        for problem in unexpected(cell, recorded, found)
    ]
    print("\n".join(wrong) or "No kernel has a problem that is not known.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(command.run(main))
