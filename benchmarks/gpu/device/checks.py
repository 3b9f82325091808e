"""Operators and whole networks against float64 on the device, forward and backward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.device.cases import Case, Settings, outcome, run_cases, worst
from benchmarks.gpu.device.networks import DTYPES, network, source, why_no_graph
from benchmarks.gpu.device.results import GRAPHS, RIGHT, WRONG, Row
from swiftkernels.testing import harness
from swiftkernels.testing.engines import OURS
from swiftkernels.testing.tolerance import budget, relative_error
from swiftkernels.tools import verify
from tests.contract import cases as contract

STAGE = (2, 196, 112, 112)
"""Batch, tokens, widths of input and output of the first checks: the third stage of XS."""
STAGES = ((1, 784, 56, 56), (2, 49, 220, 220), (3, 49, 384, 384), (2, 196, 320, 320))
"""Those of later checks."""


def verify_step(settings: Settings) -> int:
    """Operators and networks, forward and backward, against float64 on the device."""
    cases = {**_operator_cases(settings), **_network_cases(settings)}
    if settings.first:  # the most important types first, operators and networks
        order = list(DTYPES)
        cases = dict(sorted(cases.items(), key=lambda item: order.index(item[0][1])))
    else:
        cases |= _attention_cases(settings)
    return run_cases("verify", cases, settings)


def _operator_cases(settings: Settings) -> dict[tuple[str, str], Case]:
    found: dict[tuple[str, str], Case] = {}

    def add(
        implementation: contract.Implementation,
        dtype: torch.dtype,
        size: tuple[int, int, int, int],
        variant: str = "",
    ) -> None:
        shape = " x ".join(map(str, size))
        name = ", ".join(filter(None, (str(implementation), harness.dtype_name(dtype), variant)))
        case = functools.partial(check_operator, implementation, dtype, size, variant)
        found[f"{name}, {shape}", harness.dtype_name(dtype)] = case

    for implementation, dtype in contract.typed():
        if implementation.device.type != settings.device.type:
            continue
        fused = implementation.backend == "triton" or settings.device.type == "cpu"
        if fused and not (settings.first and dtype == torch.float64):
            add(implementation, dtype, contract.SIZE if settings.tiny else STAGE)
        if settings.first or settings.tiny:
            continue
        variants = implementation.operator.variants if fused else ()
        for variant in ("", *variants):
            if contract.draw(implementation, dtype, contract.SIZE, variant) is not None:
                add(implementation, dtype, contract.SIZE, variant)
        for size in STAGES if fused else ():
            add(implementation, dtype, size)
    return found


def check_operator(
    implementation: contract.Implementation,
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
    variant: str,
) -> Row:
    pairs = contract.measure(implementation, dtype, size=size, variant=variant)
    return worst(
        [
            outcome(error, bound, "output" if name == "output" else "gradients")
            | ({"note": f"{name}: relative error {error:.2g}"} if not error <= bound else {})
            for name, (error, bound) in contract.bounded(pairs, dtype).items()
        ]
    )


def _attention_cases(settings: Settings) -> dict[tuple[str, str], Case]:
    """Those of `swiftkernels verify` for the kernels of the device."""
    backend: Any = "triton" if settings.device.type != "cpu" else "aten"
    found: dict[tuple[str, str], Case] = {}
    for case, dtype in verify.plan(backend, settings.device)[: 1 if settings.tiny else None]:
        check = functools.partial(check_attention, case, backend, dtype, settings.device)
        name = harness.dtype_name(dtype)
        found[f"additive attention, {backend}, {name}, {case}", name] = check
    return found


def check_attention(case: Any, backend: Any, dtype: torch.dtype, device: torch.device) -> Row:
    found = verify.verify_case(case, backend, dtype, device)
    return {
        "outcome": WRONG if found.failure else RIGHT,
        "output": found.output,
        "gradients": found.gradients,
        "note": found.failure,
    }


def _network_cases(settings: Settings) -> dict[tuple[str, str], Case]:
    origins = [OURS] if settings.first else list(dict.fromkeys((OURS, source())))
    sides = [(settings.side, settings.side)]
    if not settings.first and not settings.tiny:
        sides += [(225, 257), (32, 32)]
    found: dict[tuple[str, str], Case] = {}
    for dtype in settings.dtypes:
        for name in settings.networks:
            for origin in origins:
                label = f"{name}, {dtype}, weights of {origin}"
                for height, width in sides:
                    check = functools.partial(
                        check_fused, settings, name, origin, dtype, height, width
                    )
                    found[f"fused network {label}, 2 x {height} x {width}", dtype] = check
                check = functools.partial(check_training, settings, name, origin, dtype)
                found[f"training step {label}", dtype] = check
    return found


def check_fused(
    settings: Settings, name: str, origin: str, dtype: str, height: int, width: int
) -> Row:
    """The output of the fused network; with graphs, of the capture and of a replay, too."""
    net = network(name, origin, dtype, settings.device)
    rows = []
    for seed in (1, 2, 3):
        images = net.images(2, height, width, seed)
        with torch.no_grad():
            exact = net.exact(images.double())
            bound = budget(relative_error(net.eager(images), exact), net.dtype)
            for engine, fused in net.fused.items():
                found = outcome(relative_error(fused(images), exact), bound)
                rows.append(found | {"note": found["note"] and f"{engine}, {found['note']}"})
    if GRAPHS in net.fused and (why := why_no_graph(net.fused[GRAPHS], images)):
        rows.append({"outcome": WRONG, "note": f"{harness.NO_GRAPH}{why}"})
    return worst(rows)


def check_training(settings: Settings, name: str, origin: str, dtype: str) -> Row:
    """Output and gradients of a forward in training mode and its backward.

    The error of the gradients is that of all of them together, by their root mean square.
    """
    net = network(name, origin, dtype, settings.device)
    images = net.images(4, settings.side, settings.side)
    found = {
        key: _gradients(module, images)
        for key, module in (("ours", net.accelerated), ("eager", net.eager), ("exact", net.exact))
    }
    exact_out, exact = found.pop("exact")
    outputs = {key: relative_error(out, exact_out) for key, (out, _) in found.items()}
    gradients = {key: _joint_error(grads, exact) for key, (_, grads) in found.items()}
    return worst(
        [
            outcome(errors["ours"], budget(errors["eager"], net.dtype), what)
            for what, errors in (("output", outputs), ("gradients", gradients))
        ]
    )


def _gradients(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of a copy in training mode, and the gradients of its parameters."""
    model = copy.deepcopy(module).train().requires_grad_(True)
    like = next(model.parameters())
    out = model(images.to(like.dtype))
    generator = torch.Generator().manual_seed(2)
    dout = torch.randn(out.shape, generator=generator).to(images.device, images.dtype)
    grads = torch.autograd.grad(out, list(model.parameters()), dout.to(like.dtype))
    return out.detach(), list(grads)


def _joint_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square of all differences / that of all exact numbers."""
    differences = [(f.double() - e).norm() for f, e in zip(found, exact, strict=True)]
    return float(torch.stack(differences).norm() / torch.stack([e.norm() for e in exact]).norm())
