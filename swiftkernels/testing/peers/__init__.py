"""Other attentions with linear or quadratic cost, [B, N, C] -> [B, N, C], to measure against.

Each is written from its paper's formulas, unfused, with a bias in every linear layer as the
operator has.
"""

from collections.abc import Callable

from torch import nn

from swiftkernels.testing.peers.fastformer import Fastformer
from swiftkernels.testing.peers.linear import LinearAttention
from swiftkernels.testing.peers.mdta import MDTA
from swiftkernels.testing.peers.mhsa import MultiHeadSelfAttention
from swiftkernels.testing.peers.separable import SeparableAttention
from swiftkernels.testing.peers.xca import CrossCovarianceAttention

PEERS: dict[str, Callable[[int], nn.Module]] = {
    "mhsa": MultiHeadSelfAttention,
    "xca": CrossCovarianceAttention,
    "mdta": MDTA,
    "separable": SeparableAttention,
    "linear": LinearAttention,
    "fastformer": Fastformer,
}
"""Makes a peer of that width, by its name."""

__all__ = [
    "MDTA",
    "PEERS",
    "CrossCovarianceAttention",
    "Fastformer",
    "LinearAttention",
    "MultiHeadSelfAttention",
    "SeparableAttention",
]
