"""`warmup`: compile kernels and pack weights before the first real call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swiftkernels.ops.additive_attention.layer import AttentionForward, in_evaluation


def warmup(
    model: nn.Module,
    *,
    training: bool = False,
    image_sizes: Sequence[tuple[int, int]] = ((4, 4),),
) -> list[str]:
    """Run every attention of this library in a model once, so that its first call is not slower.

    These are layers that were built, accelerated (`accelerate`) or registered (`register`).

    * Triton kernels are compiled, or loaded from Triton's cache. They serve any number of tokens
      and batch elements; only for contiguous NCHW images they also depend on the largest power of
      two, up to 16, that divides the number of pixels.
    * CPU kernels pack the weights, in one form for few tokens per channel and in another for many.

    So pass the sizes that the layers will get.

    Every layer runs on zeros, on the device of its weights and in their dtype (or that of
    autocast), as tokens and as images, contiguous and channels_last. Parameters, buffers, gradients
    and modes of the model stay unchanged.

    Args:
        model: any module.
        training: also run forward and backward with gradients.
        image_sizes: heights and widths, in tokens, of the inputs of the layers.

    Returns:
        The names of the layers, "" for the model itself.

    Raises:
        TypeError: model is not a module.
        ValueError: model has no such layer, or an image size is not a pair of positive integers.

    Example:
        >>> from swiftkernels import AdditiveAttention
        >>> warmup(nn.Sequential(AdditiveAttention(64, 64, 1)), training=True)
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    for size in image_sizes if isinstance(image_sizes, Sequence) else (image_sizes,):
        if not _is_size(size):
            raise ValueError(
                "image_sizes must be a sequence of pairs (height, width) of positive ints; got "
                f"{size!r} in it. For a single size, pass image_sizes=[(14, 14)]."
            )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AttentionForward)}
    if not layers:
        raise ValueError(
            f"model must hold at least one AdditiveAttention; {type(model).__name__} holds none. "
            "Replace its attention layers first, or call swiftkernels.accelerate(model)."
        )
    for layer in layers.values():
        with in_evaluation(layer):  # called parts update no statistics and draw no random numbers
            for x in _examples(layer, image_sizes):
                with torch.no_grad():
                    layer(x)
                if training:
                    _forward_and_backward(layer, x)
    return list(layers)


def _is_size(size: object) -> bool:
    return (
        isinstance(size, Sequence)
        and len(size) == 2
        and all(isinstance(n, int) and n > 0 for n in size)
    )


def _examples(layer: AttentionForward, image_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Zeros in every layout that the layer accepts."""
    weight, channels = getattr(layer, layer.names.w_g), layer.in_dims
    examples = []
    for height, width in image_sizes:
        if layer.layout != "channels_first":
            examples.append(weight.new_zeros(1, height * width, channels))
        if layer.layout == "channels_last":
            examples.append(weight.new_zeros(1, height, width, channels))
        else:
            image = weight.new_zeros(1, channels, height, width)
            examples += [image, image.contiguous(memory_format=torch.channels_last)]
    return examples


def _forward_and_backward(layer: AttentionForward, x: Tensor) -> None:
    with torch.enable_grad():
        x = x.requires_grad_()
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        out = layer(x)
        torch.autograd.grad(out, wanted, torch.zeros_like(out))
