"""`warmup`: compile and pack before the first real call, not during it."""

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
    """Let every attention of this library in a model do now what its first call would do: those
    that were built, accelerated (`accelerate`) or registered (`register`).

    The Triton kernels are compiled, or loaded from Triton's cache, whatever the number of tokens
    and items; only for images in contiguous NCHW order it matters which power of two, up to 16,
    divides their number of pixels. The CPU kernels pack the weights, in one form for few tokens to
    a channel and another for many. So name the sizes that will come.

    Every layer runs on zeros in the type and on the device of its weights (in that of autocast,
    where it is on), as tokens and as images, contiguous and channels_last. No parameter, buffer,
    gradient or mode of the model changes.

    Args:
        model: any module.
        training: forward and backward too.
        image_sizes: heights and widths, in pixels or tokens, of what the layers will get.

    Returns:
        The names of the layers, "" for the model itself.

    Raises:
        TypeError: model is no module.
        ValueError: model has no such layer, or an image size is no pair of positive
            numbers.

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
                "image_sizes must be a sequence of pairs (height, width) of positive numbers; got "
                f"{size!r} in it. One size is image_sizes=[(14, 14)]."
            )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AttentionForward)}
    if not layers:
        raise ValueError(
            f"model must hold at least one AdditiveAttention; {type(model).__name__} holds none. "
            "Replace its attention layers first, or let swiftkernels.accelerate(model) do it."
        )
    for layer in layers.values():
        with in_evaluation(layer):  # for parts that are called: no statistics, no random numbers
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
    """Zeros of every layout that the layer takes."""
    weight, width = getattr(layer, layer.names.w_g), layer.in_dims
    examples = []
    for height, length in image_sizes:
        if layer.layout != "channels_first":
            examples.append(weight.new_zeros(1, height * length, width))
        if layer.layout == "channels_last":
            examples.append(weight.new_zeros(1, height, length, width))
        else:
            image = weight.new_zeros(1, width, height, length)
            examples += [image, image.contiguous(memory_format=torch.channels_last)]
    return examples


def _forward_and_backward(layer: AttentionForward, x: Tensor) -> None:
    with torch.enable_grad():
        x = x.requires_grad_()
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        out = layer(x)
        torch.autograd.grad(out, wanted, torch.zeros_like(out))
