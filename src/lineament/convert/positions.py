"""Positions further apart than a training sequence is long: one jump in a row (Zhu et al. 2023, PoSE, two chunks).

Keys and queries are rotated by their positions, so codes that have only seen short sequences know nothing of the
rotations beyond. Teacher and student get the same jumps, and the cost is that of the short sequence. Half of the rows
keep their positions: jumps in all cost half a percent at 2048 tokens (docs/log.md).
"""

import torch
from torch import Tensor

from lineament._base.seeds import generator


def jumped_positions(ids: Tensor, reach: int, seed: int) -> Tensor | None:
    """Return positions [B, T]; half of the rows jump once, at a random place, by up to `reach - T`.

    Args:
        ids: [B, T]. reach: positions stay below it. seed: of the places and distances.

    Returns:
        None where `reach` leaves no room for a jump.

    Example:
        >>> jumped_positions(torch.zeros(1, 6, dtype=torch.long), 20, seed=0).tolist()
        [[0, 1, 2, 3, 4, 14]]
    """
    rows, length = ids.shape
    if reach <= length or length < 2:
        return None
    draw = generator(seed)
    place = torch.randint(1, length, (rows, 1), generator=draw)
    distance = torch.randint(reach - length + 1, (rows, 1), generator=draw)
    distance = distance * (torch.rand(rows, 1, generator=draw) < 0.5)
    at = torch.arange(length)
    return (at + distance * (at >= place)).to(ids.device)


def model_inputs(ids: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
    """Return a forward's arguments; a mask of ones says that a jump is a distance and not another document's start."""
    if positions is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
