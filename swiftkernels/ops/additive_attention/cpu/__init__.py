"""The compiled CPU kernels as a backend (`ops/operator.py`)."""

from swiftkernels.ops.additive_attention.cpu.launch import Saved, backward, forward, saved_like
from swiftkernels.ops.additive_attention.cpu.plan import inference_plan

__all__ = ["Saved", "backward", "forward", "inference_plan", "saved_like"]
