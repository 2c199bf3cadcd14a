"""Hidden activations laid out like parameters, so that matching by activations is matching of other tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lineament._base.errors import InputError
from lineament.graph import Leaf, Tree
from lineament.weights.elements import classes_in
from lineament.weights.symmetry import Symmetry

SITES = 4  # activations that speak for a class, evenly spread over the network


def activations(
    point: Mapping[str, Tensor], symmetry: Symmetry, batches: Iterable[Sequence[Tensor]]
) -> tuple[dict[str, tuple[Tree, ...]], dict[str, Tensor]]:
    """Run a model and keep the activations that show its classes, standardised per unit over samples and positions.

    Args:
        batches: tuples of the tensors of a call, of the shapes of the example call of the group; several batches are
            laid end to end along the first dimension.

    Returns:
        Trees and tensors by node name, as `Ascent` takes them: inner products of such tensors are correlations.

    Raises:
        InputError: a batch has other shapes than the traced call.
    """
    sites = _sites(symmetry)
    found: dict[str, list[Tensor]] = {name: [] for name in sites}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in found:
                found[n.name].append(value.detach().float())
            return value

    traced = symmetry.axes.traced
    state = {name: point[name] for name in (*traced.parameters, *traced.buffers) if name in point}
    places = [node for node in traced.module.graph.nodes if node.op == "placeholder"][-traced.inputs :]
    for batch in batches:
        given = [tuple(x.shape) for x in batch]
        wanted = [tuple(node.meta["val"].shape) for node in places]
        if given != wanted:
            raise InputError(f"a batch has tensors of shapes {given}; the group was derived with {wanted}")
        with torch.no_grad():
            traced.run(state, list(batch), Keep)
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    sites = {name: ((Leaf(len(whole[name]), None),), *trees[1:]) for name, trees in sites.items()}
    return sites, {name: _standard(x, sites[name], symmetry) for name, x in whole.items()}


def _sites(symmetry: Symmetry) -> dict[str, tuple[Tree, ...]]:
    """Choose nodes for every free class: those that show it, its outer classes and no other free one."""
    free = set(symmetry.free)
    shown: dict[int, list[str]] = {cls: [] for cls in free}
    for name, trees in symmetry.axes.nodes.items():
        held = {c for tree in trees for c in classes_in(tree)} & free
        if len(trees) < 2 or any(c in free for c in classes_in(trees[0])):
            continue  # the first dimension must be samples
        for cls in held:
            if held <= {cls, *symmetry.classes[cls].outer}:
                shown[cls].append(name)
    chosen = set()
    for names in shown.values():
        steps = min(SITES, len(names))
        chosen |= {names[round((i + 1) * len(names) / steps) - 1] for i in range(steps)}
    return {name: trees for name, trees in symmetry.axes.nodes.items() if name in chosen}


def _standard(x: Tensor, trees: Sequence[Tree], symmetry: Symmetry) -> Tensor:
    """Centre every unit and divide it by its deviation; 1 / sqrt(samples) makes inner products correlations."""
    samples = [i for i, tree in enumerate(trees) if not (classes_in(tree) & set(symmetry.free))]
    centred = x - x.mean(samples, keepdim=True)
    deviation = centred.square().mean(samples, keepdim=True).sqrt()
    count = max(1, x.numel() // max(1, deviation.numel()))
    return torch.where(deviation > 1e-6, centred / deviation.clamp_min(1e-6), 0.0) * count**-0.5
