"""Blind spots of a classifier: other images, reached along a level set of its confidence.

Level set traversal (Balasubramanian et al. 2023, arXiv:2310.19889): from a source towards any target, a step is only
the part of the way that is orthogonal to the local gradient, so that the confidence in the source's class stays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.explain.targets import scores_of

Classifier = Callable[[Tensor], Any]
"""Images [B, C, Y, X] in [0, 1] -> logits [B, classes], or a model output with them; normalisation inside."""

TINY = 1e-20
LEVELS = (0.0, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class BlindSpots:
    """Where traversal ended.

    Attributes:
        images: [B, C, Y, X], near the targets. sources, targets: where it began and what it went for.
        labels: the sources' classes [B]. start, confidence: in them, of the sources and of `images` [B].
        accepted: the share of steps taken [B].
    """

    images: Tensor
    sources: Tensor
    targets: Tensor
    labels: Tensor
    start: Tensor
    confidence: Tensor
    accepted: Tensor

    def distances(self) -> dict[str, Tensor]:
        """Return how far the images are from their targets [B]: "rmse", "linf", "ssim"; "share" of the rmse left."""
        gap = (self.images - self.targets).flatten(1)
        whole = (self.sources - self.targets).flatten(1).square().mean(1).sqrt()
        rmse = gap.square().mean(1).sqrt()
        return {"rmse": rmse, "linf": gap.abs().amax(1), "ssim": ssim(self.images, self.targets),
                "share": rmse / whole.clamp_min(TINY)}  # fmt: skip


def blind_spots(
    classifier: Classifier,
    sources: Tensor,
    targets: Tensor,
    *,
    labels: Tensor | None = None,
    steps: int = 400,
    rate: float = 1e-2,
    parallel: float = 2e-3,
    tolerance: float = 0.2,
    slope: str = "loss",
    stop: str = "reject",
    jitter: float = 2 / 255,
    seed: int = 0,
) -> BlindSpots:
    """Walk from each source towards its target while the classifier stays as sure of the source's class.

    x <- x + rate v_perp - d, with v_perp the part of target - x orthogonal to the gradient g of the loss, and
    d <- clip(d + parallel / 2 g) restoring confidence; a step is taken if the confidence fell less than `tolerance`.

    Args:
        classifier: images in [0, 1] -> logits, in eval mode.
        sources, targets: [B, C, Y, X] in [0, 1]. labels: the sources' classes; the likeliest if None.
        steps, rate, parallel, tolerance: m, eta, epsilon, delta.
        slope: g of the cross-"loss" (which vanishes where the classifier is sure), or of the logit "margin": the same
            level sets, but its g is large; take parallel = 0 with it.
        stop: "reject" leaves out single steps, as the authors' program does; "first" ends at the first, as the paper.
        jitter: the largest random change of a pixel that the walk begins with. seed: of it.

    Raises:
        InputError: unequal shapes, values outside [0, 1], or an unknown choice.

    Example:
        >>> net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), torch.rand(3, 1, 2, 2)
        >>> blind_spots(net, x, x.flip(0), steps=5).images.shape
        torch.Size([3, 1, 2, 2])
    """
    for what, given, known in (("slope", slope, ("loss", "margin")), ("stop", stop, ("reject", "first"))):
        if given not in known:
            raise unknown(what, given, known)
    _check(sources, targets)
    with torch.no_grad():
        scores = scores_of(classifier(sources))
        labels = scores.argmax(1) if labels is None else labels
        start = _confidence(scores, labels)
        noise = torch.rand(sources.shape, generator=generator(seed)).to(sources) - 0.5
        x = (sources + 2 * jitter * noise).clamp(0, 1)
    d, taken, going = torch.zeros_like(x), torch.zeros_like(start), torch.ones_like(labels, dtype=torch.bool)
    for _ in range(steps):
        g = _gradient(classifier, x, labels, slope)
        with torch.no_grad():
            d = (d + parallel / 2 * g).clamp(-parallel, parallel)
            new = (x + rate * orthogonal(targets - x, g) - d).clamp(0, 1)
            sure = _confidence(scores_of(classifier(new)), labels)
            moves = going & (start - sure < tolerance)
            x = torch.where(moves.view(-1, 1, 1, 1), new, x)
            taken += moves
            going = moves if stop == "first" else going
    confidence = _confidence(scores_of(classifier(x)), labels).detach()
    return BlindSpots(x, sources, targets, labels, start, confidence, taken / max(1, steps))


def orthogonal(v: Tensor, g: Tensor) -> Tensor:
    """Return the part of v orthogonal to g, image by image; v where g vanishes."""
    inner = [(a * g).flatten(1).sum(1) for a in (v, g)]
    share = inner[0] / inner[1].clamp_min(TINY)
    return v - share.view(-1, 1, 1, 1) * g


def _gradient(classifier: Classifier, x: Tensor, labels: Tensor, slope: str) -> Tensor:
    """Return the gradient of what rises as confidence falls, image by image."""
    with torch.enable_grad():
        given = x.detach().requires_grad_()
        scores = scores_of(classifier(given))
        loss = slope == "loss"
        rising = cross_entropy(scores, labels, reduction="sum") if loss else -margin(scores, labels).sum()
        return torch.autograd.grad(rising, given)[0]


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the logit margin z_y - log sum of exp of the others [B]: the logit of the confidence."""
    own = scores.gather(1, labels[:, None]).squeeze(1)
    return own - scores.scatter(1, labels[:, None], -torch.inf).logsumexp(1)


def _confidence(scores: Tensor, labels: Tensor) -> Tensor:
    return scores.softmax(1).gather(1, labels[:, None]).squeeze(1)


def _check(sources: Tensor, targets: Tensor) -> None:
    if sources.shape != targets.shape or sources.dim() != 4 or not sources.numel():
        raise InputError(
            f"sources are {list(sources.shape)}, targets {list(targets.shape)}; expected equal [B, C, Y, X]"
        )
    for what, x in (("sources", sources), ("targets", targets)):
        if not bool(x.isfinite().all()) or float(x.min()) < 0 or float(x.max()) > 1:
            raise InputError(f"{what} lie outside [0, 1]; put the normalisation into the classifier")


def straight_line(
    classifier: Classifier, sources: Tensor, targets: Tensor, *, labels: Tensor | None = None, tolerance: float = 0.2,
    points: int = 101,
) -> BlindSpots:  # fmt: skip
    """Return the furthest point of each straight line that is reached with less than `tolerance` confidence lost.

    The baseline of `blind_spots`; arguments as there. `points` are tried along the line.
    """
    _check(sources, targets)
    with torch.no_grad():
        scores = scores_of(classifier(sources))
        labels = scores.argmax(1) if labels is None else labels
        sure = confidence_path(classifier, sources, targets, labels, points=points)["confidence"]
        kept = (sure[:, :1] - sure < tolerance).long().cumprod(1)
        share = (kept.sum(1) - 1).clamp_min(0) / (points - 1)
        images = sources + share.view(-1, 1, 1, 1) * (targets - sources)
        confidence = _confidence(scores_of(classifier(images)), labels)
    return BlindSpots(images, sources, targets, labels, sure[:, 0], confidence, share)


@torch.no_grad()
def confidence_path(
    classifier: Classifier, sources: Tensor, ends: Tensor, labels: Tensor, *, points: int = 11
) -> dict[str, Tensor]:
    """Return the "confidence" in the labels and the logit "margin" along the straight lines to `ends` [B, points]."""
    scores = [
        scores_of(classifier(sources + share * (ends - sources))) for share in torch.linspace(0, 1, points).tolist()
    ]
    found = {"confidence": _confidence, "margin": margin}
    return {name: torch.stack([f(each, labels) for each in scores], 1) for name, f in found.items()}


@torch.no_grad()
def confidence_triangle(
    classifier: Classifier, source: Tensor, a: Tensor, b: Tensor, label: int, *, points: int = 11
) -> dict[str, Any]:
    """Measure the confidence over the triangle of a source and two blind spots.

    Args:
        source, a, b: [C, Y, X]. label: the source's class. points: per edge.

    Returns:
        "mean" over the half grid; "share" of its points above the source's confidence less 0, 0.1, 0.2, 0.3; "edges",
        the mean over both edges at the source; "dip", the lowest of them less the source's.
    """
    steps = torch.linspace(0, 1, points).tolist()
    shares = [(s, t) for s in steps for t in steps if s + t <= 1 + 1e-6]
    images = torch.stack([source + s * (a - source) + t * (b - source) for s, t in shares])
    sure = _confidence(scores_of(classifier(images)), torch.full((len(images),), label, device=images.device))
    edges = sure[torch.tensor([s == 0 or t == 0 for s, t in shares])]
    share = {f"{level:g}": float((sure > sure[0] - level).float().mean()) for level in LEVELS}
    return {
        "mean": float(sure.mean()),
        "share": share,
        "edges": float(edges.mean()),
        "dip": float(edges.min() - sure[0]),
    }


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of images in [0, 1], by a Gaussian window of 11 pixels or fewer [B].

    Example:
        >>> round(float(ssim(torch.ones(1, 1, 16, 16), torch.ones(1, 1, 16, 16))), 4)
        1.0
    """
    size = min(11, *x.shape[-2:])
    line = torch.exp(-((torch.arange(size) - (size - 1) / 2) ** 2) / (2 * 1.5**2)).to(x)
    window = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, size, size)

    def mean(z: Tensor) -> Tensor:
        return conv2d(z, window, groups=x.shape[1])

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return similar.flatten(1).mean(1)
