"""The stages of grokking: random features, features on their own, features that repel (arXiv:2509.21519)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lineament.data import Group, Irrep, irreps, purity
from lineament.explain.energy import energy, feature_gradient
from lineament.nn import TwoLayer
from lineament.report import curve
from lineament.tasks import Grokked, GroupSplit

PURE = 0.9  # share of a unit's power from which on it counts as on a mode


class Stages:
    """What to watch while nets learn a group: call it with (net, split), get numbers per seed. For `tasks.grok`.

    - "|G_F|": gradient at the features, over the number of samples. Small: the top layer fits what is there (lazy).
    - "F off-diagonal", "FF off-diagonal": mean size off the diagonal of `F~^T F~` (over units) and `F~ F~^T` (samples)
      over that on it; small while units learn on their own.
    - "turn of W", "turn of V": 1 - cosine to the last look; the top layer turns first.
    - "energy": mean over units of length 1, over the largest possible on all pairs of the group.
    - "purity", "modes": share of each unit's power in one irrep (the trivial left out), and the share of irreps on
      which some unit is at least `PURE`. "halves": difference of the norms of [u; u'] over their sum.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.parts = group, irreps(group)
        self.last: list[tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def __call__(self, net: TwoLayer, split: GroupSplit) -> list[dict[str, float]]:
        """Return a mapping per seed."""
        features, found, now = net.features(split.known), [], []
        for seed, F in enumerate(features):
            W, V = net.W[seed].detach().clone(), net.V[seed].detach().clone()
            now.append((W, V))
            labels, centred = split.labels(split.known[seed]), F.double() - F.double().mean(0)
            found.append(
                {"|G_F|": float(feature_gradient(F, labels, V).norm()) / len(F),
                 "F off-diagonal": _off_diagonal(centred.T @ centred),
                 "FF off-diagonal": _off_diagonal(centred @ centred.T),
                 "turn of W": _turn(self.last[seed][0] if self.last else None, W),
                 "turn of V": _turn(self.last[seed][1] if self.last else None, V),
                 **readout(W, self.parts, self.group)}
            )  # fmt: skip
        self.last = now
        return found


def readout(w: Tensor, parts: Sequence[Irrep], group: Group) -> dict[str, float]:
    """Return "energy", "purity", "modes" and "halves" of weights [2 M, K], see `Stages`."""
    w = w.double()
    u, other = w.chunk(2)
    share, which = purity(u, parts)
    unit = w / w.norm(dim=0).clamp_min(1e-30)
    largest = max(each.energy for each in parts[1:])
    halves = (u.norm(dim=0) - other.norm(dim=0)).abs() / (u.norm(dim=0) + other.norm(dim=0)).clamp_min(1e-30)
    return {"energy": float(energy(unit, group.pairs, group.table.flatten()).mean()) / largest,
            "purity": float(share.mean()), "modes": len(which[share >= PURE].unique()) / max(1, len(parts) - 1),
            "halves": float(halves.mean())}  # fmt: skip


def stages_png(
    found: Grokked, of: Sequence[str] = ("known", "unseen", "purity", "modes"), *, dark: bool = False
) -> bytes:
    """Draw what was watched against the epoch, means over seeds."""
    epochs = sorted({row["epoch"] for row in found.rows})
    series = {what: (epochs, [_mean(found.rows, epoch, what) for epoch in epochs]) for what in of}
    return curve(series, xlabel="epoch", ylabel="share", title=found.split.group.name, dark=dark)


def _mean(rows: Sequence[Mapping[str, Any]], epoch: int, what: str) -> float:
    values = [row[what] for row in rows if row["epoch"] == epoch]
    return sum(values) / len(values)


def _off_diagonal(G: Tensor) -> float:
    size = G.abs()
    on = size.diagonal().mean()
    off = (size.sum() - size.diagonal().sum()) / max(1, len(G) * (len(G) - 1))
    return float(off / on.clamp_min(1e-30))


def _turn(before: Tensor | None, now: Tensor) -> float:
    return float("nan") if before is None else 1 - float(cosine_similarity(before.flatten(), now.flatten(), dim=0))
