"""Other attentions with linear or quadratic cost, [B, N, C] -> [B, N, C], to measure against.

Each is written from its paper's formulas, unfused, with a bias in every linear layer as the
operator has.
"""

from collections.abc import Callable

from torch import nn

from benchmarks.peers.fastformer import Fastformer
from benchmarks.peers.linear import LinearAttention
from benchmarks.peers.mdta import MDTA
from benchmarks.peers.mhsa import MultiHeadSelfAttention
from benchmarks.peers.separable import SeparableAttention
from benchmarks.peers.xca import CrossCovarianceAttention

PEERS: dict[str, Callable[[int], nn.Module]] = {
    "mhsa": MultiHeadSelfAttention,
    "xca": CrossCovarianceAttention,
    "mdta": MDTA,
    "separable": SeparableAttention,
    "linear": LinearAttention,
    "fastformer": Fastformer,
}
"""A peer of that width, by its name."""

__all__ = [
    "MDTA",
    "PEERS",
    "CrossCovarianceAttention",
    "Fastformer",
    "LinearAttention",
    "MultiHeadSelfAttention",
    "SeparableAttention",
]
