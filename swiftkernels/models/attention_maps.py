"""`token_weights`: how much each token contributes to the global query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swiftkernels.ops.additive_attention.api import AttentionOutput
from swiftkernels.ops.additive_attention.layer import AttentionForward, in_evaluation


def token_weights(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The weights a of the tokens in G = sum_n a_n q_n, of every attention in a model.

    Runs the model once, in evaluation mode and without gradients; the model stays unchanged.
    The weights of an image depend on the pooling: "l2": they may be negative, and their squares sum
    to 1; "softmax": they sum to 1; "linear": they are the scores; "sum": each is 1.

    Args:
        model: a network of this library, or another model after `accelerate`.
        images: input of the model, [B, C, H, W].

    Returns:
        Weights by the names of the attentions, in the order of the stages: [B, H, W]; or [B, N]
        where the input of the attention has no spatial axes, as in transformers.

    Raises:
        ValueError: a model without attentions of this library.

    Example:
        >>> from swiftkernels.models import SwiftFormer
        >>> model = SwiftFormer((8, 16), (1, 2))
        >>> {k: a.shape for k, a in token_weights(model, torch.randn(1, 3, 32, 48)).items()}
        {'stages.0.blocks.0.attn': torch.Size([1, 8, 12]), 'stages.1.blocks.1.attn': \
torch.Size([1, 4, 6])}
    """
    attentions = {n: m for n, m in model.named_modules() if isinstance(m, AttentionForward)}
    if not attentions:
        raise ValueError(
            f"model must hold additive attentions of this library; {type(model).__name__} holds "
            "none. For the models of other libraries, call swiftkernels.accelerate(model) first."
        )
    names = {module: name for name, module in attentions.items()}
    found: dict[str, Tensor] = {}

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**kwargs, "return_weights": True, "residual_scale": None}
        result = AttentionForward.forward(module, *args, **given)
        assert isinstance(result, AttentionOutput)
        x = args[0] if args else kwargs["x"]
        channels_last = module.layout == "channels_last" or x.dim() == 3
        spatial = x.shape[1:-1] if channels_last else x.shape[2:]
        found[names[module]] = result.weights.unflatten(1, spatial)

    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in attentions.values()]
    try:
        with in_evaluation(model), torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
