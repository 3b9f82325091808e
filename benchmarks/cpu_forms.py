"""Measures from how many tokens per channel on the folded forms of the CPU kernels are faster.

    python -m benchmarks.cpu_forms

compares the folded forward with the triangular forward, and the folded backward, which needs no
queries and keys, with the backward that reads those of the forward. It measures on one thread, at
several widths and numbers of tokens. `cpu/packing.py` of additive attention explains the forms. The
results for this instruction set are written to `cpu/forms.json`, which decides the form of a call.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from swiftkernels import AdditiveAttention
from swiftkernels.backends import devices
from swiftkernels.backends.cpu import library
from swiftkernels.ops.additive_attention.cpu import config
from swiftkernels.ops.additive_attention.cpu.packing import FOLDED, TRIANGULAR
from swiftkernels.testing.timing import Call, Stopwatch, interleave
from swiftkernels.utils import command
from swiftkernels.utils.files import write_text
from swiftkernels.utils.progress import Progress

WIDTHS = (48, 64, 128, 256, 512)
BACKWARD_WIDTHS = (96, 128, 256)
"""Not smaller: there the forward never keeps rows."""

RATIOS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Tokens per channel, in growing order."""


def forced(call: Call, function: str, value: object) -> Call:
    """The call with a function of `config` that returns `value` for all shapes."""

    def run() -> None:
        with mock.patch.object(config, function, return_value=value):
            call()

    return run


def layer_and_tokens(width: int, ratio: float, **options: Any) -> tuple[AdditiveAttention, Tensor]:
    """A layer, and x with `ratio` tokens per channel in every batch element."""
    torch.manual_seed(0)
    layer = AdditiveAttention(width, width, 1, backend="cpu", **options)
    return layer, torch.randn(max(1, 16384 // int(ratio * width)), int(ratio * width), width)


def gain(calls: dict[str, Call], seconds: float) -> float:
    """Time of the first call divided by that of the second."""
    first, second = interleave(calls, Stopwatch("cpu"), seconds).values()
    return first.median / second.median


@torch.no_grad()
def forward_gain(width: int, ratio: float, seconds: float, qk_norm: bool) -> float:
    """Time of the triangular forward divided by that of the folded one."""

    def call(form: int) -> Call:
        layer, x = layer_and_tokens(width, ratio, qk_norm=qk_norm)
        return forced(lambda: layer(x), "form", form)

    return gain({"triangular": call(TRIANGULAR), "folded": call(FOLDED)}, seconds)


def backward_gain(width: int, ratio: float, seconds: float) -> float:
    """Time of forward and backward with kept rows divided by that of the folded forms."""

    def call(folded: bool) -> Call:
        layer, x = layer_and_tokens(width, ratio, recompute=folded)
        leaves = [x.requires_grad_(), *layer.parameters()]

        def step() -> None:
            out = layer(x)
            torch.autograd.grad(out, leaves, out.detach())

        return forced(step, "folds_backward", folded)

    return gain({"rows": call(False), "folded": call(True)}, seconds)


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
    parser = command.Parser(description=(__doc__ or "").split("\n\n")[0])
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
        for name, (measure, widths) in thresholds.items():
            gains = {}
            for ratio in RATIOS:
                values = []
                for width in widths:
                    values.append(measure(width, ratio, arguments.seconds))
                    progress.advance()
                gains[ratio] = statistics.geometric_mean(values)
                progress.write(f"{name}, {ratio:g} tokens per channel: {gains[ratio]:.3f}")
            found[name] = threshold(gains)
    table = json.loads(config.TABLE.read_text())
    table[loaded.name] = found | {"device": devices.name(torch.device("cpu"))}
    write_text(config.TABLE, json.dumps(table, indent=2) + "\n")
    print(f"{loaded.name}: {found}, written to {config.TABLE}")


if __name__ == "__main__":
    sys.exit(command.run(main))
