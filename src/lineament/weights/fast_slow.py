"""A fast and a slow LoRA on one frozen model, and the memory they replay (I-LoRA, arXiv:2402.18865)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lineament import graph, io
from lineament._base.errors import InputError, unknown
from lineament._base.extras import require
from lineament._base.seeds import generator
from lineament.weights.evaluate import Loss, prediction_loss
from lineament.weights.path import Path as Line
from lineament.weights.path import path

ADAPTERS = ("fast", "slow")
FORMS = ("factors", "product")
TARGETS = ("slow", "larger")


class FastSlow(nn.Module):
    """A frozen model with a fast LoRA that learns and a slow one that is its moving average.

    After each optimiser step `average_` does `slow <- decay slow + (1 - decay) fast`. The slow adapter is kept in
    float32 (in bf16 a small share of a small step is lost in rounding), is a buffer and not a parameter, and so is
    saved and resumed by `train.fit` and never seen by an optimiser.

    Args:
        model: any module; its linear layers get adapters in place, its own weights are frozen.
        lora: a `peft.LoraConfig`. decay: weight of the *old* slow value, from 0 (slow = fast) to 1 (slow stays).

    Raises:
        InputError: peft is missing, decay lies outside, or nothing learns.

    Example:
        >>> from peft import LoraConfig
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> learner = FastSlow(net, LoraConfig(r=2, target_modules=["0", "2"]), decay=0.9)
        >>> learner(torch.ones(1, 4), adapter="slow").shape
        torch.Size([1, 2])
    """

    def __init__(self, model: nn.Module, lora: Any, *, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise InputError(f"decay is {decay}; expected from 0 to 1, the weight of the old slow value")
        self.decay = decay
        try:
            self.net: Any = require("peft", extra="lora").get_peft_model(model, lora)
        except ValueError as error:  # names that fit nothing, kinds of layers that can't be adapted
            raise InputError(f"peft can't adapt this {type(model).__name__}: {error}") from None
        # peft switches requires_grad when adapters change, so the names are taken once
        self.names = [name for name, p in self.net.named_parameters() if p.requires_grad]
        if not self.names:
            raise InputError("the adapter has no parameter that learns; check target_modules and inference_mode")
        for i, p in enumerate(self._fast()):
            self.register_buffer(f"slow_{i}", p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone())

    @property
    def adapted(self) -> nn.Module:
        """The caller's own module, with adapters in it: names of layers are as they were."""
        return self.net.base_model.model

    def forward(self, *args: Any, adapter: str = "fast", **kwargs: Any) -> Any:
        """Call the model with one of its adapters."""
        if _named(adapter) == "fast":
            return self.net(*args, **kwargs)
        state = {name: x.to(p.dtype) for name, x, p in zip(self.names, self._slow(), self._fast(), strict=True)}
        return torch.func.functional_call(self.net, state, args, kwargs)

    def _fast(self) -> list[Tensor]:
        return [self.net.get_parameter(name) for name in self.names]

    def _slow(self) -> list[Tensor]:
        return [self.get_buffer(f"slow_{i}") for i in range(len(self.names))]

    @torch.no_grad()
    def average_(self) -> None:
        """Move the slow adapter towards the fast one; to be called after every optimiser step."""
        for slow, fast in zip(self._slow(), self._fast(), strict=True):
            slow.lerp_(fast.to(slow.dtype), 1 - self.decay)

    def point(self, adapter: str = "fast") -> dict[str, Tensor]:
        """Return a copy of one adapter's A and B by name, for `load_`, `plain` and `line`."""
        tensors = self._fast() if _named(adapter) == "fast" else self._slow()
        return {name: x.detach().clone() for name, x in zip(self.names, tensors, strict=True)}

    @torch.no_grad()
    def load_(self, point: Mapping[str, Tensor], adapter: str = "fast") -> None:
        """Put a point of `point` in an adapter's place."""
        tensors = self._fast() if _named(adapter) == "fast" else self._slow()
        for name, x in zip(self.names, tensors, strict=True):
            if name not in point:
                raise InputError(f"the point has no tensor {name!r}; expected one that `point` of this learner gave")
            x.copy_(point[name])

    @contextmanager
    def using(self, adapter: str) -> Iterator[Any]:
        """Run a block in which peft's model holds one adapter (`generate`, `save_pretrained`, ...); yields that model.

        The fast adapter is back afterwards, to the bit, also after an error.
        """
        fast = self.point("fast")
        self.load_(self.point(adapter))
        try:
            yield self.net
        finally:
            self.load_(fast)

    def plain(self, point: Mapping[str, Tensor] | str = "slow") -> nn.Module:
        """Return a copy of the caller's model with an adapter multiplied out into its weights."""
        net = copy.deepcopy(self)
        net.load_(self.point(point) if isinstance(point, str) else point)
        return net.net.merge_and_unload()

    def save(self, folder: str | Path) -> None:
        """Write both adapters as peft folders, `folder/fast` and `folder/slow`; all or nothing."""
        with io.building_folder(folder) as partial:
            for adapter in ADAPTERS:
                with self.using(adapter) as net:
                    net.save_pretrained(str(partial / adapter), save_embedding_layers=False)


def line(
    learner: FastSlow, a: Mapping[str, Tensor], b: Mapping[str, Tensor], batches: Any, *, form: str = "factors",
    loss: Loss | None = None, points: int = 11,
) -> Line:  # fmt: skip
    """Measure the straight line between two adapters of one learner: after task t - 1 and after task t, say.

    Args:
        a, b: from `learner.point`. batches, loss, points: as `weights.path` takes them.
        form: "factors" goes from A to A and from B to B, as published; the product of the two then has cross terms,
            which is sane along one training run only. "product" goes straight in the products B A.

    Raises:
        InputError: an unknown form, or points of another learner.
    """
    if form not in FORMS:
        raise unknown("form of the line", form, FORMS)
    if form == "product":
        ends = [learner.plain(point) for point in (a, b)]
        return path(ends[0], ends[0].state_dict(), ends[1].state_dict(), batches, loss=loss, points=points)
    states = []
    for point in (a, b):
        inner = copy.deepcopy(learner)
        inner.load_(point)
        states.append(inner.net.state_dict())
    return path(learner.net, states[0], states[1], batches, loss=loss, points=points)


class Reservoir:
    """A memory of at most `size` rows in which every row ever added stands with the same probability (Vitter 1985).

    Rows are those of tensors, or of tuples and mappings of tensors, that always have the same shapes: pad all tasks to
    one length, labels with -100 and an attention mask beside the ids.

    Example:
        >>> memory = Reservoir(2)
        >>> memory.add(torch.arange(5))
        >>> memory.draw(3, seed=0).shape, memory.seen
        (torch.Size([3]), 5)
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if size < 1:
            raise InputError(f"a memory of {size} rows was asked for; expected at least 1")
        self.size, self.seen, self.rows = size, 0, None
        self._draw = generator(seed)

    def __len__(self) -> int:
        return min(self.size, self.seen)

    def add(self, rows: Any) -> None:
        """Add every row of a batch."""
        count = len(pytree.tree_leaves(rows)[0])
        if self.rows is not None and _shape(rows) != _shape(self.rows):
            raise InputError(
                f"rows of shape {_shape(rows)} don't go with rows of shape {_shape(self.rows)}; pad all to one length"
            )
        places = torch.empty(count, dtype=torch.long)
        for i in range(count):
            n = self.seen + i
            places[i] = n if n < self.size else int(torch.randint(n + 1, (), generator=self._draw))
        if self.rows is None:
            self.rows = pytree.tree_map(lambda x: x.new_zeros(self.size, *x.shape[1:]), rows)
        last = {int(place): i for i, place in enumerate(places) if place < self.size}  # the last one in a place stays
        to, of = torch.tensor(list(last), dtype=torch.long), torch.tensor(list(last.values()), dtype=torch.long)
        pytree.tree_map(lambda held, new: held.index_copy_(0, to, new[of]), self.rows, rows)
        self.seen += count

    def draw(self, count: int, *, seed: int) -> Any:
        """Return `count` rows drawn with replacement; a function of the seed and of what is held."""
        if not self.seen:
            raise InputError("the memory is empty")
        at = torch.randint(len(self), (count,), generator=generator(seed))
        return pytree.tree_map(lambda x: x[at], self.rows)


def replay_loss(
    learner: FastSlow, loss: Loss | None = None, *, consistency: float = 1.0, hidden: graph.Where | None = None,
    target: str = "slow",
) -> Callable[[Any, Any], tuple[Tensor, Mapping[str, float]]]:  # fmt: skip
    """Return I-LoRA's loss for `train.fit`, on batches (current, memory); memory None is plain training.

    `L = (CE(current) + CE(memory)) / 2 + g mean (h_fast - h*)^2` on the memory, with h* from the slow adapter, without
    gradient and without dropout. `consistency = 0` is experience replay.

    Args:
        loss: of one batch, see `prediction_loss`.
        consistency: g.
        hidden: the modules whose outputs h are compared, by the names of the caller's own model: "model.norm" (the last
            hidden states) or "model.layers.*", say. Positions that an attention mask of the batch hides don't count.
        target: "slow", h* = h_slow; or "larger", h* = max(h_fast, h_slow), entry by entry, as the published code has it
            (entries above the slow one then go free).

    Raises:
        InputError: consistency without hidden, or an unknown target.
    """
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    if consistency and hidden is None:
        raise InputError("consistency compares hidden states: give hidden, or consistency=0 for plain replay")
    of = loss or prediction_loss

    def value(model: Any, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        current, memory = batch
        now, numbers = of(model, current)
        if memory is None:
            return now, numbers
        if not consistency or hidden is None:
            then, _ = of(model, memory)
            return (now + then) / 2, {**numbers, "memory": float(then.detach())}
        with graph.capture(learner.adapted, hidden, detach=False) as fast:
            then, _ = of(model, memory)
        with torch.no_grad(), _evaluating(learner), graph.capture(learner.adapted, hidden) as slow:
            of(lambda *args, **kwargs: model(*args, adapter="slow", **kwargs), memory)
        apart = torch.stack([_distance(fast.tensor(n), slow.tensor(n), memory, target) for n in fast]).mean()
        kept = {"memory": float(then.detach()), "consistency": float(apart.detach())}
        return (now + then) / 2 + consistency * apart, {**numbers, **kept}

    return value


def _distance(fast: Tensor, slow: Tensor, batch: Any, target: str) -> Tensor:
    goal = slow if target == "slow" else torch.maximum(fast.detach(), slow)
    wide = torch.promote_types(fast.dtype, torch.float32)
    squared = (fast.to(wide) - goal.to(wide)).square().mean(-1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or mask.shape != squared.shape:
        return squared.mean()
    return (squared * mask).sum() / mask.sum().clamp_min(1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _named(adapter: str) -> str:
    if adapter not in ADAPTERS:
        raise unknown("adapter", adapter, ADAPTERS)
    return adapter


def _shape(rows: Any) -> list[tuple[int, ...]]:
    return [tuple(x.shape[1:]) for x in pytree.tree_leaves(rows)]
