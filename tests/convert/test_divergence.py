"""The chunked KL and next-token loss equals the plain one, gradients too."""

import pytest
import torch

from lineament.convert.divergence import distil_loss


@pytest.mark.parametrize("count", [1, 255, 256, 300])
def test_it_equals_the_plain_form(count):
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(count, 11, generator=draw, requires_grad=True)
    teacher = torch.randn(count, 11, generator=draw)
    targets = torch.randint(0, 11, (count,), generator=draw)
    kl, following = torch.rand(count, generator=draw), torch.rand(count, generator=draw)
    total, means = distil_loss(student, teacher, targets, kl=kl, following=following)
    (gradient,) = torch.autograd.grad(total * 3, student)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1)
    loss = -log_s.gather(-1, targets[:, None])[:, 0]
    plain = (kl * divergence + following * loss).sum()
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain * 3, student)[0])
    assert means["kl"] == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert means["next"] == pytest.approx(float(loss.mean()), rel=1e-4)


def test_a_student_that_agrees_has_no_slope():
    logits = torch.randn(4, 7, requires_grad=True)
    weights = torch.full((4,), 0.25)
    total, _ = distil_loss(logits, logits.detach(), torch.zeros(4, dtype=torch.long), kl=weights, following=0 * weights)
    assert abs(float(total)) < 1e-6
    assert float(torch.autograd.grad(total, logits)[0].abs().max()) < 1e-7
