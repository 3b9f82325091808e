"""Knowledge distillation as in DeiT (arXiv 2012.12877, section 4), for two heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.utils import checks

KINDS = ("none", "hard", "soft")


class DistillationLoss(nn.Module):
    """(1 - alpha) base(head, labels) + alpha (distance of head_dist to the teacher)

    The distance is, with z the logits of a head and t those of the teacher,

    * "hard": the cross-entropy of z and argmax t (equation 3, where alpha is 1/2);
    * "soft": tau^2 KL(softmax(t / tau) || softmax(z / tau)), averaged over the images (equation 2).
      The code of DeiT divides this by the number of classes as well.

    Args:
        base: loss of logits [B, classes] and labels: class numbers [B] or, where images are mixed,
            probabilities [B, classes].
        teacher: gives logits [B, classes] for the images. It stays in evaluation mode and gets no
            gradients.
        kind: "hard", "soft", or "none", which leaves `base` alone.
        alpha: the teacher's share.
        tau: temperature of the soft distance.

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
        kind: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        checks.check_option("kind", kind, KINDS)
        checks.check_number("tau", tau, positive=True)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be a share from 0 to 1; got {alpha}.")
        if (teacher is None) != (kind == "none"):
            given = "none" if teacher is None else "one"
            raise ValueError(
                f"teacher must be given for kind 'hard' and 'soft' alone; got {given} for "
                f"kind={kind!r}."
            )
        self.base = base
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        self.teacher = teacher
        self.train()

    def train(self, mode: bool = True) -> DistillationLoss:
        """As of any module, but that the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            images: [B, C, H, W], what the teacher sees.
            outputs: of the model in training: the pair of its heads' logits [B, classes], which a
                SwiftFormer gives after `set_distilled_training()`. "none" takes a single tensor as
                well, and of a pair the first.
            labels: what `base` takes.

        Raises:
            ValueError: one head where two are needed, or a teacher with other classes.
        """
        head, head_dist = (outputs, None) if isinstance(outputs, Tensor) else outputs
        loss = self.base(head, labels)
        if self.teacher is None:
            return loss
        if head_dist is None:
            raise ValueError(
                f"outputs must be the logits of two heads for kind={self.kind!r}; got one tensor. "
                "Make the model with distillation=True, call model.set_distilled_training() and "
                "model.train()."
            )
        with torch.no_grad():
            target = self.teacher(images)
        if target.shape != head_dist.shape:
            raise ValueError(
                f"teacher must give logits {list(head_dist.shape)} as the model does; got "
                f"{list(target.shape)}. Take a teacher trained on the same classes."
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
