"""The battery of a merge: laws that any row of the table obeys, whatever it computes."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lineament.testing.compare import copied, same

Model = Mapping[str, Tensor]
Merge = Callable[[Sequence[Model], Model | None], Model]
"""(models, base) -> the merged tensors."""

MERGE_LAWS = ("same", "repeat", "inputs", "order", "alone")
SHAPES = {"matrix": (7, 5), "vector": (9,), "scalar": (), "one": (1, 1), "long": (3, 4097), "cube": (3, 2, 5)}


def check_merge(
    merge: Merge, *, models: int = 3, base: bool = True, laws: Iterable[str] = MERGE_LAWS, shapes=SHAPES,
    tolerance: float = 2e-6,
) -> None:  # fmt: skip
    """Hold a merge to its laws on tensors of odd shapes.

    Args:
        merge: (models, base) -> merged tensors, whatever the names; options that belong to a model equal for all.
        models: how many. base: hand it a base.
        laws: "same" (identical models without noise give that model), "repeat" (twice the same bits), "inputs" (left as
            they were), "order" (of the models does not matter), "alone" (a tensor's result depends on it alone).

    Raises:
        AssertionError: says which law, where and by how much.
    """
    given = [_model(seed, shapes) for seed in range(models)]
    origin = _model(99, shapes) if base else None
    before = copied([*given, origin or {}])
    found = dict(merge(given, origin))
    for law in laws:
        if law == "same":
            twins = [given[0]] * models
            same(dict(merge(twins, dict(given[0]) if base else None)), given[0], tolerance, "the merge of equal models")
        elif law == "repeat":
            same(dict(merge(given, origin)), found, 0, "the same merge again")
        elif law == "inputs":
            same(copied([*given, origin or {}]), before, 0, "the inputs after merging")
        elif law == "order":
            same(dict(merge(given[::-1], origin)), found, tolerance, "the merge in another order")
        elif law == "alone":
            for name in shapes:
                part = merge([{name: m[name]} for m in given], origin and {name: origin[name]})
                same(dict(part), {name: found[name]}, 0, "the merge of one tensor alone")
        else:
            raise ValueError(f"unknown law {law!r}; expected some of {', '.join(MERGE_LAWS)}")


def _model(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
