"""The elementwise scan beyond `check_op`: the equation itself, tracing, long sequences, wrong input."""

import pytest
import torch

from lineament._base.errors import InputError
from lineament.ops import check_gates, elementwise_scan, scan_step_

X = torch.randn(2, 130, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
G = -torch.rand(2, 130, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_it_is_the_sum_it_says(backend):
    since = G.cumsum(1)
    weight = (since[:, :, None] - since[:, None]).exp() * torch.ones(130, 130).tril()[None, :, :, None]
    torch.testing.assert_close(elementwise_scan(X, G, backend=backend)[0], torch.einsum("btsd,bsd->btd", weight, X))


def test_float32_stays_near_float64_over_1e5_steps():
    x = torch.randn(1, 100_000, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    g = torch.tensor([0.0, -7e-6, -1e-2, -80.0], dtype=torch.float64)
    exact, _ = elementwise_scan(x, g)
    found, _ = elementwise_scan(x.float(), g.float())
    assert ((found - exact).abs().amax(1) / exact.abs().amax(1)).max() < 1e-4


def test_steps_are_the_scan():
    state = torch.zeros(2, 5, dtype=torch.float64)
    steps = [scan_step_(X[:, t], G[:, t], state).clone() for t in range(130)]
    o, last = elementwise_scan(X, G)
    torch.testing.assert_close(torch.stack(steps, 1), o)
    torch.testing.assert_close(state, last)


def test_it_is_one_node_of_an_exported_graph_of_any_length():
    class Scan(torch.nn.Module):
        def forward(self, x, g):
            return elementwise_scan(x, g)[0]

    T = torch.export.Dim("T", min=2, max=512)
    program = torch.export.export(Scan(), (X, G), dynamic_shapes=({1: T}, {1: T}))
    for length in (3, 64, 129):
        given = X[:, :length], G[:, :length]
        torch.testing.assert_close(program.module()(*given), Scan()(*given))


def test_it_compiles_with_its_gradient():
    x, g = X.clone().requires_grad_(), G.clone().requires_grad_()
    slopes = []
    for run in (elementwise_scan, torch.compile(elementwise_scan, backend="aot_eager")):
        slopes.append(torch.autograd.grad(run(x, g)[0].square().sum(), (x, g)))
    torch.testing.assert_close(slopes[1], slopes[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[0]}, r"expected the axes \[B, T, channels\]"),
        ({"x": X.long()}, "x has dtype torch.int64"),
        ({"log_decay": G[:, :7]}, "does not broadcast to x"),
        ({"log_decay": G[..., None]}, "does not broadcast"),
        ({"state": torch.zeros(2, 4)}, r"state has shape \[2, 4\]; x asks for \[2, 5\]"),
        ({"state": torch.zeros(2, 5, device="meta")}, "state is on meta and x is on cpu"),
        ({"cu_seqlens": torch.tensor([0, 130])}, "x has B=2"),
        ({"x": X[:1], "log_decay": G[:1], "cu_seqlens": torch.tensor([0, 90, 60, 130])}, "a rising list from 0"),
        ({"x": X[:1], "log_decay": G[:1], "cu_seqlens": torch.tensor([0, 131])}, "T=130 of x"),
        ({"backend": "chunkd"}, "Did you mean 'chunked'"),
    ],
)
def test_wrong_input_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        elementwise_scan(**{"x": X, "log_decay": G, **changes})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"log_decay": torch.tensor([[-1.0, torch.nan]])}, r"log_decay is nan at \[0, 1\]"),
        ({"log_decay": torch.tensor([torch.inf])}, r"log_decay is inf at \[0\]"),
        ({"beta": torch.tensor([0.5, 1.5])}, r"beta is 1.5 at \[1\]; expected a number from 0 to 1"),
        ({"beta": torch.tensor([2.5]), "most": 2.0}, "from 0 to 2"),
        ({"beta": torch.tensor([-0.1])}, "beta is -0.1"),
    ],
)
def test_gates_out_of_range_are_named(given, message):
    with pytest.raises(InputError, match=message):
        check_gates(**given)


def test_gates_at_the_edges_pass():
    check_gates(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 1.0]))
    check_gates(None, torch.tensor([2.0]), most=2.0)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_an_empty_batch_is_answered_with_gradients(backend):
    x = X[:0].clone().requires_grad_()
    o, state = elementwise_scan(x, G[:0], backend=backend)
    o.sum().backward()
    assert (o.shape, state.shape, x.grad.shape) == ((0, 130, 5), (0, 5), (0, 130, 5))
