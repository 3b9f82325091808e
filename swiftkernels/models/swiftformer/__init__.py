"""SwiftFormer (arXiv 2303.15446): network, names of the public checkpoints, family."""

from swiftkernels.models.swiftformer.family import FAMILY

__all__ = ["FAMILY"]
