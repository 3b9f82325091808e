"""Core ML's intermediate language, as far as our models need it, computed by PyTorch.

Core ML itself runs on Apple's systems alone; what coremltools made of a model can be read anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def run(program: Any, x: Tensor) -> list[Tensor]:
    """The outputs of a `coremltools` MIL program with one input; float32 becomes x's type."""
    function = program.functions["main"]
    (name,) = function.inputs
    values: dict[str, Any] = {name: x}

    def value(of: Any) -> Any:
        if isinstance(of, (list, tuple)):
            return [value(v) for v in of]
        return values[of.name] if of.name in values else constant(of.val, x.dtype)

    for op in function.operations:
        if op.op_type == "const":
            continue
        arguments = {key: value(var) for key, var in op.inputs.items() if var is not None}
        results = OPERATIONS[op.op_type](**arguments)
        if not isinstance(results, tuple):
            results = (results,)
        values.update(zip((var.name for var in op.outputs), results, strict=True))
    return [values[var.name] for var in function.outputs]


def constant(number: Any, dtype: torch.dtype) -> Any:
    """Arrays of floats as tensors of that type, shapes and axes as lists, numbers as they are."""
    array = np.asarray(number)
    if array.dtype.kind == "f":
        return torch.as_tensor(array).to(dtype)
    return array.tolist() if array.ndim else array.item()


def integers(of: Any) -> list[int]:
    return [int(n) for n in (of.tolist() if isinstance(of, Tensor) else of)]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    strides: Sequence[int],
    pad_type: str,
    pad: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    top, bottom, left, right = pad if pad_type == "custom" else (0, 0, 0, 0)
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight, bias, strides, 0, dilations, groups)


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon.item())


def gather(x: Any, indices: Any, axis: int, **_: Any) -> Any:
    return (
        torch.as_tensor(x)
        .index_select(axis, torch.as_tensor(indices).flatten())
        .reshape(torch.as_tensor(indices).shape)
    )


def concat(values: Sequence[Any], axis: int, interleave: bool) -> Tensor:
    return torch.cat([torch.as_tensor(v).reshape(-1) for v in values])


def slice_by_index(x: Any, begin: Any, end: Any, end_mask: Any = (False,), **_: Any) -> Tensor:
    """Of shapes, the only thing that is cut."""
    (first,), (last,) = begin, end
    return torch.as_tensor(x)[first : None if end_mask[0] else last]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "batch_norm": batch_norm,
    "concat": concat,
    "conv": conv,
    "expand_dims": lambda x, axes: x.unsqueeze(*axes),
    "gather": gather,
    "gelu": lambda x, mode: {"EXACT": F.gelu}[mode](x),
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x, transpose_y: (
        (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)
    ),
    "maximum": lambda x, y: x.clamp_min(y),
    "mul": lambda x, y: x * y,
    "pow": lambda x, y: x**y,
    "real_div": lambda x, y: x / y,
    "reduce_l2_norm": lambda x, axes, keep_dims: x.square().sum(axes, keep_dims).sqrt(),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keep_dims),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(axes, keep_dims),
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(integers(shape)),
    "shape": lambda x: torch.tensor(x.shape),
    "slice_by_index": slice_by_index,
    "softmax": lambda x, axis: x.softmax(axis),
    "squeeze": lambda x, axes: x.squeeze(tuple(axes)),
    "transpose": lambda x, perm: x.permute(perm),
}
"""By their names; an operator that is not here fails the test that meets it."""
