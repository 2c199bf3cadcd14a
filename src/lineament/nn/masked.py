"""Sparse layers whose units come in groups that talk to partner groups (G2GNet, arXiv:2508.14140)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from lineament._base.backends import widest
from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator

PATTERNS = ("edges", "units")
ASSIGNMENTS = ("contiguous", "random")
_SALT = 0x5EED  # a mask drawn from the stream of the weights would keep weights of one sign


@dataclass(frozen=True)
class GroupMask:
    """Which edges a layer has, bool [O, I], and the group of each output [O] and input [I]."""

    edges: Tensor
    outputs: Tensor
    inputs: Tensor

    @property
    def density(self) -> float:
        """The share of edges that are there."""
        return float(self.edges.to(widest(self.edges.device)).mean())

    @property
    def same_group(self) -> Tensor:
        """bool [O, I]: whether both ends are of one group."""
        return self.outputs[:, None] == self.inputs

    @property
    def inside(self) -> float:
        """The share of the edges that stay inside a group."""
        return float((self.edges & self.same_group).sum() / self.edges.sum().clamp_min(1))

    @property
    def modularity(self) -> float:
        """Barber's modularity of the layer: edges inside groups beyond those of a random graph of equal degrees."""
        edges = self.edges.to(widest(self.edges.device))
        expected = edges.sum(1, keepdim=True) * edges.sum(0, keepdim=True) / edges.sum().clamp_min(1)
        return float(((edges - expected) * self.same_group).sum() / edges.sum().clamp_min(1))


def group_mask(
    outputs: int, inputs: int, groups: int, *, inside: float = 1.0, between: float = 0.0, graph: Tensor | None = None,
    pattern: str = "edges", assign: str = "contiguous", seed: int = 0,
) -> GroupMask:  # fmt: skip
    """Draw the edges of a layer: `P(edge o <- i) = inside if group(o) = group(i) else between`.

    The expected density is `inside / G + between (1 - 1/G)`; one group of density p is the random mask. An output left
    without an edge gets a random one.

    Args:
        outputs, inputs: units. groups: G of each side, at most as many as units; unit u is of group floor(u G / n).
        graph: [G, G] probabilities K[group(o), group(i)], instead of `inside` and `between`: a ring, say.
        pattern: "edges" draws each edge by itself, as published. "units" draws for each output group which input units
            it hears, all its units alike: the same density, in tiles that `PackedLinear` runs fast.
        assign: "contiguous", or "random" (a permutation of the units from the seed).
        seed: of the mask; independent of weights drawn from the same number.

    Raises:
        InputError: an unknown name, a probability outside [0, 1], more groups than units.

    Example:
        >>> mask = group_mask(10, 10, 5, between=0.0625)
        >>> mask.edges.shape, mask.inside > 0.5
        (torch.Size([10, 10]), True)
    """
    for kind, value, known in (("pattern", pattern, PATTERNS), ("assign", assign, ASSIGNMENTS)):
        if value not in known:
            raise unknown(kind, value, known)
    if not 1 <= groups <= min(outputs, inputs):
        raise InputError(f"{groups} groups of {outputs} outputs and {inputs} inputs; expected from 1 to the smaller")
    to = torch.full((groups, groups), float(between)).fill_diagonal_(float(inside)) if graph is None else graph
    if to.shape != (groups, groups) or bool(((to < 0) | (to > 1)).any()):
        raise InputError(f"the graph is {list(to.shape)}; expected probabilities of {[groups, groups]} in [0, 1]")
    draw = generator(seed + _SALT)
    of = [torch.arange(n) * groups // n for n in (outputs, inputs)]
    if assign == "random":
        of = [g[torch.randperm(len(g), generator=draw)] for g in of]
    if pattern == "edges":
        edges = torch.rand(outputs, inputs, generator=draw) < to[of[0]][:, of[1]]
    else:
        edges = (torch.rand(groups, inputs, generator=draw) < to[:, of[1]])[of[0]]
    deaf = (~edges.any(1)).nonzero().flatten()
    edges[deaf, torch.randint(inputs, (len(deaf),), generator=draw)] = True
    return GroupMask(edges, *of)


def between_for(density: float, groups: int, inside: float = 1.0) -> float:
    """Return the probability between groups that gives a density.

    Example:
        >>> round(between_for(0.25, 5), 4), round(between_for(0.25, 8), 3)
        (0.0625, 0.143)
    """
    if groups < 2:
        raise InputError("one group has no edges between groups: give its density as inside")
    found = (density - inside / groups) / (1 - 1 / groups)
    if not 0 <= found <= 1:
        raise InputError(f"{groups} groups with {inside} inside can't have a density of {density}")
    return found


class _Masked(nn.Module):
    """The part that both kinds share: a weight that is zero off its mask, started by the fan-in of each row."""

    mask: Tensor
    output_groups: Tensor
    input_groups: Tensor

    def __init__(self, mask: GroupMask, kernel: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.register_buffer("mask", mask.edges.clone())
        self.register_buffer("output_groups", mask.outputs.clone())
        self.register_buffer("input_groups", mask.inputs.clone())
        self.weight = nn.Parameter(torch.empty(*mask.edges.shape, *kernel))
        self.bias = nn.Parameter(torch.empty(len(mask.edges))) if bias else None
        self.watched, self.effective = False, None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights of variance `2 / fan_in`, with each row's own fan-in: dense fan-in would shrink activations."""
        taps = self.weight[0, 0].numel()
        fan = (self.mask.sum(1) * taps).clamp_min(1).to(self.weight.dtype)
        with torch.no_grad():
            self.weight.normal_().mul_((2 / fan).sqrt().view(-1, *[1] * (self.weight.dim() - 1)))
            self.weight.mul_(self.shaped_mask())
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def shaped_mask(self) -> Tensor:
        """The mask with the axes of the weight."""
        return self.mask.view(*self.mask.shape, *[1] * (self.weight.dim() - 2))

    def masked_weight(self) -> Tensor:
        """The weight that takes part. While `watched`, its dense gradient is kept in `effective.grad`."""
        weight = self.weight * self.shaped_mask()
        if self.watched and weight.requires_grad:
            weight.retain_grad()
            self.effective = weight
        return weight

    def groups(self) -> GroupMask:
        """The mask as it is now."""
        return GroupMask(self.mask, self.output_groups, self.input_groups)


class MaskedLinear(_Masked):
    """`y = (W * M) x + b`. Off the mask weight, gradient and, under any optimiser, the update are zero.

    Args:
        mask: from `group_mask`. bias: whether there is b; it starts at zero.

    Example:
        >>> MaskedLinear(group_mask(6, 4, 2))(torch.ones(3, 4)).shape
        torch.Size([3, 6])
    """

    def __init__(self, mask: GroupMask, *, bias: bool = True) -> None:
        super().__init__(mask, (), bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        return linear(x, self.masked_weight(), self.bias)


class MaskedConv2d(_Masked):
    """A convolution whose mask is over (output channel, input channel), the same at each place of the kernel."""

    def __init__(self, mask: GroupMask, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True) -> None:
        super().__init__(mask, (kernel, kernel), bias)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, I, Y, X] to [N, O, Y', X']."""
        return conv2d(x, self.masked_weight(), self.bias, self.stride, self.padding)


class PackedLinear(nn.Module):
    """A masked layer as one batched product of dense tiles, one per group: less arithmetic, not only zeros.

    A group's tile holds the inputs that at least half of its units hear; what edges are left go through a sparse
    matrix. With the pattern "units" no edge is left, and the layer trains as it is; otherwise it is for inference.

    Args:
        layer: a trained or fresh `MaskedLinear`; its weights are copied. Save that layer: edges outside the tiles are
            not in the state dict.

    Example:
        >>> layer = MaskedLinear(group_mask(8, 8, 2, between=0.3, pattern="units"))
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(PackedLinear(layer)(x), layer(x), atol=1e-6)
        True
    """

    real: Tensor
    index: Tensor
    place: Tensor
    rest: Tensor | None

    def __init__(self, layer: MaskedLinear) -> None:
        super().__init__()
        weight, mask, group = layer.masked_weight().detach(), layer.mask, layer.output_groups
        rows = [(group == g).nonzero().flatten() for g in group.unique()]
        columns = [(2 * mask[r].sum(0) >= len(r)).nonzero().flatten() for r in rows]
        height, width = max(map(len, rows)), max(1, *map(len, columns))
        tiles, inside = weight.new_zeros(len(rows), width, height), torch.zeros_like(mask)
        index = torch.zeros(len(rows), width, dtype=torch.long, device=mask.device)
        place = torch.empty(len(mask), dtype=torch.long, device=mask.device)
        for g, (r, c) in enumerate(zip(rows, columns, strict=True)):
            tiles[g, : len(c), : len(r)], index[g, : len(c)] = weight[r][:, c].T, c
            inside[r[:, None], c] = True
            place[r] = g * height + torch.arange(len(r), device=place.device)
        self.tiles = nn.Parameter(tiles)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.register_buffer("real", _tiled(mask, rows, columns, tiles))  # padding and holes in the tiles
        self.register_buffer("index", index)
        self.register_buffer("place", place)
        rest = weight * (mask & ~inside)
        left = bool((mask & ~inside).any())
        self.register_buffer("rest", rest.to_sparse_csr() if left else None, persistent=False)
        self.inputs, self.dense = mask.shape[1], bool(self.real.all())
        self.in_order = torch.equal(place, torch.arange(len(rows) * height, device=place.device))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        if x.shape[-1] != self.inputs:
            raise InputError(f"x is {x.shape[-1]} wide; this layer takes {self.inputs}")
        if self.rest is not None and self.tiles.requires_grad and self.training and torch.is_grad_enabled():
            raise InputError("edges outside the tiles don't learn: train the MaskedLinear, or draw pattern='units'")
        flat = x.reshape(-1, self.inputs)
        tiles = self.tiles if self.dense else self.tiles * self.real
        heard = flat.index_select(1, self.index.flatten()).unflatten(1, self.index.shape).transpose(0, 1)
        y = (heard @ tiles).transpose(0, 1).flatten(1)
        y = y if self.in_order else y.index_select(1, self.place)
        if self.rest is not None:
            y = y + (self.rest @ flat.T).T
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])


def _tiled(mask: Tensor, rows: list[Tensor], columns: list[Tensor], like: Tensor) -> Tensor:
    real = torch.zeros(like.shape, dtype=torch.bool, device=mask.device)
    for g, (r, c) in enumerate(zip(rows, columns, strict=True)):
        real[g, : len(c), : len(r)] = mask[r][:, c].T
    return real
