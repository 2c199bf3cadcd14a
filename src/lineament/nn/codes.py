"""Where the codebooks of product features start: clusters of the teacher's own keys, so that the far part begins as
attention to the clusters' centres."""

import torch
from torch import Tensor

from lineament._base.backends import widest
from lineament._base.seeds import generator
from lineament.nn.feature_maps import Product

MOST = 16384  # keys that the clusters are made of
ROUNDS = 8
SOFT = 0.5  # keys choose their code at this share of the exact log odds: softer choices learn faster


@torch.no_grad()
def start_codes(
    map_q: Product, map_k: Product, q: Tensor, k: Tensor, *, sink: Tensor | None = None, seed: int = 0
) -> None:
    """Set both maps so that `e^(lse_q) phi(q).phi(k)` is `e^(q . c(k))`, c(k) being the centre of the key's cluster.

    Keys are clustered in the metric of the queries, `|k - c|^2 = E (q . (k - c))^2`, in two halves of their principal
    directions, one codebook each: the pair of nearest codes stands for the key (product quantisation).

    Args:
        map_q: of Hq heads. map_k: of Hk heads, as many codes.
        q: [N, Hq, K] and k: [M, Hk, K] as the maps get them.
        sink: [Hk, K], a key that the last of several codes stands for in both halves; the others are clusters.
    """
    heads, groups, codes, wide = k.shape[1], q.shape[1] // k.shape[1], map_k.codes, widest(k.device)
    for h in range(heads):
        own = slice(h * groups, (h + 1) * groups)
        some = q[:, own].reshape(-1, q.shape[-1]).to(wide)
        values, turn = (x.to(some) for x in torch.linalg.eigh((some.mT @ some / len(some)).cpu()))  # not all have eigh
        root = values.clamp_min(1e-6 * values[-1].clamp_min(1e-12)).sqrt()
        keys = k[:: max(1, len(k) // MOST), h].to(wide) @ turn * root
        order = keys.var(0, unbiased=False).argsort(descending=True)
        for half in (0, 1):
            of = order[half::2]
            centres = keys.new_zeros(codes, keys.shape[1])
            own_code = keys[:0] if sink is None or codes == 1 else (sink[h].to(wide) @ turn * root)[None]
            found = clusters(keys[:, of], codes - len(own_code), seed=seed)
            centres[:, of] = torch.cat([found, own_code[:, of]])
            columns = slice(half * codes, (half + 1) * codes)
            map_q.weight[own, :, columns] = ((centres / root) @ turn.mT).mT.to(map_q.weight)
            map_q.bias[own, columns] = 0.0
            map_k.weight[h, :, columns] = SOFT * ((centres * root) @ turn.mT).mT.to(map_k.weight)
            map_k.bias[h, columns] = -SOFT / 2 * centres.square().sum(1).to(map_k.bias)


def clusters(x: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Return `count` cluster centres of the rows of x [N, K] (Lloyd's rounds from rows drawn at random).

    Example:
        >>> sorted(clusters(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2).flatten().tolist())
        [0.5, 10.5]
    """
    centres = x[torch.randperm(len(x), generator=generator(seed))[torch.arange(count) % len(x)]].clone()
    for _ in range(ROUNDS):
        nearest = (x @ centres.mT - centres.square().sum(1) / 2).argmax(1)
        size = x.new_zeros(count).index_add_(0, nearest, x.new_ones(len(x)))[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(size > 0, total / size.clamp_min(1), centres)
    return centres
