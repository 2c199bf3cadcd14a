"""Are two vectors equal, and what follows: tasks whose intermediate variables are known (arXiv:2507.08802).

Hierarchical equality asks whether two pairs are both equal or both not, the distributive law for `(a and b) or (b and
c)` of three equalities. Each can be computed by several algorithms, and each of these be looked for in a network.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lineament import train
from lineament._base.errors import unknown
from lineament._base.seeds import generator, seeded
from lineament.tasks.algorithms import Algorithm, Examples
from lineament.tasks.classify import class_loss

WIDTH = 4  # of each vector; entries uniform in -1/2 to 1/2
PAIRS = {"hierarchical": 2, "distributive": 3}


def _same(x: Tensor, y: Tensor) -> Tensor:
    return (x == y).all(-1)


def _iff(x: Tensor, y: Tensor) -> Tensor:
    return (x == y).long()


P4, P6 = (tuple(f"p{i}" for i in range(1, n + 1)) for n in (4, 6))
ALGORITHMS = {
    "both equalities": Algorithm(
        "both equalities", P4,
        {"left": (("p1", "p2"), _same), "right": (("p3", "p4"), _same), "out": (("left", "right"), _iff)}, "out",
    ),
    "left equality": Algorithm(
        "left equality", P4,
        {"left": (("p1", "p2"), _same), "out": (("left", "p3", "p4"), lambda v, x, y: _iff(v, _same(x, y)))}, "out",
    ),
    "first argument": Algorithm(
        "first argument", P4,
        {"first": (("p1",), lambda x: x),
         "out": (("first", "p2", "p3", "p4"), lambda v, x, y, z: _iff(_same(v, x), _same(y, z)))}, "out",
    ),
    "and-or-and": Algorithm(
        "and-or-and", P6,
        {"a and b": (P6[:4], lambda w, x, y, z: _same(w, x) & _same(y, z)),
         "b and c": (P6[2:], lambda w, x, y, z: _same(w, x) & _same(y, z)),
         "out": (("a and b", "b and c"), lambda x, y: (x | y).long())}, "out",
    ),
    "and-or": Algorithm(
        "and-or", P6,
        {"b": (("p3", "p4"), _same),
         "a or c": (("p1", "p2", "p5", "p6"), lambda w, x, y, z: _same(w, x) | _same(y, z)),
         "out": (("b", "a or c"), lambda x, y: (x & y).long())}, "out",
    ),
}  # fmt: skip
"""The first three compute hierarchical equality, the others the distributive law."""


def equality_examples(task: str, count: int, *, seed: int = 0, chained: bool = False) -> Examples:
    """Draw inputs [N, 16] ("hierarchical") or [N, 24] ("distributive") with the vectors p1, p2, ... they are made of.

    Pairs are equal with probability 1/2 in the first task; in the second, labels are balanced.

    Args:
        chained: the second vector of each row is the first of the next, its partner; else "first argument" would never
            meet an equal vector, and setting it would always mean "not equal".

    Raises:
        InputError: an unknown task.

    Example:
        >>> found = equality_examples("hierarchical", 3)
        >>> found.inputs.shape, found.values["p1"].shape
        (torch.Size([3, 16]), torch.Size([3, 4]))
    """
    if task not in PAIRS:
        raise unknown("task", task, PAIRS)
    random, pairs = generator(seed), PAIRS[task]
    cases = torch.cartesian_prod(*[torch.tensor([False, True])] * pairs)
    if task == "distributive":
        yes = (cases[:, 0] & cases[:, 1]) | (cases[:, 1] & cases[:, 2])
        wanted = torch.where(yes, 0.5 / yes.sum(), 0.5 / (~yes).sum())
    else:
        wanted = torch.full((len(cases),), 1 / len(cases))
    equal = cases[torch.multinomial(wanted, count, replacement=True, generator=random)]
    p = torch.rand(count, pairs, 2, WIDTH, generator=random) - 0.5
    p[:, :, 1] = torch.where(equal[..., None], p[:, :, 0], p[:, :, 1])
    if chained:
        last = (~equal[:, 0]).cumsum(0) % max(1, int((~equal[:, 0]).sum()))  # which new vector stands second
        p[:, 0, 1] = p[last, 0, 1]
        p[:, 0, 0] = p[:, 0, 1].roll(1, 0)
    p = p.flatten(1, 2)
    partners = torch.arange(1, count + 1) % count if chained else None
    return Examples(p.flatten(1), {f"p{i + 1}": p[:, i] for i in range(2 * pairs)}, partners=partners)


def equality_batches(task: str, size: int, *, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return step -> (inputs, labels), fresh at every step."""
    algorithm = ALGORITHMS["both equalities" if task == "hierarchical" else "and-or-and"]

    def draw(step: int) -> tuple[Tensor, Tensor]:
        found = equality_examples(task, size, seed=seed * 1_000_003 + step + 1)
        assert isinstance(found.inputs, Tensor)
        return found.inputs, algorithm.run(found.values)[algorithm.output]

    return draw


def learned_mlp(task: str, *, layers: int = 3, steps: int = 6000, batch: int = 1024, seed: int = 0) -> nn.Sequential:
    """Return an MLP that learned a task: blocks "0", "1", ... of Linear(D, D) and ReLU, and a head to two classes.

    Args:
        steps: of Adam at 1e-3 on fresh data; 0 leaves it untrained.
    """
    if task not in PAIRS:
        raise unknown("task", task, PAIRS)
    width = 2 * WIDTH * PAIRS[task]
    with seeded(seed):
        blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)]
        net = nn.Sequential(*blocks, nn.Linear(width, 2))
    config = train.FitConfig(steps=steps, lr=1e-3, schedule="constant", betas=(0.9, 0.999), clip=None, seed=seed)
    train.fit(net, equality_batches(task, batch, seed=seed), class_loss, config, description=task)
    return net.eval()
