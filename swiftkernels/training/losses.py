"""Knowledge distillation as in DeiT (arXiv 2012.12877, section 4), for two heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.utils import checks

Distillation = Literal["none", "hard", "soft"]
"""Kind of distillation, see `DistillationLoss`."""


class DistillationLoss(nn.Module):
    """(1 - alpha) base(head, labels) + alpha distance(head_dist, teacher)

    With z the logits of head_dist and t the logits of the teacher, the distance is

    * "hard": the cross-entropy of z and argmax t (equation 3, with alpha = 1/2);
    * "soft": tau^2 KL(softmax(t / tau) || softmax(z / tau)), the mean over the images (equation 2).
      The code of DeiT also divides it by the number of classes.

    Args:
        base: loss of logits [B, classes] and labels: class numbers [B] or, for mixed images,
            probabilities [B, classes].
        teacher: images -> logits [B, classes]. It stays in eval mode and gets no gradients.
        kind: "hard", "soft", or "none" for only `base`.
        alpha: weight of the distance.
        tau: temperature of the soft distance.

    Raises:
        ValueError: a wrong argument.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard")
        >>> x = torch.randn(2, 4)
        >>> loss(x, (student(x), student(x)), torch.tensor([0, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        base: Callable[[Tensor, Tensor], Tensor],
        teacher: nn.Module | None = None,
        kind: Distillation = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        checks.check_option("kind", kind, get_args(Distillation))
        checks.check_number("tau", tau, positive=True)
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"alpha must be from 0 to 1; got {alpha}. 0 ignores the teacher, 1 the labels."
            )
        if (teacher is None) != (kind == "none"):
            given = "none" if teacher is None else "one"
            raise ValueError(
                "teacher must be given for kind='hard' and kind='soft', and only for these; got "
                f"{given} for kind={kind!r}."
            )
        self.base = base
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        self.teacher = teacher
        self.train()

    def train(self, mode: bool = True) -> DistillationLoss:
        """Set the mode of all modules except the teacher, which stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            images: input of the teacher, [B, C, H, W].
            outputs: the logits of both heads [B, classes], the output of a SwiftFormer in training
                after `set_distilled_training()`. With kind="none" also a single tensor; of a pair
                the first is used.
            labels: labels for `base`.

        Raises:
            ValueError: one head where two are necessary, or a teacher with other classes.
        """
        head, head_dist = (outputs, None) if isinstance(outputs, Tensor) else outputs
        loss = self.base(head, labels)
        if self.teacher is None:
            return loss
        if head_dist is None:
            raise ValueError(
                f"outputs must be the logits of two heads for kind={self.kind!r}; got one tensor. "
                "Build the model with distillation=True, call model.set_distilled_training() and "
                "model.train()."
            )
        with torch.no_grad():
            target = self.teacher(images)
        if target.shape != head_dist.shape:
            raise ValueError(
                f"teacher must give logits {list(head_dist.shape)}, as the model does; got "
                f"{list(target.shape)}. Use a teacher that was trained on the same classes."
            )
        if self.kind == "hard":
            distance = F.cross_entropy(head_dist, target.argmax(dim=1))
        else:
            distance = self.tau**2 * F.kl_div(
                F.log_softmax(head_dist / self.tau, dim=1),
                F.log_softmax(target / self.tau, dim=1),
                reduction="batchmean",
                log_target=True,
            )
        return (1 - self.alpha) * loss + self.alpha * distance
