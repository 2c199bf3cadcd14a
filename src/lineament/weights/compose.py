"""aTLAS: one learned coefficient per block and task vector (Zhang et al. 2024, arXiv 2407.02880).

`theta_j = base_j + sum_i lambda_ij tau_ij` with every tensor a block j. The gradient of lambda_ij is the inner product
of the gradient of theta_j with tau_ij, so one backward pass to theta is enough and the task vectors are read again one
at a time: they never sit in memory together.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.weights.geometry import dot_product
from lineament.weights.point import Point
from lineament.weights.signature import sparse

Loss = Callable[[nn.Module, Any], Tensor]
RULES = ("random", "gradient", "blockwise")


class Composed(nn.Module):
    """A frozen model plus task vectors with trainable coefficients; called like the model.

    Args:
        model: the base; its parameters are neither trained nor changed.
        vectors: task vectors as points (`tuned - base`, or an adapter opened with lora="product"); blocks are matched
            by name, names a vector lacks count as zero, buffers are left out.
        parts: K > 1 splits every block at random into K parts with a coefficient each (aTLAS x K).
        blocks: glob of the parameters that may move.
        linear: evaluate the model linearised at the base, `f(x) + J (sum_i lambda_i tau_i)`.
        seed: of the split into parts.

    `coefficients` [n, m, K] start at zero: the base, to the last bit.

    Raises:
        InputError: no vectors, no block, or a shape that differs.

    Example:
        >>> base = nn.Linear(2, 1)
        >>> composed = Composed(base, [Point.open({"weight": torch.ones(1, 2)})])
        >>> composed.coefficients.shape, composed.blocks
        (torch.Size([1, 1, 1]), ['weight'])
    """

    coefficients: nn.Parameter

    def __init__(
        self, model: nn.Module, vectors: Sequence[Point], *, parts: int = 1, blocks: str = "*", linear: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        known = {name: p for name, p in model.named_parameters() if fnmatchcase(name, blocks)}
        self.blocks = [name for name in known if any(name in vector for vector in vectors)]
        if parts < 1:
            raise InputError(f"parts is {parts}; expected at least 1")
        if not self.blocks:
            raise InputError(f"{len(vectors)} task vectors share no parameter with the model under {blocks!r}; "
                             "expected tuned minus base, names as in the model")  # fmt: skip
        for name in self.blocks:
            for vector in vectors:
                if name in vector and vector.shape(name) != tuple(known[name].shape):
                    raise InputError(
                        f"{name!r} has shape {tuple(known[name].shape)}, in {vector.label} {vector.shape(name)}"
                    )
        self.inner = [model.requires_grad_(False)]  # in a list: not ours to train, save or move
        self.vectors, self.parts, self.linear, self.seed = list(vectors), parts, linear, seed
        self.coefficients = nn.Parameter(torch.zeros(len(vectors), len(self.blocks), parts))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the composed model."""
        model = self.inner[0]
        if not self.linear:
            return functional_call(model, self.weights(), args, kwargs)
        start = {name: model.get_parameter(name).detach() for name in self.blocks}
        moved = {name: weight - start[name] for name, weight in self.weights().items()}
        value, change, *_ = jvp(lambda p: functional_call(model, p, args, kwargs), (start,), (moved,))
        return value + change

    def weights(self) -> dict[str, Tensor]:
        """Return the composed blocks, differentiable in the coefficients."""
        return {name: _Block.apply(self.coefficients[:, j], self, name) for j, name in enumerate(self.blocks)}  # pyright: ignore

    def vector(self, i: int, name: str) -> Tensor | None:
        """Read one block of one task vector."""
        return self.vectors[i].value(name) if name in self.vectors[i] else None

    def masks(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return which part each entry of a block belongs to; None where there is one part."""
        if self.parts == 1:
            return None
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        g = generator(int.from_bytes(digest[:7], "little"))
        return torch.randint(self.parts, shape, generator=g)

    def point(self) -> Point:
        """Return the composed model as a point, to save or to merge on.

        With one part it is an expression of base and vectors; with more, tensors are computed when they are read.
        """
        base = Point.open(self.inner[0], copy=False)
        if self.parts == 1:
            for i, vector in enumerate(self.vectors):
                table = dict(zip(self.blocks, self.coefficients[i, :, 0].tolist(), strict=True))
                base = base + sparse(vector).scale(lambda name, table=table: table.get(name, 0.0))
            return base
        table = self.coefficients.detach().clone()

        def load(name: str) -> Tensor:
            if name not in self.blocks:
                return base.value(name)
            return _composed(self, name, table[:, self.blocks.index(name)])

        return base.computed("composed", base.specs, [base, *self.vectors], load, told=table.tolist())

    def table(self) -> dict[str, list[list[float]]]:
        """Return block -> coefficients [n, K], for people and JSON."""
        return {name: self.coefficients[:, j].tolist() for j, name in enumerate(self.blocks)}


def _composed(owner: Composed, name: str, coefficients: Tensor) -> Tensor:
    out = owner.inner[0].get_parameter(name).detach().clone()
    parts = owner.masks(name, out.shape)
    for i, row in enumerate(coefficients):
        tau = owner.vector(i, name)
        if tau is not None and bool(row.any()):
            tau = tau.to(out.device)
            out.add_(tau, alpha=float(row[0])) if parts is None else out.addcmul_(tau, row.cpu()[parts].to(out))
    return out


class _Block(torch.autograd.Function):
    """One composed block; nothing of the task vectors is kept between forward and backward."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, owner: Composed, name: str) -> Tensor:  # pyright: ignore
        ctx.owner, ctx.name = owner, name
        return _composed(owner, name, coefficients.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        owner, grad = ctx.owner, grad.detach().float().cpu()
        parts = owner.masks(ctx.name, grad.shape)
        out = torch.zeros(len(owner.vectors), owner.parts)
        for i in range(len(owner.vectors)):
            tau = owner.vector(i, ctx.name)
            if tau is None:
                continue
            if parts is None:
                out[i, 0] = dot_product(grad, tau)
            else:
                out[i].index_add_(0, parts.flatten(), (grad * tau).float().flatten())
        return out.to(owner.coefficients.device), None, None


def penalty(composed: Composed, *, p: int = 1) -> Tensor:
    """Return `0.5 mean_j ||lambda_:j||_p`, to be added to a loss with a strength."""
    return 0.5 * composed.coefficients.flatten(1).norm(p, dim=0).mean()


def negation(target: Loss, control: Loss) -> Callable[[nn.Module, tuple[Any, Any]], tuple[Tensor, dict[str, float]]]:
    """Return the loss that unlearns a task and keeps another: `-target + control`, batches (target's, control's)."""

    def loss(model: nn.Module, batch: tuple[Any, Any]) -> tuple[Tensor, dict[str, float]]:
        away, near = target(model, batch[0]), control(model, batch[1])
        return near - away, {"target": float(away.detach()), "control": float(near.detach())}

    return loss


def pseudo_label_loss(
    model: nn.Module, weak: Tensor, strong: Tensor, *, threshold: float = 0.9, trusted: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the strong view against the weak view's own label, where its confidence exceeds a threshold.

    Args:
        weak, strong: two augmentations of the same unlabelled inputs.
        trusted: [B] labels of samples that are trusted whatever their confidence, -1 elsewhere.
    """
    with torch.no_grad():
        confidence, label = model(weak).softmax(-1).max(-1)
    use = confidence > threshold
    if trusted is not None:
        label, use = torch.where(trusted >= 0, trusted, label), use | (trusted >= 0)
    losses = nn.functional.cross_entropy(model(strong), label, reduction="none")
    return (losses * use).sum() / use.sum().clamp_min(1)


def most_confident(logits: Tensor, most: int = 100) -> Tensor:
    """Return pseudo labels of a trusted set: of each predicted class the surest `min(N / 10 C, most)`, -1 elsewhere.

    Args:
        logits: [N, C].
    """
    confidence, label = logits.softmax(-1).max(-1)
    count = int(min(logits.shape[0] / (10 * logits.shape[1]), most))
    trusted = torch.full_like(label, -1)
    for k in range(logits.shape[1]):
        rows = (label == k).nonzero().flatten()
        best = rows[confidence[rows].argsort(descending=True)[:count]]
        trusted[best] = k
    return trusted


def coefficient_gradients(composed: Composed, batches: Sequence[Any], loss: Loss) -> Tensor:
    """Return the mean gradient of the loss by the coefficients where they stand, [n, m]."""
    total = torch.zeros(composed.coefficients.shape[:2])
    for batch in batches:
        (grad,) = torch.autograd.grad(loss(composed, batch), [composed.coefficients])
        total += grad.sum(-1).cpu() / len(batches)
    return total


def choose_vectors(
    vectors: Sequence[Point],
    gradients: Tensor,
    budget: int,
    *,
    rule: str = "blockwise",
    blocks: Sequence[str],
    seed: int = 0,
) -> list[Point]:
    """Return `budget` of the task vectors, or mixed ones, by how much the loss would feel them.

    Args:
        gradients: [n, m], from `coefficient_gradients` at zero.
        rule: "gradient" (largest sum of magnitudes), "blockwise" (for every block those it feels most: mixed vectors),
            or "random".
        blocks: the m blocks' names.

    Raises:
        InputError: an unknown rule, or a budget outside 1..n.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if not 1 <= budget <= len(vectors):
        raise InputError(f"budget is {budget}; expected 1 to {len(vectors)}, the number of task vectors")
    if rule == "random":
        return [vectors[i] for i in torch.randperm(len(vectors), generator=generator(seed))[:budget].tolist()]
    if rule == "gradient":
        return [vectors[i] for i in gradients.abs().sum(1).argsort(descending=True)[:budget].tolist()]
    order = gradients.abs().argsort(0, descending=True)
    return [_mixed(vectors, dict(zip(blocks, order[place].tolist(), strict=True))) for place in range(budget)]


def _mixed(vectors: Sequence[Point], choice: Mapping[str, int]) -> Point:
    have = {name: i for name, i in choice.items() if name in vectors[i]}
    specs = {name: vectors[i].specs[name] for name, i in have.items()}
    return vectors[0].computed(
        "mixed task vector", specs, list(vectors), lambda n: vectors[have[n]].value(n), told=dict(choice)
    )


def best_scalar(
    composed: Composed, score: Callable[[nn.Module], float], *, grid: Sequence[float] = tuple(i / 20 for i in range(21))
) -> float:
    """Set all coefficients to the one number of a grid with the highest score, the isotropic baseline. Returns it."""
    found = (-float("inf"), grid[0])
    with torch.no_grad():
        for alpha in grid:
            composed.coefficients.fill_(alpha)
            found = max(found, (score(composed), alpha), key=lambda pair: pair[0])
        composed.coefficients.fill_(found[1])
    return found[1]
