"""Other attentions with linear or quadratic cost, [B, N, C] -> [B, N, C], to measure against.

Each is written from the formulas of its paper, with a bias in every linear layer, as additive
attention has. Only "separable_fused", the operator of this package, is fused.
"""

from collections.abc import Callable

from torch import nn

from swiftkernels.ops.separable_attention.layer import SeparableAttention as FusedSeparable
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
    "separable_fused": FusedSeparable,
    "linear": LinearAttention,
    "fastformer": Fastformer,
}
"""Functions that make a peer of a given width, by its name."""

__all__ = [
    "MDTA",
    "PEERS",
    "CrossCovarianceAttention",
    "Fastformer",
    "LinearAttention",
    "MultiHeadSelfAttention",
    "SeparableAttention",
]
