"""Measures from how many tokens per channel the folded forms of the CPU kernels are faster.

    python -m benchmarks.cpu_forms

compares the folded forward with the triangular one, and the folded backward, which needs no queries
and keys, with the one that reads those kept by the forward: on one thread, at several widths and
numbers of tokens. `cpu/packing.py` of additive attention explains the forms. The result for this
instruction set goes into `cpu/forms.json`, by which the kernels are chosen.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from swiftkernels import AdditiveAttention
from swiftkernels.backends import devices
from swiftkernels.backends.cpu import library
from swiftkernels.ops.additive_attention.cpu import config, launch
from swiftkernels.ops.additive_attention.cpu.packing import (
    FOLDED,
    TRIANGULAR,
    Packed,
    Weights,
    pack,
)
from swiftkernels.ops.additive_attention.reference import Options
from swiftkernels.testing.timing import Call, Stopwatch, interleave
from swiftkernels.utils.files import write_text
from swiftkernels.utils.progress import Progress

WIDTHS = (48, 64, 128, 256, 512)
BACKWARD_WIDTHS = (96, 128, 256)
"""At smaller widths the forward keeps no rows in any case."""

RATIOS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Tokens per channel, in growing order."""


def problem(width: int, ratio: float) -> tuple[Tensor, Weights]:
    """x with `ratio` tokens per channel in every batch element, and a layer's weights."""
    torch.manual_seed(0)
    layer = AdditiveAttention(width, width, 1).requires_grad_(False)
    x = torch.randn(max(1, 16384 // int(ratio * width)), int(ratio * width), width)
    weights = Weights(
        layer.to_query.weight, layer.to_query.bias, layer.to_key.weight, layer.to_key.bias,
        layer.w_g.flatten(), layer.proj.weight, layer.proj.bias, layer.final.weight,
        layer.final.bias,
    )  # fmt: skip
    return x, weights


def options(width: int, qk_norm: bool = True) -> Options:
    return Options("l2", qk_norm, width**-0.5, 1e-12)


def forward_gain(width: int, ratio: float, seconds: float, qk_norm: bool) -> float:
    """Time of the triangular forward divided by that of the folded one."""
    x, weights = problem(width, ratio)
    out = torch.empty_like(x)

    def call(form: int) -> Call:
        packed = pack(launch.kernels(), weights, options(width, qk_norm), form)
        return lambda: _run(form, x, out, packed)

    calls = {"triangular": call(TRIANGULAR), "folded": call(FOLDED)}
    times = interleave(calls, Stopwatch("cpu"), seconds)
    return times["triangular"].median / times["folded"].median


def backward_gain(width: int, ratio: float, seconds: float) -> float:
    """Time of forward and backward with kept rows divided by that of the folded forms."""
    x, weights = problem(width, ratio)
    tensors = (x, *weights[:-1], None)

    def call(folded: bool) -> Call:
        def run() -> None:
            out, G, kept, rows = launch.additive_self_attention_forward(
                *tensors, options(width), "statistics" if folded else "rows"
            )
            with mock.patch.object(config, "folds_backward", return_value=folded):
                launch.additive_self_attention_backward(
                    out, *tensors, (G, kept, rows), options(width), True, True
                )

        return run

    calls = {"rows": call(False), "folded": call(True)}
    times = interleave(calls, Stopwatch("cpu"), seconds)
    return times["rows"].median / times["folded"].median


def _run(form: int, x: Tensor, out: Tensor, packed: Packed) -> None:
    batch, n_tokens, _ = x.shape
    done = launch.call_forward(
        packed, batch, n_tokens, form, x, x.stride(), out, out.stride(), add_input=False
    )
    assert done


def threshold(gains: dict[float, float]) -> float:
    """The ratio from which all gains are above 1; twice the largest ratio if there is none.

    Example:
        >>> threshold({1.0: 0.9, 2.0: 1.1, 4.0: 1.2})
        2.0
    """
    ratios = sorted(gains)
    for i, ratio in enumerate(ratios):
        if all(gains[r] > 1 for r in ratios[i:]):
            return ratio
    return 2 * ratios[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="per comparison (%(default)s)")
    arguments = parser.parse_args()
    loaded = library.loaded()
    if loaded is None:
        parser.error(f"the CPU backend {library.why_not()}")
    torch.set_num_threads(1)
    thresholds: dict[str, tuple[Callable[..., float], tuple[int, ...]]] = {
        "folded_from": (functools.partial(forward_gain, qk_norm=True), WIDTHS),
        "folded_from_without_norms": (functools.partial(forward_gain, qk_norm=False), WIDTHS),
        "folded_backward_from": (backward_gain, BACKWARD_WIDTHS),
    }
    found = {}
    total = len(RATIOS) * sum(len(widths) for _, widths in thresholds.values())
    with Progress(total, "comparisons") as progress:
        for name, (gain, widths) in thresholds.items():
            gains = {}
            for ratio in RATIOS:
                values = []
                for width in widths:
                    values.append(gain(width, ratio, arguments.seconds))
                    progress.advance()
                gains[ratio] = statistics.geometric_mean(values)
                progress.write(f"{name}, {ratio:g} tokens per channel: {gains[ratio]:.3f}")
            found[name] = threshold(gains)
    table = json.loads(config.TABLE.read_text())
    table[loaded.name] = found | {"device": devices.name(torch.device("cpu"))}
    write_text(config.TABLE, json.dumps(table, indent=2) + "\n")
    print(f"{loaded.name}: {found}, written to {config.TABLE}")


if __name__ == "__main__":
    main()
