"""Where a device has no float64 (here: as if this one had none), decays are summed in float32."""

import pytest
import torch
from recurrence_problems import everything, problem, worst

from lineament.nn import decays
from lineament.ops import tensor_polynomial, window_reference
from lineament.ops.recurrence import autograd, pairs
from lineament.ops.tensor_polynomial import polynomial_error, polynomial_tensor_attention
from lineament.ops.window import windowed_linear_attention


@pytest.fixture
def asked(monkeypatch):
    """Answer float32, and keep which devices were asked about."""
    devices = []
    for module in (autograd, pairs, window_reference, decays, tensor_polynomial):
        monkeypatch.setattr(module, "widest", lambda device: devices.append(device) or torch.float32)
    return devices


@pytest.mark.parametrize("backend", ["chunked", "chunked-autograd"])
def test_the_recurrence(asked, backend):
    p = problem(50, gate="head", dtype=torch.float32, strength=0.1)
    found = everything(p, backend)
    assert asked
    assert max(worst(found, everything(p.map(torch.Tensor.double), "reference")).values()) < 1e-4


def test_the_window_and_the_decays_of_retnet(asked):
    x = torch.rand(1, 20, 2, 3)
    gate, far = -x[..., 0], torch.zeros(2)
    options = {"log_decay": gate, "window": 3, "sinks": 1}
    found, _ = windowed_linear_attention(x, x, x, x, x, far, **options, backend="reference")
    decay = decays.retention_decay(3, x)
    assert len(asked) == 2
    assert decay.dtype == torch.float32
    torch.testing.assert_close(found, windowed_linear_attention(x, x, x, x, x, far, **options, backend="blocked")[0])


def test_attention_over_pairs_by_polynomials(asked):
    q, keys = torch.rand(1, 6, 2, 3), [torch.rand(1, 6, 2, 3) for _ in range(2)]
    values = [torch.randn(1, 6, 2, 4) for _ in range(2)]
    for method in ("taylor", "chebyshev"):
        found = polynomial_tensor_attention(q, keys, values, method=method)
        wide = [x.double() for x in (q, *keys, *values)]
        expected = polynomial_tensor_attention(wide[0], wide[1:3], wide[3:], method=method)
        torch.testing.assert_close(found, expected.float())
        assert polynomial_error(q, keys, values, method=method).dtype == torch.float32
    assert asked
