"""What can be read off representations at any depth: closed-form probes, effective rank, sensitivity to a feature."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lineament import graph
from lineament._base.errors import InputError, unknown


def ridge_probe(known: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], *, ridge: float = 1.0) -> float:
    """Fit a linear classifier by ridge regression on one-hot labels, in closed form; return its accuracy elsewhere.

    Features are centred by the training mean, the offset is not shrunk; sums over rows, so `ridge` counts like rows.

    Args:
        known, unseen: features [N, p] and labels [N]. ridge: 0 takes the solution of least norm.
    """
    (x, y), (test, labels) = known, unseen
    x, test = _flat(x, y), _flat(test, labels)
    classes, of = torch.unique(y, return_inverse=True)
    target = nn.functional.one_hot(of, len(classes)).double()
    mean, offset = x.mean(0), target.mean(0)
    u, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    keep = s > s.max() * max(x.shape) * torch.finfo(s.dtype).eps
    factor = torch.where(keep, s / (s.square() + ridge), 0.0)
    weight = v.T @ (factor[:, None] * (u.T @ (target - offset)))
    chosen = classes[((test - mean) @ weight + offset).argmax(1)]
    return float((chosen == labels).double().mean())


def knn_probe(known: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], *, k: int = 5) -> float:
    """Classify by the majority of the k nearest rows, in Euclidean distance; return the accuracy.

    Of classes with as many votes the one of the smaller label wins.
    """
    (x, y), (test, labels) = known, unseen
    x, test = _flat(x, y), _flat(test, labels)
    if not 1 <= k <= len(x):
        raise InputError(f"k is {k}; expected from 1 to the {len(x)} rows known")
    classes, of = torch.unique(y, return_inverse=True)
    near = torch.cdist(test, x).topk(k, largest=False).indices
    votes = nn.functional.one_hot(of[near], len(classes)).sum(1)
    return float((classes[votes.argmax(1)] == labels).double().mean())


PROBES = {"ridge": ridge_probe, "knn": knn_probe}


@torch.no_grad()
def probe_depths(
    model: nn.Module, where: graph.Where, known: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], *,
    probe: str = "ridge", normalize: bool = False, project: int | None = None, **options: float,
) -> dict[str, float]:  # fmt: skip
    """Return the accuracy of a probe on the outputs of every chosen module: before the head, after it, anywhere.

    Args:
        where: which modules, see `graph.select`.
        known: inputs and labels the probe may learn from. unseen: those it is scored on.
        probe: "ridge" or "knn"; options are theirs.
        normalize: to unit length first; this changes verdicts, so look at both.
        project: onto so many random directions first, so that depths of unequal width compare.

    Raises:
        InputError: no such module or probe.
    """
    if probe not in PROBES:
        raise unknown("probe", probe, PROBES)
    features: list[Mapping[str, Tensor]] = []
    for inputs, _ in (known, unseen):
        with graph.capture(model, where) as captured:
            model(inputs)
        features.append({name: captured.tensor(name).flatten(1) for name in captured})
    found = {}
    for name in features[0]:
        pair = [one[name] for one in features]
        if project is not None:
            draw = torch.Generator().manual_seed(pair[0].shape[1] * 1_000_003 + project)
            onto = torch.randn(pair[0].shape[1], project, generator=draw) / project**0.5
            pair = [x @ onto.to(x) for x in pair]
        if normalize:
            pair = [nn.functional.normalize(x, dim=1) for x in pair]
        found[name] = PROBES[probe]((pair[0], known[1]), (pair[1], unseen[1]), **options)
    return found


def effective_rank(features: Tensor) -> float:
    """Return `exp H(p)` of the centred features' singular values over their sum (Roy and Vetterli 2007).

    Example:
        >>> round(effective_rank(torch.cat([torch.eye(4), -torch.eye(4)])), 4)
        4.0
    """
    s = torch.linalg.svdvals((features - features.mean(0)).double())
    p = s / s.sum().clamp_min(1e-300)
    return float(torch.special.entr(p).sum().exp())


def sensitivity(features: Tensor, resampled: Tensor) -> float:
    """Return how much a representation moves when only one planted feature is drawn anew: 1 if it knows nothing else.

    `E |f(x) - f(x')|^2 / (2 Var f)`, with the variance summed over entries.

    Args:
        features, resampled: [N, p], of inputs and of the same inputs with that feature drawn again.
    """
    if features.shape != resampled.shape:
        raise InputError(f"features are {list(features.shape)} and {list(resampled.shape)}; expected equal shapes")
    moved = (features - resampled).double().square().sum(1).mean()
    spread = features.double().var(0, unbiased=False).sum()
    return float(moved / (2 * spread).clamp_min(1e-300))


def _flat(x: Tensor, y: Tensor) -> Tensor:
    if not len(x) or len(x) != len(y):
        raise InputError(f"a probe was given {len(x)} rows and {len(y)} labels; expected as many, and some")
    return x.detach().flatten(1).double()
