"""Bricks: parts of a model under one record, and four verbs on them (Xiao et al. 2024, arXiv:2409.02877).

`route` says which bricks suit an input, `merge` makes one of several, `update` writes one fact into a brick, `grow`
gives it room without changing what it computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament import io
from lineament._base.errors import InputError, near_miss, unknown
from lineament._base.seeds import generator, seeded
from lineament.nn import Experts, ExpertsConfig
from lineament.weights.merge import merge as merge_points

KINDS = {  # kind -> the tensors it has
    "neurons": ("inner", "outer"),  # [M, maps, D] rows into M neurons, [M, out] what they say
    "lora": ("A", "B"),  # [r, in], [out, r]: a change B A of a linear map
    "linear": ("weight",),  # [out, in]
}
LEVELS = ("neuron", "group", "layer", "adapter")


@dataclass(frozen=True)
class Brick:
    """A part of a model.

    Args:
        name: its name. kind: a key of `KINDS`. tensors: as the kind says.
        level: "neuron", "group", "layer" or "adapter". place: the module it belongs to.
        key: [D], what inputs are compared with when routing; None where it can't be routed to.
        tags: function -> how well it serves it. evaluation: numbers measured.

    Raises:
        InputError: an unknown kind or level, or other tensors than the kind has.
    """

    name: str
    kind: str
    tensors: Mapping[str, Tensor]
    level: str = "group"
    place: str = ""
    key: Tensor | None = None
    tags: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of brick", self.kind, KINDS)
        if self.level not in LEVELS:
            raise unknown("level of a brick", self.level, LEVELS)
        if set(self.tensors) != set(KINDS[self.kind]):
            raise InputError(
                f"{self.name} has {', '.join(self.tensors) or 'no tensors'}; a brick of kind {self.kind} has "
                f"{', '.join(KINDS[self.kind])}"
            )

    @property
    def size(self) -> int:
        """Numbers in it."""
        return sum(x.numel() for x in self.tensors.values())


class Bricks(Mapping[str, Brick]):
    """Bricks by name, and the four verbs. Verbs return new bricks and change none; `add` keeps one.

    Example:
        >>> one = Brick("a", "lora", {"A": torch.ones(1, 2), "B": torch.ones(3, 1)}, "adapter")
        >>> shelf = Bricks([one, replace(one, name="b")])
        >>> shelf.merge(["a", "b"], name="both").tensors["weight"].shape
        torch.Size([3, 2])
    """

    def __init__(self, bricks: Sequence[Brick] = ()) -> None:
        self._bricks: dict[str, Brick] = {}
        for brick in bricks:
            self.add(brick)

    def __getitem__(self, name: str) -> Brick:
        if name not in self._bricks:
            raise InputError(f"no brick is called {name!r}.{near_miss(name, self._bricks)}")
        return self._bricks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bricks)

    def __len__(self) -> int:
        return len(self._bricks)

    def add(self, brick: Brick) -> Brick:
        """Keep a brick; one of the same name is replaced."""
        self._bricks[brick.name] = brick
        return brick

    def route(
        self, x: Tensor, *, names: Sequence[str] | None = None, top: int = 1, temperature: float = 1.0
    ) -> tuple[list[str], Tensor]:
        """Weigh bricks for inputs: softmax over the `top` largest cosines of x and the keys, exact zeros elsewhere.

        Args:
            x: [..., D]. names: among which; default: all with a key.

        Returns:
            The names, and weights [..., n] that sum to 1.

        Raises:
            InputError: no brick has a key, or `top` or `temperature` is out of range.
        """
        chosen = list(names) if names is not None else [n for n, b in self._bricks.items() if b.key is not None]
        keys = [self[name].key for name in chosen]
        if not chosen or any(key is None for key in keys):
            raise InputError("bricks without a key can't be routed to; give them one (Brick.key)")
        if not 1 <= top <= len(chosen) or temperature <= 0:
            raise InputError(f"top {top} of {len(chosen)} bricks at temperature {temperature}; expected 1 to all, > 0")
        near = F.normalize(x, dim=-1) @ F.normalize(torch.stack(keys).to(x), dim=-1).T  # type: ignore[arg-type]
        best = near.topk(top, -1)
        return chosen, torch.zeros_like(near).scatter(-1, best.indices, (best.values / temperature).softmax(-1))

    def merge(self, names: Sequence[str], method: str = "average", *, name: str, **options: Any) -> Brick:
        """Make one brick of several: a row of `weights.METHODS` on their tensors; LoRAs are merged as products B A.

        Raises:
            InputError: bricks of several kinds or shapes, or whatever `weights.merge` refuses.
        """
        parts = [self[one] for one in names]
        if len({brick.kind for brick in parts}) != 1:
            raise InputError(f"{', '.join(names)} are of several kinds; expected one")
        lora = parts[0].kind == "lora"
        tensors = [{"weight": b.tensors["B"] @ b.tensors["A"]} if lora else dict(b.tensors) for b in parts]
        made = merge_points(tensors, method, **options)
        keys = [brick.key for brick in parts if brick.key is not None]
        return replace(
            parts[0], name=name, kind="linear" if lora else parts[0].kind, tensors={n: made[n] for n in tensors[0]},
            key=torch.stack(keys).mean(0) if len(keys) == len(parts) else None, tags={}, evaluation={},
        )  # fmt: skip

    def update(self, name: str, key: Tensor, value: Tensor, *, covariance: Tensor | None = None) -> Brick:
        """Write one key-value pair into a brick: afterwards W key = value.

        `W <- W + (value - W k) (C^-1 k)^T / (k^T C^-1 k)`; inputs x with `x^T C^-1 k = 0` are left alone. W is the
        weight of a "linear" brick, and what the neurons say of a "neurons" brick (key: their activations).

        Args:
            key: [in]. value: [out]. covariance: C [in, in], the mean of k k^T over usual keys; None for the identity.
        """
        return VERBS["update"][_kind(self[name], "update")](self[name], key, value, covariance)

    def grow(self, name: str, count: int, *, seed: int = 0) -> Brick:
        """Give a brick `count` more neurons, or ranks of a LoRA; what they say is zero until something is learned."""
        if count < 0:
            raise InputError(f"a brick can't grow by {count}; expected at least 0")
        return VERBS["grow"][_kind(self[name], "grow")](self[name], count, seed)

    def save(self, path: str | Path) -> Path:
        """Write all bricks as one safetensors file; `Bricks.load` reads it."""
        told = {
            b.name: {
                "kind": b.kind, "level": b.level, "place": b.place, "tags": dict(b.tags),
                "evaluation": dict(b.evaluation),
            } for b in self._bricks.values()
        }  # fmt: skip
        tensors = {f"{b.name}#{n}": x.contiguous() for b in self._bricks.values() for n, x in b.tensors.items()}
        tensors |= {f"{b.name}#key": b.key.contiguous() for b in self._bricks.values() if b.key is not None}
        return io.save_tensors(tensors, path, {"lineament": "bricks", "bricks": json.dumps(told)})

    @classmethod
    def load(cls, path: str | Path) -> Bricks:
        """Read what `save` wrote.

        Raises:
            InputError: another kind of file.
        """
        weights = io.open_weights(path)
        if weights.metadata.get("lineament") != "bricks":
            raise InputError(f"{path} holds no bricks; Bricks.save writes them")
        found = []
        for name, about in json.loads(weights.metadata["bricks"]).items():
            tensors = {n: weights.load(f"{name}#{n}") for n in KINDS[about["kind"]]}
            key = weights.load(f"{name}#key") if f"{name}#key" in weights.names else None
            found.append(Brick(name=name, tensors=tensors, key=key, **about))
        return cls(found)


def _kind(brick: Brick, verb: str) -> str:
    if brick.kind not in VERBS[verb]:
        raise InputError(f"{brick.name} is of kind {brick.kind}, which can't {verb}; {', '.join(VERBS[verb])} can")
    return brick.kind


def rank_one_edit(weight: Tensor, key: Tensor, value: Tensor, covariance: Tensor | None = None) -> Tensor:
    """Return the weight [out, in] that maps key [in] to value [out], changed in one direction only; see `update`."""
    if key.shape != weight.shape[1:] or value.shape != weight.shape[:1] or not bool(key.any()):
        raise InputError(
            f"key {list(key.shape)} and value {list(value.shape)} for a weight {list(weight.shape)}; expected [in], "
            "not all zero, and [out]"
        )
    direction = key if covariance is None else torch.linalg.solve(covariance, key)
    return weight + torch.outer(value - weight @ key, direction) / (key @ direction)


def _update_linear(brick: Brick, key: Tensor, value: Tensor, covariance: Tensor | None) -> Brick:
    return replace(brick, tensors={"weight": rank_one_edit(brick.tensors["weight"], key, value, covariance)})


def _update_neurons(brick: Brick, key: Tensor, value: Tensor, covariance: Tensor | None) -> Brick:
    said = rank_one_edit(brick.tensors["outer"].T, key, value, covariance)
    return replace(brick, tensors={**brick.tensors, "outer": said.T.contiguous()})


def _grow_neurons(brick: Brick, count: int, seed: int) -> Brick:
    inner, outer = brick.tensors["inner"], brick.tensors["outer"]
    new = torch.randn(count, *inner.shape[1:], generator=generator(seed)) * inner.shape[-1] ** -0.5
    said = outer.new_zeros(count, outer.shape[1])
    return replace(brick, tensors={"inner": torch.cat([inner, new.to(inner)]), "outer": torch.cat([outer, said])})


def _grow_lora(brick: Brick, count: int, seed: int) -> Brick:
    a, b = brick.tensors["A"], brick.tensors["B"]
    new = torch.randn(count, a.shape[1], generator=generator(seed)) * a.shape[1] ** -0.5
    return replace(brick, tensors={"A": torch.cat([a, new.to(a)]), "B": torch.cat([b, b.new_zeros(len(b), count)], 1)})


VERBS: dict[str, dict[str, Callable[..., Brick]]] = {
    "update": {"linear": _update_linear, "neurons": _update_neurons},
    "grow": {"neurons": _grow_neurons, "lora": _grow_lora},
}
"""What a verb does to each kind; `route` and `merge` treat all kinds alike."""


def bricks_of(layer: Experts, place: str) -> Bricks:
    """Return the experts of a layer as bricks; their keys are the mean switching rows."""
    inner, outer = layer.inner.detach(), layer.outer.detach()
    return Bricks([
        Brick(f"{place}.{e}", "neurons", {"inner": inner[e].transpose(0, 1), "outer": outer[e]}, "group", place,
              key=F.normalize(inner[e, 0], dim=1).mean(0))
        for e in range(len(inner))
    ])  # fmt: skip


@torch.no_grad()
def with_expert(layer: Experts, brick: Brick, *, closed: bool = True) -> Experts:
    """Return a layer with one more expert, made of a brick of neurons.

    Args:
        closed: the router keeps it out (bias -inf) until it is opened, so the layer computes what it did before.

    Raises:
        InputError: a brick of another shape.
    """
    config, inner = layer.config, brick.tensors.get("inner")
    if inner is None or inner.transpose(0, 1).shape != layer.inner.shape[1:] or layer.inner_bias is not None:
        raise InputError(f"{brick.name} is no expert of shape {list(layer.inner.shape[1:])} without bias")
    count = config.experts + 1
    size = config.hidden // config.experts
    with seeded(0):
        new = Experts(ExpertsConfig(**{**config.to_json(), "experts": count, "hidden": count * size}))
    new = new.to(layer.inner)
    new.active = layer.active
    new.inner.copy_(torch.cat([layer.inner, inner.transpose(0, 1)[None].to(layer.inner)]))
    new.outer.copy_(torch.cat([layer.outer, brick.tensors["outer"][None].to(layer.outer)]))
    key = brick.key if brick.key is not None else inner[:, 0].mean(0)
    new.router.first.weight.copy_(torch.cat([layer.router.first.weight, F.normalize(key, dim=0)[None].to(layer.inner)]))
    new.router.second.weight.copy_(torch.block_diag(layer.router.second.weight, torch.ones(1, 1).to(layer.inner)))
    door = layer.router.bias.new_full((1,), -torch.inf if closed else 0.0)
    new.router.bias.copy_(torch.cat([layer.router.bias, door]))
    return new.train(layer.training)
