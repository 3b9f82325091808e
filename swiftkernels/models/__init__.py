"""SwiftFormer (arXiv 2303.15446): the four models of the paper, and everybody's checkpoints."""

from swiftkernels.models.attention_maps import token_weights
from swiftkernels.models.checkpoint_io import load_checkpoint, save_checkpoint
from swiftkernels.models.swiftformer.checkpoints import convert_state_dict
from swiftkernels.models.swiftformer.hub import from_pretrained
from swiftkernels.models.swiftformer.network import (
    SwiftFormer,
    swiftformer_l1,
    swiftformer_l3,
    swiftformer_s,
    swiftformer_xs,
)

__all__ = [
    "SwiftFormer",
    "convert_state_dict",
    "from_pretrained",
    "load_checkpoint",
    "save_checkpoint",
    "swiftformer_l1",
    "swiftformer_l3",
    "swiftformer_s",
    "swiftformer_xs",
    "token_weights",
]
