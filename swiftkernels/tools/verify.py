"""`swiftkernels verify`: every kernel that runs here, against the definition in float64.

How wrong a result may be is defined in `swiftkernels.testing.tolerance`, as for the tests.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends import devices, torch_state
from swiftkernels.ops.additive_attention.api import additive_attention
from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.ops.types import Backend, Pooling
from swiftkernels.testing.cases import (
    PARAMETERS,
    QUERY_KEY_NAMES,
    Tensors,
    convert,
    make_mask,
    make_query_key_tensors,
    make_tensors,
)
from swiftkernels.testing.tolerance import ULPS, budget, relative_error
from swiftkernels.utils.progress import Progress

BACKENDS: tuple[Backend, ...] = ("triton", "cpu", "aten")
"""What can be verified: all but the definition itself."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("tokens", "nchw", "channels_last")

SHOWN_FAILURES = 12
ERROR_LINES = 8


@dataclass(frozen=True)
class Case:
    """One input and variant of the operator."""

    batch: int
    n_tokens: int
    in_dims: int
    token_dim: int
    num_heads: int
    pooling: Pooling = "l2"
    qk_norm: bool = True
    masked: bool = False
    bias: bool = True
    layout: str = "tokens"
    from_tokens: bool = True
    """False: from queries and keys, by `additive_attention`."""
    rank: int = 0
    """0: in every plan; 1: not in the quickest; 2: not where every variant has to be compiled."""
    number: int = 0
    """Which type it gets where every variant has to be compiled."""

    def __str__(self) -> str:
        parts = [
            f"B={self.batch} N={self.n_tokens} C={self.in_dims} E={self.width}",
            self.pooling,
            "" if self.qk_norm else "no norms",
            "mask" if self.masked else "",
            "" if self.bias else "no biases",
            self.layout if self.from_tokens else "queries and keys",
        ]
        return ", ".join(filter(None, parts))

    @property
    def width(self) -> int:
        """E"""
        return self.token_dim * self.num_heads

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """Inputs and weights on the CPU, rounded to `dtype`; x in the layout of the case."""
        make = make_tensors if self.from_tokens else make_query_key_tensors
        made = make(
            self.batch, self.n_tokens, self.in_dims, self.token_dim, self.num_heads, bias=self.bias
        )
        tensors = convert(made, dtype)
        if self.layout == "tokens":
            return tensors
        x = tensors[0]
        assert x is not None
        images = x.transpose(1, 2).unflatten(2, _sides(self.n_tokens))  # [B, C, H, W]
        channels_last = self.layout == "channels_last"
        memory = torch.channels_last if channels_last else torch.contiguous_format
        return [images.contiguous(memory_format=memory), *tensors[1:]]


# Batch, tokens, C, D, heads, by width: E up to 64, up to 256, above. The Triton kernels fuse less
# above 64, and less again above 128. The order of each is that of the poolings, without and with
# norms. One token comes late: with "l2" and "softmax", w_g and the scores of a single token have no
# gradient but rounding errors. And in many items: of a single one, the gradient of w_g hangs on one
# number, which may be a small difference of large ones.
_SIZES = (
    (
        (2, 784, 48, 48, 1),
        (1, 784, 56, 56, 1),
        (2, 65, 64, 64, 1),
        (3, 65, 37, 37, 1),
        (33, 1, 64, 64, 1),
        (1, 49, 56, 56, 1),
        (2, 7, 48, 24, 2),
        (1, 5000, 16, 16, 1),
    ),
    (
        (1, 65, 224, 224, 1),
        (2, 49, 220, 220, 1),
        (1, 65, 96, 96, 1),
        (2, 49, 128, 128, 1),
        (1, 49, 192, 192, 1),
        (2, 7, 168, 84, 2),
        (1, 784, 112, 112, 1),
        (33, 1, 220, 220, 1),
    ),
    (
        (1, 49, 320, 320, 1),
        (2, 7, 512, 512, 1),
        (1, 65, 260, 260, 1),
        (1, 196, 512, 512, 1),
        (2, 65, 300, 150, 2),
        (33, 1, 320, 320, 1),
        (2, 49, 384, 384, 1),
        (2, 7, 384, 384, 1),
    ),
)
_QUERY_KEY_SIZES = (
    (2, 65, 24, 37, 1),
    (1, 49, 220, 220, 1),
    (2, 7, 40, 320, 1),
    (1, 784, 48, 48, 1),
)


def _make_cases() -> Iterator[Case]:
    variants = list(itertools.product(range(len(POOLINGS)), (False, True)))
    for kind, sizes in enumerate(_SIZES):
        for size, (p, qk_norm) in zip(itertools.cycle(sizes), variants):
            # Half of them have every pooling at every range of widths, and all else in turn.
            extra = qk_norm != ((p + kind) % 2 == 1)
            yield Case(
                *size,
                pooling=POOLINGS[p],
                qk_norm=qk_norm,
                masked=(kind + p // 2 + extra) % 2 == 1 and size[1] > 1,
                bias=(p - kind) % 3 != 0,
                layout=LAYOUTS[(p + kind) % 3],
                rank=2 if extra else p // 2,
                number=p + kind + extra,
            )
    for p, pooling in enumerate(POOLINGS):
        yield Case(
            *_QUERY_KEY_SIZES[p % 4],
            pooling=pooling,
            qk_norm=p != 2,
            masked=p % 2 == 0,
            from_tokens=False,
            rank=(0, 2, 1, 2)[p % 4],
            number=p,
        )


CASES = tuple(_make_cases())
"""Together: every pooling with and without norms, with and without mask, in every layout and at
every range of widths; and queries and keys."""


def plan(backend: str, device: torch.device, quick: bool = False) -> list[tuple[Case, torch.dtype]]:
    """What to run on a backend: all cases in all types; `quick`: half of them.

    Where every variant has to be compiled, which takes a second for each kernel: half of them, each
    in one type; `quick`: a quarter.
    """
    compiled = backend == "triton"
    interpreted = compiled and device.type == "cpu"
    dtypes = DTYPES[:2] if interpreted else DTYPES
    runs = []
    for case in CASES:
        if case.rank > 2 - compiled - quick:
            continue
        if backend == "cpu" and not case.from_tokens:
            continue  # its kernels compute queries and keys themselves
        # The interpreter takes seconds for what a GPU does in microseconds.
        too_large = case.batch * case.n_tokens > 200 or case.width > (64 if quick else 168)
        if not (interpreted and too_large):
            chosen = (dtypes[case.number % len(dtypes)],) if compiled else dtypes
            runs += [(case, dtype) for dtype in chosen]
    return runs


class Result(NamedTuple):
    """How one case went: the largest errors in units of their budgets, at most 1 if all is well."""

    backend: str
    dtype: torch.dtype
    case: Case
    output: float
    gradients: float
    failure: str
    """What was wrong; empty if nothing."""


def verify_case(case: Case, backend: Backend, dtype: torch.dtype, device: torch.device) -> Result:
    """Run one case; a kernel that raises has failed."""
    worst = {"output": 0.0, "gradient": 0.0}
    failure = ""
    try:
        for name, error, bound in _errors(case, backend, dtype, device):
            kind = name.split()[0]
            # NaN stands for infinitely wrong.
            ratio = error / bound if error == error else math.inf
            if ratio > max(1.0, *worst.values()):
                failure = f"{name}: error {error:.2g}, budget {bound:.2g}"
            worst[kind] = max(worst[kind], ratio)
    except Exception as error:
        worst = dict.fromkeys(worst, math.inf)
        lines = str(error).strip().splitlines() or ["no message"]
        failure = "\n".join((f"{type(error).__name__}: {lines[0]}", *lines[1:ERROR_LINES]))
    return Result(backend, dtype, case, worst["output"], worst["gradient"], failure)


def _errors(
    case: Case, backend: Backend, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, float, float]]:
    """Of every result of a case its name, its relative error and its budget."""
    inputs = _inputs(case, dtype)
    # On the CPU: not every GPU computes in float64.
    exact = _evaluate(case, "reference", *convert(inputs, torch.float64))
    inputs = convert(inputs, device)
    eager = _evaluate(case, "reference", *inputs)
    # The CPU kernels have two backwards: from what was kept, and from what is computed again.
    for recompute in (True, False) if backend == "cpu" else (None,):
        _poison(device)
        ours = _evaluate(case, backend, *inputs, recompute=recompute)
        for name, result in ours.items():
            assert result.dtype == dtype, f"{name}: {result.dtype} instead of {dtype}"
            eager_error, error = (
                relative_error(t.cpu(), exact[name]) for t in (eager[name], result)
            )
            # Where the plain definition itself overflows, a few ulp are left.
            yield name, error, budget(eager_error if math.isfinite(eager_error) else 0.0, dtype)


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """On the CPU: mask, gradient of the output, scale of the residual branch, then the tensors."""
    tensors = case.tensors(dtype)
    shape: tuple[int, ...] = (case.batch, case.token_dim, *_sides(case.n_tokens))
    if case.layout == "tokens":
        shape = (case.batch, case.n_tokens, case.token_dim)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    scale = torch.randn(case.in_dims, generator=generator, dtype=torch.float64).to(dtype)
    mask = make_mask(case.batch, case.n_tokens) if case.masked else None
    return [mask, dout, scale, *tensors]


def _evaluate(
    case: Case,
    backend: Backend,
    mask: Tensor | None,
    dout: Tensor,
    scale: Tensor,
    x: Tensor,
    *weights: Tensor | None,
    recompute: bool | None = None,
) -> dict[str, Tensor]:
    """Outputs in inference and in training, and the gradients of all tensors, by their names."""
    if case.from_tokens:
        call, leaves = _layer(case, backend, x, weights, mask, recompute)
    else:
        call, leaves = _on_queries_and_keys(case, backend, x, weights, mask)
    results = {}
    with torch.no_grad():
        results["output"] = call()
        results["output again"] = call()  # a layer that is known takes a shorter way
        # The residual branch: x + scale * output.
        if case.from_tokens and case.in_dims == case.token_dim:
            broadcast = scale if case.layout == "tokens" else scale[:, None, None]
            results["output with the residual branch"] = call(residual_scale=broadcast)
    output = call()
    results["output in training"] = output.detach()
    grads = torch.autograd.grad(output, list(leaves.values()), dout)
    for name, grad in zip(leaves, grads, strict=True):
        results[f"gradient of {name}"] = grad
    return results


Call = Callable[..., Tensor]


def _layer(
    case: Case,
    backend: Backend,
    x: Tensor,
    weights: Sequence[Tensor | None],
    mask: Tensor | None,
    recompute: bool | None,
) -> tuple[Call, dict[str, Tensor]]:
    """The layer on x, as a function of its other arguments; and what has a gradient."""
    layer = AdditiveAttention(
        case.in_dims, case.token_dim, case.num_heads, pooling=case.pooling, qk_norm=case.qk_norm,
        bias=case.bias, backend=backend, recompute=recompute, device=x.device, dtype=x.dtype,
    )  # fmt: skip
    given = {name: t for name, t in zip(PARAMETERS, weights, strict=True) if t is not None}
    given["w_g"] = given["w_g"].unsqueeze(1)
    layer.load_state_dict(given)
    # In the same place in memory: a copy could have other strides.
    leaf = x.detach().requires_grad_()

    def call(**arguments: Any) -> Tensor:
        output = layer(leaf, mask, **arguments)
        assert isinstance(output, Tensor)
        return output

    parameters = dict(layer.named_parameters())
    return call, {"x": leaf, **{name: parameters[name] for name in given}}


def _on_queries_and_keys(
    case: Case,
    backend: Backend,
    q: Tensor,
    tensors: Sequence[Tensor | None],
    mask: Tensor | None,
) -> tuple[Call, dict[str, Tensor]]:
    """`additive_attention` as a function without arguments; and what has a gradient."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (q, *tensors)]

    def call() -> Tensor:
        output: Tensor = additive_attention(
            *leaves,  # type: ignore[arg-type]
            mask=mask,
            pooling=case.pooling,
            qk_norm=case.qk_norm,
            backend=backend,
        )
        assert isinstance(output, Tensor)
        return output

    named = zip(QUERY_KEY_NAMES, leaves, strict=True)
    return call, {name: t for name, t in named if t is not None}


def _sides(n_tokens: int) -> tuple[int, int]:
    """Height and width of an image of that many pixels, as square as it can be."""
    height = next(h for h in range(math.isqrt(n_tokens), 0, -1) if n_tokens % h == 0)
    return height, n_tokens // height


def _poison(device: torch.device) -> None:
    """Leave NaN in the memory that a GPU's allocator gives out next.

    An output that no kernel wrote could otherwise hold the right numbers, from a call before.
    """
    if device.type != "cpu":
        torch.full((1 << 24,), math.nan, device=device)


def run(device: str | None, backend: str | None = None, quick: bool = False) -> int:
    """The command: 0 if all is right, 1 if not, 2 if nothing could run.

    Raises:
        ValueError: the device is not there.
    """
    where = devices.find(device)
    print(f"Verifying on {where}: {devices.name(where)}")
    chosen = [b for b in BACKENDS if backend in (None, b)]
    probe = torch.empty(1, 1, 16, device=where)
    reasons = {b: SELF_ATTENTION.why_not(b, probe, 16) for b in chosen}
    backends = [b for b in chosen if not reasons[b]]
    for name, reason in reasons.items():
        if reason:
            print(f"  not run: {reason}")
            if name == "triton" and where.type == "cpu" and torch_state.has_triton():
                print("    TRITON_INTERPRET=1 runs its kernels here all the same, slowly.")
    if "triton" in backends and where.type == "cpu":
        print(
            "  Triton's interpreter runs the kernels: few and small cases, slowly, and none in "
            "bfloat16, which it computes wrongly."
        )
    if not backends:
        print("Nothing to verify could run here; swiftkernels doctor explains why.")
        return 2
    began = time.perf_counter()
    results = []
    with Progress(sum(len(plan(b, where, quick)) for b in backends), "cases") as progress:
        for name in backends:
            runs = plan(name, where, quick)
            progress.show(f"{name}: {len(runs)} cases")
            for case, dtype in runs:
                results.append(verify_case(case, name, dtype, where))
                progress.advance()
    failures = [result for result in results if result.failure]
    print("\n" + table(results) + "\n")
    for result in failures[:SHOWN_FAILURES]:
        print(f"{result.backend}, {_name(result.dtype)}, {result.case}:\n    {result.failure}")
    if len(failures) > SHOWN_FAILURES:
        print(f"... and {len(failures) - SHOWN_FAILURES} more")
    verdict = (
        f"FAIL: {len(failures)} of {len(results)}" if failures else f"PASS: all {len(results)}"
    )
    print(f"{verdict} cases, {time.perf_counter() - began:.0f} s")
    return 1 if failures else 0


def table(results: Sequence[Result]) -> str:
    """For every backend and type the number of cases and the largest errors."""
    rows = [f"{'backend':<10}{'type':<10}{'cases':>6}{'output':>10}{'gradients':>11}"]
    groups = dict.fromkeys((r.backend, r.dtype) for r in results)
    for backend, dtype in groups:
        own = [r for r in results if (r.backend, r.dtype) == (backend, dtype)]
        rows.append(
            f"{backend:<10}{_name(dtype):<10}{len(own):>6}"
            f"{max(r.output for r in own):>10.3g}{max(r.gradients for r in own):>11.3g}"
            f"{'  FAIL' if any(r.failure for r in own) else ''}"
        )
    rows.append(
        f"Largest errors in units of their budgets, 2 x that of the definition in the same type "
        f"+ {ULPS} ulp."
    )
    return "\n".join(rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
