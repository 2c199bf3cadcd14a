"""Tensor functions of linear-time attention: each a reference loop and fast backends, none with weights.

- `decayed_attention`, `delta_rule`: the one recurrence, additive or with the delta rule; `decayed_step_`, `delta_step_`
  are its single steps in place. `BACKENDS_DECAYED`, `BACKENDS_DELTA` are the choices.
- `elementwise_scan`, `scan_step_`: a decaying sum per channel (`BACKENDS_SCAN`).
- `check_gates`: name the first gate that no model should have.
- `linear_attention`: feature maps under a running normaliser. `bidirectional_attention`: the same, not causal.
- `windowed_linear_attention`: exact softmax on a window and sinks, feature maps elsewhere, one denominator;
  `windowed_step_` is its step. `lolcats_attention`: the published form. `window_attention`: window and sinks alone.
- `with sequence_parallel(tokens):` the causal ones over torch.distributed, each rank with its stretch
  (`Part`, `stretches`).
- `subsampled_attention`: softmax over a random part of the sources, for training and ensembles.
- `tensor_attention`: softmax over pairs of keys, exact; `polynomial_tensor_attention`: near-linear, with its bound
  `polynomial_error` and its causal recurrence `polynomial_tensor_scan`; `tensor_cost` compares the two.
- `hyper_product`, `local_product`, `centred_convolution`: generated kernels applied to maps and sequences.
"""

from lineament.ops.bidirectional import bidirectional_attention
from lineament.ops.gates import check_gates
from lineament.ops.hyper import centred_convolution, hyper_product, local_product
from lineament.ops.linear import linear_attention
from lineament.ops.parallel import Part, sequence_parallel, stretches
from lineament.ops.recurrence import (
    BACKENDS_DECAYED,
    BACKENDS_DELTA,
    decayed_attention,
    decayed_step_,
    delta_rule,
    delta_step_,
)
from lineament.ops.scan import BACKENDS_SCAN, elementwise_scan, scan_step_
from lineament.ops.subsampled import subsampled_attention, subsampled_connections
from lineament.ops.tensor_attention import tensor_attention
from lineament.ops.tensor_polynomial import (
    kernel_error,
    polynomial_error,
    polynomial_tensor_attention,
    polynomial_tensor_scan,
    tensor_cost,
)
from lineament.ops.window import (
    WindowState,
    lolcats_attention,
    lolcats_step_,
    window_attention,
    windowed_linear_attention,
    windowed_step_,
)

__all__ = [
    "BACKENDS_DECAYED",
    "BACKENDS_DELTA",
    "BACKENDS_SCAN",
    "Part",
    "WindowState",
    "bidirectional_attention",
    "centred_convolution",
    "check_gates",
    "decayed_attention",
    "decayed_step_",
    "delta_rule",
    "delta_step_",
    "elementwise_scan",
    "hyper_product",
    "kernel_error",
    "linear_attention",
    "local_product",
    "lolcats_attention",
    "lolcats_step_",
    "polynomial_error",
    "polynomial_tensor_attention",
    "polynomial_tensor_scan",
    "scan_step_",
    "sequence_parallel",
    "stretches",
    "subsampled_attention",
    "subsampled_connections",
    "tensor_attention",
    "tensor_cost",
    "window_attention",
    "windowed_linear_attention",
    "windowed_step_",
]
