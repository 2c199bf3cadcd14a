"""KL to a teacher and next-token loss over a large vocabulary, forward and gradient in one pass over chunks."""

from typing import Any

import torch
from torch import Tensor

from lineament._base.backends import widest

CHUNK = 256  # predictions at a time: 256 x 50k float32 numbers are 50 MB


class _Distil(torch.autograd.Function):
    """Computes the gradient beside the loss, so that no float32 copy of all logits is ever kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, targets: Tensor, kl: Tensor, following: Tensor) -> Any:
        gradient = torch.empty_like(student)
        sums = torch.zeros(2, dtype=widest(student.device), device=student.device)
        total = sums.new_zeros(())
        for at in range(0, student.shape[0], CHUNK):
            part = slice(at, at + CHUNK)
            log_student = student[part].float().log_softmax(-1)
            log_teacher = teacher[part].float().log_softmax(-1)
            p = log_teacher.exp()
            divergence = (p * (log_teacher - log_student)).sum(-1)
            loss = -log_student.gather(-1, targets[part, None])[:, 0]
            sums += torch.stack([divergence.sum(), loss.sum()]).to(sums.dtype)
            a, b = kl[part], following[part]
            total += ((a * divergence) + (b * loss)).sum().to(total.dtype)
            slope = log_student.exp_().mul_((a + b)[:, None]).sub_(p.mul_(a[:, None]))
            slope.scatter_add_(-1, targets[part, None], -b[:, None])
            gradient[part] = slope.to(student.dtype)
        ctx.save_for_backward(gradient)
        means = (sums / max(1, student.shape[0])).float()
        ctx.mark_non_differentiable(means)
        return total.float(), means

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * slopes[0].to(gradient.dtype), None, None, None, None


def distil_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, *, kl: Tensor, following: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Return `sum_n kl_n KL(teacher_n || student_n) - following_n log student_n(target_n)`.

    Args:
        student, teacher: [N, vocabulary] logits; only the student's get a gradient.
        targets: [N] the tokens that followed. kl, following: [N] weights; make them sum to what you want.

    Returns:
        The scalar, and the plain means {"kl", "next"} in nats per token.

    Example:
        >>> logits = torch.zeros(2, 3)
        >>> one = torch.full((2,), 0.5)
        >>> round(float(distil_loss(logits, logits, torch.tensor([0, 1]), kl=one, following=one)[0]), 4)
        1.0986
    """
    total, means = _Distil.apply(student, teacher, targets, kl.float(), following.float())
    kl_mean, next_mean = means.detach().tolist()
    return total, {"kl": kl_mean, "next": next_mean}
