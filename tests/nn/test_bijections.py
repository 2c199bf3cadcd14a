"""Maps that can be undone: there and back, orthonormal after learning, and the reversible network against a loop."""

import pytest
import torch
from torch import nn

from lineament._base.errors import InputError
from lineament.nn import BIJECTIONS, Reordered, Reversible, Rotation

MAKERS = {
    **BIJECTIONS,
    "one block": lambda D: Reversible(D, blocks=1, hidden=3),
    "deep": lambda D: Reversible(D, blocks=4, hidden=7, depth=3),
    "cayley": lambda D: Rotation(D, kind="cayley"),
    "householder": lambda D: Rotation(D, kind="householder"),
    "order": lambda D: Reordered(torch.randperm(D).tolist()),
}


@pytest.fixture
def wide():
    """Float64 from the start: what is orthogonal to float32 only stays so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("width", [2, 7, 16])
@pytest.mark.parametrize("name", MAKERS)
def test_there_and_back_gives_the_same_and_its_gradient_is_the_identity(name, width):
    torch.manual_seed(0)
    phi = MAKERS[name](width)
    h = torch.randn(5, width, dtype=torch.float64, requires_grad=True)
    back = phi.inverse(phi(h), h)
    torch.testing.assert_close(back, h, rtol=0, atol=1e-12)
    (g,) = torch.autograd.grad(back, h, seed := torch.randn(5, width, dtype=torch.float64))
    torch.testing.assert_close(g, seed, rtol=0, atol=1e-11)
    back = phi(phi.inverse(h, h))
    torch.testing.assert_close(back, h, rtol=0, atol=1e-12)


def test_ten_blocks_in_single_precision_come_back_to_1e_5():
    torch.manual_seed(0)
    phi, h = Reversible(16, blocks=10, hidden=64), torch.randn(1000, 16)
    assert (phi.inverse(phi(h)) - h).abs().max() < 1e-5


def test_the_reversible_network_is_the_published_recurrence():
    torch.manual_seed(0)
    phi, h = Reversible(6, blocks=2, hidden=5).double(), torch.randn(4, 6, dtype=torch.float64)
    for row, z in zip(h, phi(h), strict=True):
        a, b = row[:3], row[3:]
        for F, G in zip(phi.F, phi.G, strict=True):
            a = a + F[2].weight @ (F[0].weight @ b + F[0].bias).clamp(min=0) + F[2].bias
            b = b + G[2].weight @ (G[0].weight @ a + G[0].bias).clamp(min=0) + G[2].bias
        torch.testing.assert_close(z, torch.cat([a, b]))


@pytest.mark.parametrize("rank", [None, 3])
def test_a_rotation_stays_orthonormal_while_it_learns(rank):
    torch.manual_seed(0)
    phi, h = Rotation(8, rank=rank), torch.randn(64, 8)
    before, optimizer = phi.Q.detach().clone(), torch.optim.Adam(phi.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        phi(h)[:, 0].square().mean().backward()
        optimizer.step()
    assert (phi.Q - before).abs().max() > 0.1
    assert (phi.Q.T @ phi.Q - torch.eye(phi.Q.shape[1])).abs().max() < 1e-6


def test_a_low_rank_leaves_the_rest_of_the_space_alone():
    torch.manual_seed(0)
    phi, h = Rotation(9, rank=2).double(), torch.randn(4, 9, dtype=torch.float64)
    moved = phi.inverse(phi(h) + 1, h)
    torch.testing.assert_close(phi(moved), phi(h) + 1)
    outside = torch.eye(9, dtype=torch.float64) - phi.Q @ phi.Q.T
    torch.testing.assert_close(moved @ outside, h @ outside)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Rotation(4, rank=5), "1 to 4 coordinates; given rank 5"),
        (lambda: Reversible(1), "expected width >= 2"),
        (lambda: Reversible(4, blocks=0), "0 blocks"),
        (lambda: Reordered([0, 0]), "no order of 2"),
    ],
)
def test_what_is_no_bijection_is_refused(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_the_table_makes_modules_for_a_width():
    assert all(isinstance(make(4), nn.Module) for make in BIJECTIONS.values())
