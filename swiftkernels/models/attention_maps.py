"""What additive attention looks at: the weights of the tokens in the global query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swiftkernels.ops.additive_attention.api import AttentionOutput
from swiftkernels.ops.additive_attention.layer import AttentionForward, in_evaluation


def token_weights(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The weights a of the tokens in G = sum_n a_n q_n, of every attention in a model.

    A run in evaluation mode and without gradients; the model stays as it is. With pooling "l2" the
    squares of an image's weights sum to 1 and they have signs, with "softmax" they sum to 1,
    "linear" are the scores themselves, and with "sum" every token weighs 1.

    Args:
        model: one of this library, or of others after `accelerate`.
        images: what the model takes, [B, C, H, W].

    Returns:
        By the names of the attentions, in the order of the stages: [B, H, W], or [B, N] where the
        attention gets tokens without their places, as in transformers.

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
            "none. Of others' models: swiftkernels.accelerate(model) first."
        )
    names = {module: name for name, module in attentions.items()}
    found: dict[str, Tensor] = {}

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**kwargs, "return_weights": True, "residual_scale": None}
        result = AttentionForward.forward(module, *args, **given)
        assert isinstance(result, AttentionOutput)
        x = args[0] if args else kwargs["x"]
        places = x.shape[1:-1] if module.layout == "channels_last" or x.dim() == 3 else x.shape[2:]
        found[names[module]] = result.weights.unflatten(1, places)

    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in attentions.values()]
    try:
        with in_evaluation(model), torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
