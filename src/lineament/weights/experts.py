"""A trained feed-forward layer cut into experts, and a router learned for it (MoEfication, arXiv:2110.01786).

The units are only put into another order, so with all experts at work nothing changes. They are grouped by their
weights (balanced k-means over the rows that switch them) or by which of them speak together (a spectral embedding of
their joint activity, then the same k-means).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from lineament import train
from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator, seeded
from lineament.nn import Experts, ExpertsConfig, SelectiveConfig, SelectiveMLP

PARTITIONS = ("weights", "together", "random")
FLOWS = 4  # rounds of balanced assignment at most; each solves one assignment problem of F x F
ROUNDS = 20  # of plain k-means before that
SPEAKING = 0.2  # share of a token's units that count as speaking, where no unit is exactly zero


def balanced_clusters(rows: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Cluster rows into `count` groups of exactly equal size, by k-means with an assignment problem at its end.

    Args:
        rows: [F, D]. count: divides F.

    Returns:
        The group of every row, int64 [F].

    Raises:
        InputError: the groups can't be of equal size.

    Example:
        >>> balanced_clusters(torch.tensor([[0.0], [0.1], [9.0], [9.1]]), 2).bincount().tolist()
        [2, 2]
    """
    if count < 1 or len(rows) % count:
        raise InputError(f"{len(rows)} units don't fall into {count} groups of equal size")
    rows = rows.float()
    centres = _first_centres(rows, count, generator(seed))
    for _ in range(ROUNDS):
        nearest = torch.cdist(rows, centres).argmin(1)
        moved = _means(rows, nearest, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    size, group = len(rows) // count, torch.full((len(rows),), -1)
    for _ in range(FLOWS):
        cost = torch.cdist(rows, centres).square().double().repeat_interleave(size, dim=1)
        new = torch.from_numpy(linear_sum_assignment(cost.numpy())[1] // size)
        if torch.equal(new, group):
            break
        group, centres = new, _means(rows, new, centres)
    return group


def _first_centres(rows: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Draw rows as centres, each with a chance by its squared distance to those before (k-means++)."""
    chosen = [int(torch.randint(len(rows), (1,), generator=draw))]
    far = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        at = int(torch.multinomial(far.clamp_min(1e-12), 1, generator=draw))
        chosen.append(at)
        far = torch.minimum(far, (rows - rows[at]).square().sum(1))
    return rows[chosen].clone()


def _means(rows: Tensor, group: Tensor, before: Tensor) -> Tensor:
    """Return the mean of each group; a group that is empty keeps its centre."""
    sums = torch.zeros_like(before).index_add_(0, group, rows)
    counts = group.bincount(minlength=len(before))[:, None].to(rows)
    return torch.where(counts > 0, sums / counts.clamp_min(1), before)


def together(spoken: Tensor, count: int) -> Tensor:
    """Embed units by which of them speak for the same tokens, [F, count]; from their normalised joint counts.

    Args:
        spoken: bool or float [N, F], whether a unit speaks for a token.
    """
    x = spoken.float()
    joint = x.T @ x
    joint.fill_diagonal_(0.0)
    degree = joint.sum(1).clamp_min(1e-9).rsqrt()
    _, vectors = torch.linalg.eigh(degree[:, None] * joint * degree)
    return F.normalize(vectors[:, -count:], dim=1)


class Parts:
    """The maps of a feed-forward layer, whatever it is called: gate (or none), up, down, and the activation's name."""

    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear

    def __init__(self, mlp: Any) -> None:
        if isinstance(mlp, nn.Sequential) and len(mlp) == 3:
            self.gate, self.up, self.down = None, mlp[0], mlp[2]
            self.act = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}.get(type(mlp[1]))
        else:
            self.gate = getattr(mlp, "gate_proj", None)
            self.up, self.down = getattr(mlp, "up_proj", None), getattr(mlp, "down_proj", None)
            self.act = getattr(getattr(mlp, "config", None), "hidden_act", None)
        if not isinstance(self.up, nn.Linear) or not isinstance(self.down, nn.Linear) or self.act is None:
            raise InputError(
                f"{type(mlp).__name__} is no feed-forward layer known here; expected gate_proj, up_proj and down_proj "
                "with a config's hidden_act, or Sequential(Linear, activation, Linear)"
            )

    @property
    def switch(self) -> Tensor:
        """The rows that switch the units on and off, [F, D], each of length one."""
        rows = (self.up if self.gate is None else self.gate).weight
        return F.normalize(rows.detach().float(), dim=1)

    @property
    def maps(self) -> list[nn.Linear]:
        """The maps into the units, the gate first."""
        return [self.up] if self.gate is None else [self.gate, self.up]


@torch.no_grad()
def split(mlp: nn.Module, count: int, *, by: str = "weights", inputs: Tensor | None = None, seed: int = 0) -> Experts:
    """Cut a feed-forward layer into experts of equal size; with all of them active it computes the same.

    The router starts as the cosine to the mean switching row of every expert; `learn_router` trains it. Experts stand
    in the order of how much they say, so that those in use lie next to each other.

    Args:
        mlp: `gate_proj`, `up_proj`, `down_proj` (Llama and its like), or `Sequential(Linear, activation, Linear)`.
        count: E, a divisor of the units.
        by: "weights", "together" (needs inputs) or "random".
        inputs: [N, D] tokens that reach this layer; with them the order is measured.

    Raises:
        InputError: another kind of layer, a count that does not divide, an unknown way.
    """
    if by not in PARTITIONS:
        raise unknown("way to group units", by, PARTITIONS)
    if by == "together" and inputs is None:
        raise InputError("grouping by joint activity needs inputs of the layer, [N, D]")
    parts, whole = Parts(mlp), Parts(mlp).up.weight
    config = ExpertsConfig(
        width=whole.shape[1], hidden=len(whole), experts=count, active=count, out=parts.down.out_features,
        act=str(parts.act), gated=parts.gate is not None, bias=parts.down.bias is not None,
    )  # fmt: skip
    if by == "random":
        group = torch.randperm(len(whole), generator=generator(seed)) % count
    elif by == "weights":
        group = balanced_clusters(parts.switch, count, seed=seed)
    else:
        assert inputs is not None
        group = balanced_clusters(together(_speaking(parts, inputs), count), count, seed=seed)
    experts = _filled(parts, config, group).to(whole)
    if inputs is not None and count > 1:
        loud = experts.scores(inputs.to(whole)).mean(0).argsort(descending=True)
        experts = _filled(parts, config, loud.argsort()[group]).to(whole)
    return experts.train(mlp.training)


def _speaking(parts: Parts, inputs: Tensor) -> Tensor:
    from lineament.nn.experts import ACTS

    act = ACTS[str(parts.act)]
    pre = [linear(inputs.to(linear.weight)) for linear in parts.maps]
    units = act(pre[0]) * pre[1] if len(pre) == 2 else act(pre[0])
    loud = units.abs() * parts.down.weight.norm(dim=0)
    if (units == 0).float().mean() > 0.1:  # ReLU: it says so itself
        return units > 0
    edge = loud.kthvalue(max(1, round((1 - SPEAKING) * loud.shape[1])), dim=1, keepdim=True).values
    return loud > edge


def _filled(parts: Parts, config: ExpertsConfig, group: Tensor) -> Experts:
    """Return the experts that hold the units by group (in their own order within a group)."""
    order = group.sort(stable=True).indices
    layer = Experts(config)
    shape = (config.experts, config.hidden // config.experts)
    layer.inner.copy_(torch.stack([m.weight[order].unflatten(0, shape) for m in parts.maps], 1))
    layer.outer.copy_(parts.down.weight.T[order].unflatten(0, shape))
    if layer.inner_bias is not None and layer.outer_bias is not None:
        biases = [m.bias if m.bias is not None else m.weight.new_zeros(config.hidden) for m in parts.maps]
        layer.inner_bias.copy_(torch.stack([b[order].unflatten(0, shape) for b in biases], 1))
        layer.outer_bias.copy_(parts.down.bias)
    centres = torch.stack([parts.switch[group == e].mean(0) for e in range(config.experts)])
    layer.router.first.weight.copy_(F.normalize(centres, dim=1))
    layer.router.second.weight.copy_(torch.eye(config.experts))
    return layer


def learn_router(
    experts: Experts, inputs: Tensor, *, epochs: int = 30, batch: int = 512, lr: float = 0.01, seed: int = 0
) -> dict[str, float]:
    """Train a layer's router to foresee which experts will have most to say; nothing else changes.

    The target is each expert's score over the largest of the batch, the loss binary cross entropy, the optimiser Adam.

    Args:
        inputs: [N, D] tokens that reach the layer; a tenth is held out.

    Returns:
        "captured": the share of the scores of the truly best fifth of the experts that the foreseen fifth has, on
        held-out tokens; "captured before": the same before training.
    """
    tokens = inputs.to(experts.inner).detach()
    order = torch.randperm(len(tokens), generator=generator(seed))
    known, held = tokens[order[len(order) // 10 :]], tokens[order[: len(order) // 10]]
    if len(held) < 1:
        raise InputError(f"{len(tokens)} tokens are too few to train a router; give at least 10")
    with torch.no_grad():
        said = torch.cat([experts.scores(part) for part in known.split(4096)])
    found = {"captured before": captured(experts, held)}
    size = min(batch, len(known))
    per = len(known) // size

    def draw(step: int) -> tuple[Tensor, Tensor]:
        epoch, at = divmod(step, per)
        own = torch.randperm(len(known), generator=generator(seed + 1 + epoch))[at * size : (at + 1) * size]
        return known[own], said[own]

    def loss(router: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        x, y = pair
        return F.binary_cross_entropy_with_logits(router(x), y / y.max()), {}

    steps = epochs * per
    config = train.FitConfig(steps=steps, lr=lr, betas=(0.9, 0.999), clip=None, log_every=10**9, checkpoint_every=10**9)
    before = [p.requires_grad for p in experts.router.parameters()]
    experts.router.requires_grad_(True)
    with seeded(seed), torch.enable_grad():
        train.fit(experts.router, draw, loss, config, description="router")
    for p, was in zip(experts.router.parameters(), before, strict=True):
        p.requires_grad_(was)
    return {**found, "captured": captured(experts, held)}


@torch.no_grad()
def captured(experts: Experts, inputs: Tensor, *, share: float = 0.2) -> float:
    """Return which part of the best experts' scores the router's choice of as many has; 1 is an oracle."""
    said = experts.scores(inputs)
    count = max(1, round(share * said.shape[1]))
    chosen = said.gather(1, experts.router(inputs).topk(count, 1).indices)
    return float(chosen.sum() / said.topk(count, 1).values.sum())


@torch.no_grad()
def layer_inputs(model: nn.Module, where: Sequence[str], windows: Tensor) -> dict[str, Tensor]:
    """Return the tokens that reach some layers of a language model, {name: [N, D]}; `windows` int64 [B, T]."""
    from lineament.graph import capture

    found: dict[str, list[Tensor]] = {}
    names = set(where)
    for batch in windows.split(4):
        with capture(model, lambda name, _: name in names, inputs=True, outputs=False) as seen:
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
        for name in where:
            args, kwargs = seen.inputs(name)[0]
            found.setdefault(name, []).append((args[0] if args else kwargs["x"]).flatten(0, 1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def split_model(
    model: Any, windows: Tensor, *, count: int = 32, by: str = "weights", layers: Sequence[int] | None = None,
    epochs: int = 30, seed: int = 0,
) -> tuple[Any, list[dict[str, Any]]]:  # fmt: skip
    """Cut a decoder's feed-forward layers into experts and train their routers; all experts stay active at first.

    Args:
        model: a Llama, Mistral or Qwen2 causal language model, possibly widened. windows: int64 [N, T] of text to learn
            the routers from. count: experts of a layer. layers: which; None for all.

    Returns:
        A model as `models.with_mlps` makes it (set what is active by `models.set_active_`), and a row per layer with
        what its router captures.
    """
    from lineament.models import with_mlps

    chosen = range(model.config.num_hidden_layers) if layers is None else layers
    names = {layer: f"model.layers.{layer}.mlp" for layer in chosen}
    made: dict[int, Experts] = {}
    rows = []
    seen = layer_inputs(model, list(names.values()), windows)
    for layer, name in names.items():
        tokens = seen.pop(name)
        made[layer] = split(model.get_submodule(name), count, by=by, inputs=tokens, seed=seed)
        rows.append({"layer": layer, **learn_router(made[layer], tokens, epochs=epochs, seed=seed)})
    return with_mlps(model, made), rows


@torch.no_grad()
def selective(mlp: nn.Module, inputs: Tensor, share: float, *, by: str = "gate") -> SelectiveMLP:
    """Return a gated feed-forward layer as one that reads only the neurons that speak.

    Args:
        mlp: `gate_proj`, `up_proj`, `down_proj` without biases. inputs: [N, D] tokens that reach it, to set the
            threshold by. share: of the neurons that shall stay silent; 0 computes the same as before.
        by: see `nn.SelectiveConfig`.

    Raises:
        InputError: another kind of layer.
    """
    parts = Parts(mlp)
    if parts.gate is None or parts.down.bias is not None or parts.up.bias is not None:
        raise InputError("only gated layers without biases can read by their gate (gate_proj, up_proj, down_proj)")
    whole = parts.up.weight
    config = SelectiveConfig(width=whole.shape[1], hidden=len(whole), act=str(parts.act), by=by)
    layer = SelectiveMLP(config).to(whole)
    layer.gate_proj.weight.copy_(parts.gate.weight)
    layer.up.copy_(whole)
    layer.down.copy_(parts.down.weight.T)
    layer.calibrate_(inputs, share)
    return layer.train(mlp.training)


@torch.no_grad()
def selective_model(model: Any, windows: Tensor, share: float, *, by: str = "gate") -> Any:
    """Return a decoder whose feed-forward layers read only the neurons that speak.

    Args:
        windows: int64 [N, T] of text to set the thresholds by. share: of the neurons of every layer that stay silent.
        by: see `nn.SelectiveConfig`.
    """
    from lineament.models import with_mlps

    names = [f"model.layers.{layer}.mlp" for layer in range(model.config.num_hidden_layers)]
    seen = layer_inputs(model, names, windows)
    made = {i: selective(model.get_submodule(n), seen.pop(n), share, by=by) for i, n in enumerate(names)}
    return with_mlps(model, made)


def use_oracle_(model: nn.Module, oracle: bool = True) -> nn.Module:
    """Let all experts of a model be chosen by what they would really say (or by their routers again); in place."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.oracle = oracle
    return model


def active_for(share: float, counts: Mapping[int, int]) -> dict[int, int]:
    """Return how many experts of each layer work when a share of them is skipped: {layer: active}."""
    return {layer: max(1, round((1 - share) * count)) for layer, count in counts.items()}
