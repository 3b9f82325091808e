"""Times of whole networks and of single operators in every engine, measured in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import whole_networks
from benchmarks.gpu.device import results
from benchmarks.gpu.device.cases import Case, Settings, machine, run_cases
from benchmarks.gpu.device.networks import DTYPES, Network, network, source, why_no_graph
from benchmarks.gpu.device.results import FORWARD, GRAPHS, RIGHT, TRAINING, WRONG, Row
from benchmarks.timm_networks import call_of, ends, in_channels_last
from swiftkernels.backends import devices
from swiftkernels.ops import benchmarks
from swiftkernels.testing import costs, engines, harness, timing
from swiftkernels.testing.engines import OURS, Call
from swiftkernels.testing.tolerance import budget, relative_error
from swiftkernels.utils.text import first_line

LOSS_ERROR, LOSS_ERROR_ROUNDED = 1e-4, 0.05
"""Largest relative difference of the first losses of two engines: in float32, and in types with
shorter mantissas. The gradients are compared by `checks.check_training`."""
OTHERS = 5
"""The error of an engine that is not of this library may be so many times its bound."""


def networks_step(settings: Settings) -> int:
    """Inference of whole networks in every engine."""
    return _run_networks("networks", "inference", "max-autotune", time_network, settings)


def time_network(settings: Settings, name: str, dtype: str, batch: int) -> Row:
    net = network(name, source(), dtype, settings.device)
    images = net.images(batch, settings.side, settings.side)
    with torch.no_grad():
        exact = net.exact(ends(images).double())
        bound = budget(relative_error(net.eager(ends(images)), exact), net.dtype)
    builders: dict[str, Callable[[], Call]] = {
        "eager": lambda: call_of(net.eager, images),
        "channels_last": lambda: call_of(*in_channels_last(net.eager, images)),
    }
    if settings.compiled:
        builders["compile-max"] = lambda: _max_autotune(net.eager, images)
    builders[OURS] = lambda: call_of(net.fused[OURS], images)
    if GRAPHS in net.fused:
        builders[GRAPHS] = lambda: _with_graph(net.fused[GRAPHS], images)

    def wrong(engine: str, row: Row, outputs: Sequence[Tensor]) -> str:
        row["error"] = relative_error(ends(outputs[0]), exact)
        limit = bound * (1 if engine in results.OWN else OTHERS)
        return "" if row["error"] <= limit else f"relative error {row['error']:.2g} > {limit:.2g}"

    return _time_engines(settings, net, FORWARD, dtype, batch, builders, wrong)


def _with_graph(fused: nn.Module, images: Tensor) -> Call:
    if why := why_no_graph(fused, images):
        raise RuntimeError(f"{harness.NO_GRAPH}{why}")
    return call_of(fused, images)


@torch.no_grad()
def _max_autotune(module: nn.Module, images: Tensor) -> Call:
    return engines.compile_frozen(
        module, lambda made: call_of(made, images), "max-autotune-no-cudagraphs"
    )


def training_step(settings: Settings) -> int:
    """Training steps of whole networks; 16-bit types by autocast."""
    return _run_networks("training", "training step", "torch.compile", time_training, settings)


def _run_networks(
    step: str,
    what: str,
    compiler: str,
    time_one: Callable[[Settings, str, str, int], Row],
    settings: Settings,
) -> int:
    """Run a case for each network, type and batch; returns the exit status of the step."""
    cases: dict[tuple[str, str], Case] = {}
    for dtype in settings.dtypes:
        for batch in settings.batches:
            for name in settings.networks:
                label = f"{what} of {name}, {dtype}, batch {batch}"
                label += f", with {compiler}" if settings.compiled else ""
                cases[label, dtype] = functools.partial(time_one, settings, name, dtype, batch)
    return run_cases(step, cases, settings)


def time_training(settings: Settings, name: str, dtype: str, batch: int) -> Row:
    net = network(name, source(), "float32", settings.device)
    images = net.images(batch, settings.side, settings.side)
    autocast = None if DTYPES[dtype] == torch.float32 else DTYPES[dtype]
    step = functools.partial(whole_networks.step_of, autocast=autocast)
    builders: dict[str, Callable[[], Call]] = {
        "eager": lambda: step(net.eager, images),
        "channels_last": lambda: step(*in_channels_last(net.eager, images)),
        "accelerated": lambda: step(net.accelerated, images),
        "accelerated-channels_last": lambda: step(*in_channels_last(net.accelerated, images)),
    }
    if settings.compiled:
        builders["compile"] = lambda: step(net.eager, images, compiled=True)
    (loss,) = step(net.eager, images)()
    limit = LOSS_ERROR if dtype == "float32" else LOSS_ERROR_ROUNDED

    def wrong(engine: str, row: Row, losses: Sequence[Tensor]) -> str:
        row["error"] = relative_error(losses[0], loss)
        return "" if row["error"] <= limit else f"first loss {losses[0]:.5g} instead of {loss:.5g}"

    return _time_engines(settings, net, TRAINING, dtype, batch, builders, wrong)


def _time_engines(
    settings: Settings,
    net: Network,
    direction: str,
    dtype: str,
    batch: int,
    builders: Mapping[str, Callable[[], Call]],
    wrong: Callable[[str, Row, Sequence[Tensor]], str],
) -> Row:
    """Build, check and time engines; returns the columns of the case."""
    device = settings.device
    watch = timing.Stopwatch(device)
    common = {
        "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "network": net.name,
        "source": net.origin,
        "direction": direction,
        "dtype": dtype,
        "batch": batch,
        "side": settings.side,
        **machine(device),
    }
    rows = {engine: common | {"engine": engine, "note": ""} for engine in builders}
    calls: dict[str, Call] = {}
    graphs: dict[str, Call] = {}
    for engine, row in rows.items():
        print(f"  {net.name}, {dtype}, batch {batch}: {engine}", flush=True)
        try:
            call = builders[engine]()
            row["note"] = wrong(engine, row, call())
            if row["note"]:
                continue
            if device.type == "cuda" and engine != GRAPHS:  # a graph keeps its memory
                row["peak_bytes"] = costs.peak_bytes(call, device)
        except Exception as error:  # a compiler that fails, or too little memory, is a result
            row["note"] = first_line(error)
            if devices.why_lost(device):
                raise
            continue
        calls[engine] = call
        can_capture = direction == FORWARD and device.type == "cuda" and engine != GRAPHS
        if can_capture and (graph := _captured(engine, row, call, wrong)):
            graphs[engine] = graph
    for prefix, timed, clock in (
        ("", calls, watch),
        ("graph_", graphs, functools.partial(watch, queued=True)),
    ):
        for engine, found in timing.interleave(timed, clock, settings.seconds).items():
            rows[engine] |= found.columns(prefix)
            rows[engine][f"{prefix}rounds"] = len(found.samples)
            rows[engine][f"{prefix}images_per_second"] = batch / found.median
    results.networks(settings.out).put(rows.values())
    failures = [f"{engine}: {row['note']}" for engine, row in rows.items() if row["note"]]
    return {"outcome": WRONG if failures else RIGHT, "note": "; ".join(failures)}


def _captured(
    engine: str, row: Row, call: Call, wrong: Callable[[str, Row, Sequence[Tensor]], str]
) -> Call | None:
    """The call as a CUDA graph; None if there is none, with the reason in the row."""
    try:
        graph: Call = timing.capture(call)
        reason = wrong(engine, row, graph())
    except Exception as error:
        reason = first_line(error)
    row["note"] = reason and f"{harness.NO_GRAPH}{reason}"
    return None if reason else graph


def operators_step(settings: Settings) -> int:
    """Every operator at the sizes of networks, in every engine."""
    cases: dict[tuple[str, str], Case] = {}
    for dtype in settings.dtypes:
        for batch in settings.batches:
            for name, benchmark in benchmarks().items():
                sizes = benchmark.quick_sizes[-1:] if settings.tiny else benchmark.sizes
                for size in sizes:
                    for backward in (False, True):
                        direction = harness.direction_name(backward)
                        label = f"{name}, {size.name}, {dtype}, batch {batch}, {direction}"
                        label += ", with torch.compile" if settings.compiled else ""
                        case = functools.partial(
                            time_operator, settings, name, size, dtype, batch, backward
                        )
                        cases[label, dtype] = case
    return run_cases("operators", cases, settings)


def time_operator(
    settings: Settings, name: str, size: Any, dtype: str, batch: int, backward: bool
) -> Row:
    benchmark = benchmarks()[name]
    problem = engines.Problem(
        size, batch, DTYPES[dtype], backward, settings.device, benchmark=benchmark
    )
    chosen = [OURS, "eager"]
    if name == "additive_attention":
        chosen.append("mhsa")  # scaled_dot_product_attention at the same size
    if settings.compiled:
        chosen.append("compile")
    watch = timing.Stopwatch(settings.device)
    rows = harness.compare(problem, chosen, watch, settings.seconds / 2)
    named = [{"operator": name, **machine(settings.device), **row} for row in rows]
    results.operators(settings.out).put(named)
    failures = [f"{row['engine']}: {row['note']}" for row in rows if row["note"]]
    is_wrong = any(map(harness.is_error, rows))
    return {"outcome": WRONG if is_wrong else RIGHT, "note": "; ".join(failures)}
