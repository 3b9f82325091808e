"""SwiftFormer (arXiv 2303.15446): the four models of the paper, and everybody's checkpoints."""

from swiftkernels.models.checkpoints import convert_state_dict
from swiftkernels.models.swiftformer import (
    SwiftFormer,
    swiftformer_l1,
    swiftformer_l3,
    swiftformer_s,
    swiftformer_xs,
)

__all__ = [
    "SwiftFormer",
    "convert_state_dict",
    "swiftformer_l1",
    "swiftformer_l3",
    "swiftformer_s",
    "swiftformer_xs",
]
