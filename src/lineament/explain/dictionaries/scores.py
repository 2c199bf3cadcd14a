"""How good dictionaries are: in the model they stand for, beside what needs no features."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.dictionaries.activations import Activations, Said
from lineament.explain.dictionaries.hooks import Placed, moved, substituted
from lineament.explain.dictionaries.module import Dictionary
from lineament.explain.places import values_at
from lineament.tasks import perplexity

ROWS = 1024  # tokens encoded at once
OWN = "the model's own"


@dataclass(frozen=True, kw_only=True)
class DictionaryScore:
    """A dictionary, or what stands beside it, on text that nothing was fitted to; first positions are left out.

    Attributes:
        name: of what was put in the place. l0: features active per token. dead: share of features that never fired.
        loss: of the model with it there, nats per token.
        recovered: share of what mean-ablation costs that is won back; beside it, of what zero-ablation costs, which
            flatters everything.
        explained: 1 - |y - y'|^2 / |y - mean|^2, over tokens. frequency: share of tokens on which each feature fires.
    """

    name: str
    loss: float
    recovered: float
    recovered_of_zero: float
    explained: float
    l0: float | None = None
    dead: float | None = None
    frequency: Tensor | None = None

    def row(self) -> dict[str, Any]:
        """Return the numbers for a table."""
        return {
            "in the place": self.name, "L0": self.l0, "loss": self.loss, "loss recovered": self.recovered,
            "of zero-ablation": self.recovered_of_zero, "explained": self.explained, "dead": self.dead,
        }  # fmt: skip


def evaluate_dictionaries(
    model: nn.Module,
    dictionaries: Mapping[str, Placed],
    windows: Tensor,
    *,
    beside: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ks: Sequence[int] = (),
    rows: int = 8,
    said: Said | None = None,
) -> list[DictionaryScore]:
    """Put dictionaries, one after the other, in their place in a model, and score the model on text.

    Args:
        model: in eval mode; it comes back as it was.
        dictionaries: name -> one that writes the same place as the others.
        windows: int64 [N, T], not trained on.
        beside: name -> other maps from what the first dictionary reads (`best_affine`).
        ks: numbers of features to keep at evaluation, for "topk" dictionaries: the curve of L0 and loss.
        rows: windows in a pass. said: called with progress.

    Returns:
        The original, mean- and zero-ablation, `beside`, every dictionary, and every dictionary at every k.

    Raises:
        InputError: dictionaries that write different places, or an ablation that costs nothing.
    """
    if len({each.writes for each in dictionaries.values()}) != 1:
        written = ", ".join(each.writes for each in dictionaries.values()) or "nothing"
        raise InputError(f"dictionaries are compared in one place; these write {written}")
    first = next(iter(dictionaries.values()))
    sources = tuple(dict.fromkeys(p for each in dictionaries.values() for p in (each.reads, each.writes)))
    held = _held(model, windows, sources, rows)
    y = held[first.writes]
    mean = y.mean(0)
    maps: dict[str, tuple[Any, str]] = {
        "mean": (lambda x: mean.expand_as(x), first.writes), "zero": (torch.zeros_like, first.writes)
    }  # fmt: skip
    for name, map_ in (beside or {}).items():
        maps[name] = moved(map_, y.device) if isinstance(map_, nn.Module) else map_, first.reads
    for name, each in dictionaries.items():
        maps[name] = each.dictionary, each.reads
        if each.dictionary.config.activation == "topk":
            maps |= {f"{name}, k = {k}": (_with_k(each.dictionary, k), each.reads) for k in ks}
    losses = {OWN: perplexity(model, windows, batch_size=rows).nll}
    for done, (name, (map_, reads)) in enumerate(maps.items()):
        put = replace(first, dictionary=map_, reads=reads)
        with substituted(model, [put]):
            losses[name] = perplexity(model, windows, batch_size=rows).nll
        if said:
            said("putting dictionaries in their place", done + 1, len(maps))
    costs = [losses[name] - losses[OWN] for name in ("mean", "zero")]
    if min(abs(cost) for cost in costs) < 1e-6:
        raise InputError(f"ablating {first.writes} changes no loss, so there is nothing to recover")
    total = float((y - mean).square().sum(dtype=torch.float64))
    return [_score(name, losses, costs, *maps.get(name, (None, "")), held=held, y=y, total=total) for name in losses]


def best_affine(activations: Activations, reads: str, writes: str, *, ridge: float = 1e-6) -> nn.Linear:
    """Return the affine map from one place to another with the least squared error on cached tokens.

    In float64; `ridge` is relative to the mean eigenvalue of the covariance of what is read. A dictionary that is worse
    has learnt nothing.
    """
    index = torch.arange(activations.count).split(8 * ROWS)
    sums: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for part in index:
        x, y = (activations.rows(place, part).double() for place in (reads, writes))
        for i, each in enumerate((x.sum(0), y.sum(0), x.T @ x, x.T @ y)):
            sums[i] = sums[i] + each
    mx, my = sums[0] / activations.count, sums[1] / activations.count
    gram = sums[2] / activations.count - torch.outer(mx, mx)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    W = torch.linalg.solve(gram, sums[3] / activations.count - torch.outer(mx, my))
    found = nn.Linear(*W.shape)
    with torch.no_grad():
        found.weight.copy_(W.T)
        found.bias.copy_(my - mx @ W)
    return found.eval()


def _score(
    name: str, losses: Mapping[str, float], costs: Sequence[float], map_: Any, reads: str, *,
    held: Mapping[str, Tensor], y: Tensor, total: float,
) -> DictionaryScore:  # fmt: skip
    gone, more = _measured(map_, held[reads], y) if map_ is not None else (0.0, {})
    loss, shares = losses[name], [1 - (losses[name] - losses[OWN]) / cost for cost in costs]
    explained = 1 - gone / total
    return DictionaryScore(
        name=name, loss=loss, recovered=shares[0], recovered_of_zero=shares[1], explained=explained, **more
    )


def _with_k(dictionary: Dictionary, k: int) -> Dictionary:
    found = copy(dictionary)  # the same weights, another config
    found.config = replace(dictionary.config, k=min(k, dictionary.config.features))
    return found


def _held(model: nn.Module, windows: Tensor, places: Sequence[str], rows: int) -> dict[str, Tensor]:
    """Return what places hold on windows, [N (T - 1), D], without first positions."""
    parts: dict[str, list[Tensor]] = {place: [] for place in places}
    device = next(model.parameters()).device
    for ids in windows.split(rows):
        for place, x in values_at(model, {"input_ids": ids.to(device)}, places, stop=True).items():
            parts[place].append(x[:, 1:].flatten(0, 1))
    return {place: torch.cat(xs) for place, xs in parts.items()}


@torch.no_grad()
def _measured(map_: Any, x: Tensor, y: Tensor) -> tuple[float, dict[str, Any]]:
    """Return the squared error of a map, and how often features fire if it has any."""
    gone, fired, active = 0.0, None, 0.0
    for some, wanted in zip(x.split(ROWS), y.split(ROWS), strict=True):
        gone += float((map_(some) - wanted).square().sum(dtype=torch.float64))
        if isinstance(map_, Dictionary):
            on = map_.encode(some) > 0
            fired = on.sum(0) if fired is None else fired + on.sum(0)
            active += float(on.sum())
    if fired is None:
        return gone, {}
    more = {"l0": active / len(x), "dead": float((fired == 0).double().mean()), "frequency": fired.cpu() / len(x)}
    return gone, more
