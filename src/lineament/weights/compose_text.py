"""Coefficients of task vectors of a language model, fitted on a little text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament import data as texts
from lineament import train
from lineament._base.errors import InputError
from lineament.models.load import find_model, load_teacher
from lineament.weights import compose
from lineament.weights.point import Point

LENGTH = 256  # tokens of a sequence
HELD_OUT = 16  # sequences


def compose_on_text(
    base: str, tuned: Sequence[str], *, data: str, steps: int, lr: float, tokens: int, parts: int, budget: int | None,
    blocks: str, seed: int,
) -> tuple[compose.Composed, dict[str, float]]:  # fmt: skip
    """Fit the coefficients of `tuned - base` on text and score held-out text of the same kind.

    Returns:
        The composed model, and nats per token: of the base, of the best single coefficient, composed.

    Raises:
        InputError: models that do not fit together, or too little text.
    """
    model, tokenizer = load_teacher(base)
    start = Point.open(base)
    vectors = [_vector(name, base, start) for name in tuned]
    rows = _rows(tokenizer, data)
    held, rows = rows[-HELD_OUT:], rows[:-HELD_OUT]
    size = max(1, tokens // LENGTH)

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return m(input_ids=batch, labels=batch, use_cache=False).loss

    @torch.no_grad()
    def score(m: nn.Module, of: Tensor = held) -> float:
        return sum(float(loss(m, part)) * len(part) for part in of.split(size)) / len(of)

    def draw(step: int) -> Tensor:
        at = torch.randint(len(rows), (size,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        return rows[at]

    composed = compose.Composed(model, vectors, parts=parts, blocks=blocks, seed=seed)
    losses = {"base": score(composed)}
    if budget is not None:
        grads = compose.coefficient_gradients(composed, [draw(step) for step in range(2)], loss)
        chosen = compose.choose_vectors(vectors, grads, budget, blocks=composed.blocks)
        composed = compose.Composed(model, chosen, parts=parts, blocks=blocks, seed=seed)
    grid = [i / 4 for i in range(1, 5)]
    compose.best_scalar(composed, lambda m: -score(m, rows[:HELD_OUT]), grid=grid)
    losses["best single coefficient"] = score(composed)
    torch.nn.init.zeros_(composed.coefficients)
    config = train.FitConfig(steps=steps, lr=lr, weight_decay=0.1, seed=seed)
    train.fit(composed, draw, lambda m, b: (loss(m, b), {}), config, description="compose")
    return composed, {**losses, "composed": score(composed)}


def _vector(name: str, base: str, start: Point) -> Point:
    folder = find_model(name)
    if (folder / "adapter_config.json").is_file():
        return Point.open(folder, base=base, lora="product")
    return Point.open(name) - start


def _rows(tokenizer: Any, data: str) -> Tensor:
    ids: list[int] = []
    for document in texts.load_text(data):
        ids += tokenizer(document)["input_ids"]
        if len(ids) > 500 * LENGTH:
            break
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    if len(rows) < 2 * HELD_OUT:
        raise InputError(f"{data} holds {len(ids)} tokens; expected at least {2 * HELD_OUT * LENGTH}")
    return rows
