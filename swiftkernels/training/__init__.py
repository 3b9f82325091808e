"""The training recipe of the SwiftFormer paper; as a command: `python -m swiftkernels.training`."""

from swiftkernels.training.losses import DistillationLoss
from swiftkernels.training.optimizer import clip_adaptively_, parameter_groups
from swiftkernels.training.recipe import Recipe
from swiftkernels.training.trainer import Scores, evaluate, evaluate_file, train

__all__ = [
    "DistillationLoss",
    "Recipe",
    "Scores",
    "clip_adaptively_",
    "evaluate",
    "evaluate_file",
    "parameter_groups",
    "train",
]
