"""SwiftFormer (arXiv 2303.15446): the networks of the paper, and loading of public checkpoints."""

from swiftkernels.models.attention_maps import token_weights
from swiftkernels.models.checkpoint_io import (
    CheckpointMismatchError,
    LoadReport,
    load_checkpoint,
    save_checkpoint,
)
from swiftkernels.models.hub import Pretrained, from_pretrained
from swiftkernels.models.network import Network
from swiftkernels.models.swiftformer.checkpoints import convert_state_dict
from swiftkernels.models.swiftformer.network import (
    SwiftFormer,
    swiftformer_l1,
    swiftformer_l3,
    swiftformer_s,
    swiftformer_xs,
)

__all__ = [
    "CheckpointMismatchError",
    "LoadReport",
    "Network",
    "Pretrained",
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
