"""Measures from how many tokens per channel on the CPU kernels' folded form is the faster one.

    python -m benchmarks.cpu_forms

times both forms (see `swiftkernels.cpu.weights`) side by side on one thread, at widths from 48 to
512 and growing numbers of tokens, and writes what it finds for this instruction set into
`swiftkernels/cpu/forms.json`, which the kernels' choice of form is read from.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import timing
from swiftkernels import AdditiveAttention
from swiftkernels.cpu import config, launch, library
from swiftkernels.cpu.weights import FOLDED, TRIANGULAR, Packed, Weights, pack
from swiftkernels.reference import Options

WIDTHS = (48, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Tokens per channel, in growing order."""


def gain(width: int, ratio: float, qk_norm: bool, seconds: float) -> float:
    """Time of the triangular form over that of the folded one."""
    torch.manual_seed(0)
    layer = AdditiveAttention(width, width, 1).requires_grad_(False)
    x = torch.randn(max(1, 16384 // int(ratio * width)), int(ratio * width), width)
    options = Options("l2", qk_norm, width**-0.5, 1e-12)
    weights = Weights(
        layer.to_query.weight, layer.to_query.bias, layer.to_key.weight, layer.to_key.bias,
        layer.w_g, layer.proj.weight, layer.proj.bias, layer.final.weight, layer.final.bias,
    )  # fmt: skip
    out = torch.empty_like(x)

    def call(form: int) -> timing.Call:
        packed = pack(launch.kernels(), weights, options, form)
        return lambda: _run(form, x, out, packed)

    calls = {"triangular": call(TRIANGULAR), "folded": call(FOLDED)}
    times = timing.interleave(calls, "cpu", seconds)
    return times["triangular"].median / times["folded"].median


def _run(form: int, x: Tensor, out: Tensor, packed: Packed) -> None:
    batch, n_tokens, _ = x.shape
    done = launch.call_forward(
        packed, batch, n_tokens, form, x, x.stride(), out, out.stride(), add_input=False
    )
    assert done


def threshold(gains: dict[float, float]) -> float:
    """The ratio from which on all gains are above 1; twice the largest if there is none.

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
    found = {}
    with tqdm(total=2 * len(WIDTHS) * len(RATIOS), unit="comparison") as progress:
        for name, qk_norm in (("folded_from", True), ("folded_from_without_norms", False)):
            gains = {}
            for ratio in RATIOS:
                values = []
                for width in WIDTHS:
                    values.append(gain(width, ratio, qk_norm, arguments.seconds))
                    progress.update()
                gains[ratio] = statistics.geometric_mean(values)
                progress.write(f"{name}, {ratio:g} tokens per channel: {gains[ratio]:.3f}")
            found[name] = threshold(gains)
    table = json.loads(config.TABLE.read_text())
    table[loaded.name] = found | {"device": timing.device_name("cpu")}
    config.TABLE.write_text(json.dumps(table, indent=2) + "\n")
    print(f"{loaded.name}: {found}, written to {config.TABLE}")


if __name__ == "__main__":
    main()
