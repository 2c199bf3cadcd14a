"""Why matching works: how far the leading singular vectors of two models point the same way (arXiv:2402.04051)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament._base.errors import InputError


@dataclass(frozen=True)
class Alignment:
    """How two models lie to each other.

    Attributes:
        distance: |a - b| over the weights compared.
        score: R of all singular vectors; leading: R of those with s >= 0.3 s_max.
        layers: name -> (distance, score, leading).
    """

    distance: float
    score: float
    leading: float
    layers: Mapping[str, tuple[float, float, float]]


def alignment(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, share: float = 0.3) -> Alignment:
    """Compare two models by the singular vectors of their weights.

    `R = sum_lij (u_i^a . u_j^b)(v_i^a . v_j^b) / sum_l n_l` over the singular values of at least `share` of the layer's
    largest, n_l the smaller number kept. Kernels are read as (out, in * ky * kx).

    Raises:
        InputError: the models share no matrix of equal shape.

    Example:
        >>> w = {"w": torch.diag(torch.tensor([2.0, 1.0]))}
        >>> round(alignment(w, w).score, 6)
        1.0
    """
    names = [n for n, x in a.items() if x.is_floating_point() and x.dim() > 1 and n in b and b[n].shape == x.shape]
    if not names:
        raise InputError("the two models share no matrix of equal shape")
    layers, sums, distance = {}, torch.zeros(2, 2, dtype=torch.float64), 0.0
    for name in names:
        x, y = (side[name].detach().float().flatten(1) for side in (a, b))
        gap = float((x - y).double().square().sum())
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        p, r, q = torch.linalg.svd(y, full_matrices=False)
        product = (u.mT @ p) * (v @ q.mT)
        scores = []
        for row, least in enumerate((0.0, share)):
            m, n = (int((z >= least * z[0]).sum()) for z in (s, r))
            total = float(product[:m, :n].double().sum())
            sums[row] += torch.tensor([total, min(m, n)])
            scores.append(total / min(m, n))
        layers[name] = (math.sqrt(gap), scores[0], scores[1])
        distance += gap
    score, leading = (sums[:, 0] / sums[:, 1]).tolist()
    return Alignment(math.sqrt(distance), score, leading, layers)
