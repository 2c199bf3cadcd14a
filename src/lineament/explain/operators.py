"""One rule per operator of the autograd graph, by the node's name.

Each takes the message of its `Step` as relevance R or as coefficients rho (R = z rho), sends the inputs theirs, and
absorbs what ends. Sums that end are counted by their own formula; `f - x f'` is the remainder of a tangent.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lineament.explain import attention, norms, products
from lineament.explain.linear import Epsilon, Linear, divide, times
from lineament.explain.products import NEAR_ZERO
from lineament.explain.tape import Tape

if TYPE_CHECKING:
    from lineament.explain.sweep import Step

_BY_SIZE = {"Add", "Sub", "Sum", "Mean", "Cumsum", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D"}
_FILLS = {"Rsub", "MaskedFill", "ConstantPadNd"}
_OFFSETS = {
    "Add", "Sub", "Cat", "Stack", "Where", "MaskedScatter", "IndexPut", "Scatter", "ScatterAdd", "IndexAdd",
    "SelectScatter", "SliceScatter", "Maximum", "Minimum", *_FILLS,
}  # fmt: skip


def arranging(s: "Step") -> None:
    """Views, choices and copies: every output is one input (or a constant), so relevance goes where it came from."""
    _constants(s)
    s.pass_on()


def summing(s: "Step") -> None:
    """Sums with constant weights: a share in proportion to the signed terms, which is rho for each."""
    product = s.sweep.plan.merged.get(s.index)
    if product is not None:  # a bias; the product below shares for both
        place = s.live()[0]
        s.sweep.folded[product] = (None, s.value(1 - place))
        s.send(place, rel=s.rel())
        return
    if s.rules.sums == "absolute" and s.name in _BY_SIZE:
        _absolute_sum(s)
        return
    s.messages = {k: type(m)(coef=s.coef(k)) for k, m in s.messages.items()}
    _constants(s)
    s.pass_on()


def _constants(s: "Step") -> None:
    """Count what constants received: their own part of the output, c rho, or R where they filled a place."""
    filled = -1 in [child for child, _ in s.edges] or s.name in _FILLS
    call = s.tape.calls[s.index]
    if not (s.counting and filled and s.name in _OFFSETS) or call is None:
        return
    message = s.messages.get(0)
    if message is None:
        return
    shapes = [s.shape(i) for i in s.tracked()]
    like = message.coef if message.coef is not None else message.rel
    assert like is not None
    offset = call.run([like.new_zeros(shape) for shape in shapes])[0].to(like.dtype)
    if message.coef is not None:
        s.absorb("constants", times(offset, message.coef))
    if message.rel is not None:
        same = offset == call.run([like.new_ones(shape) for shape in shapes])[0]
        s.absorb("constants", torch.where(same, message.rel, 0.0))


def _absolute_sum(s: "Step") -> None:
    """DynamicLRP's sums: shares |x|; averages over windows share evenly."""
    R = s.rel()
    if s.name in ("Sum", "Mean", "Cumsum"):
        x = s.value(0).abs()
        call = s.tape.calls[s.index]
        assert call is not None
        size = call.run([x])[0]
        found = s.vjp(divide(R, size, s.ledger))[0]
        assert found is not None
        s.send(0, rel=x * found)
    elif s.name in ("Add", "Sub"):
        alpha = abs(s.argument("alpha", 1))
        a, b = (torch.as_tensor(s.operand(i), device=R.device).to(R.dtype).abs() for i in (0, 1))
        t = divide(R, a + alpha * b, s.ledger)
        for position, size in ((0, a), (1, alpha * b)):
            if s.edges[position][0] < 0:
                s.absorb("constants", size * t)
            else:
                s.send(position, rel=size * t)
    else:  # a window's average shares evenly, whatever lies in it
        call = s.tape.calls[s.index]
        assert call is not None
        s.send(0, rel=s.vjp(divide(R, call.run([R.new_ones(s.shape(0))])[0], s.ledger))[0])


def cast(s: "Step") -> None:
    """Another dtype: all of R; what rounding takes of a wider value counts with the stabiliser's share."""
    coef = s.messages[0].coef
    types = [s.tape.nodes[i]._input_metadata[k].dtype for i, k in (s.edges[0], (s.index, 0))]
    if s.counting and coef is not None and types[0].is_floating_point and types[0].itemsize > types[1].itemsize:
        s.absorb("epsilon", times(s.result() - s.value(0), coef))
    arranging(s)


def negation(s: "Step") -> None:
    """Take -x: all of R."""
    message = s.messages[0]
    s.send(0, rel=message.rel, coef=None if message.coef is None else -message.coef)


def activation(s: "Step") -> None:
    """phi with phi(0) = 0: R passes whole, so rho becomes rho phi(x) / x (its slope near 0)."""
    message, coef = s.messages[0], None
    if s.rules.activation == "gradient":
        tangent(s)
        return
    if message.coef is not None:
        slope = s.vjp(message.coef)[0] if s.name in _PIECEWISE else None
        if slope is not None:  # phi(x) / x is the gradient
            coef = slope
        elif s.name == "Silu":
            coef = message.coef * s.value(0).sigmoid()
        elif s.name == "Gelu" and s.argument("approximate", "none") == "none":
            coef = message.coef * torch.special.ndtr(s.value(0))
        else:
            x, y = s.value(0), s.result()
            small = x.abs() < NEAR_ZERO
            coef = message.coef * y / torch.where(small, 1.0, x)
            if bool(small.any()):
                tangents = s.vjp(message.coef)[0]
                assert tangents is not None
                coef = torch.where(small, tangents, coef)
    s.send(0, rel=message.rel, coef=coef)


def power(s: "Step") -> None:
    """x^p: as an activation for p > 0, by its tangent otherwise."""
    p = s.argument("exponent")
    whole = isinstance(p, int | float) and p > 0
    (activation if whole else tangent)(s)


def tangent(s: "Step") -> None:
    """f with f(0) != 0, by its gradient; f(x) - x f'(x) is counted as what the tangent leaves."""
    if s.rules.activation == "identity-all" and len(s.live()) == 1 and s.shape(s.live()[0]) == s.result().shape:
        s.send(s.live()[0], rel=s.rel())
        return
    c = s.coef()
    found = s.vjp(c)
    for position in s.live():
        s.send(position, coef=found[position])
    if s.counting:
        slope = SLOPES.get(s.name)
        if slope is not None:
            x, y = s.value(0), s.result()
            s.absorb("remainder", torch.where(x.isfinite(), (y - x * slope(x, y)) * c, 0.0))
        else:
            s.absorb("remainder", s.result() * c)
            for position in s.tracked():
                g = found[position]
                if g is not None and position in s.live():
                    s.absorb("remainder", -s.value(position) * g)


def flat(s: "Step") -> None:
    """Rounding and signs have no slope: relevance ends."""
    s.absorb("stopped", s.rel())


def solve(s: "Step") -> None:
    """A^-1 B: all of R to B, the erasing matrix A a constant as a norm's scale is; or the gradient of both."""
    if s.rules.gate == "gradient":
        tangent(s)
        return
    names = ("upper", "left", "unitriangular")
    upper, left, unit = (s.argument(name, default) for name, default in zip(names, (False, True, False), strict=True))
    A, c = s.operand(0), s.coef()
    s.send(1, coef=torch.linalg.solve_triangular(A.mT, c, upper=not upper, left=left, unitriangular=unit))


def prelu(s: "Step") -> None:
    """Slopes of its own on the negative side: R passes whole."""
    x, weight = s.value(0), s.value(1)
    message = s.messages[0]
    shape = [1, -1, *[1] * (x.dim() - 2)] if weight.numel() > 1 and weight.dim() == 1 else weight.shape
    slope = torch.where(x > 0, 1.0, weight.reshape(shape))
    s.send(0, rel=message.rel, coef=None if message.coef is None else message.coef * slope)


def linear(s: "Step") -> None:
    """W x + b, or a product of two tracked tensors."""
    first, second = OPERANDS[s.name]
    live = [i for i in (first, second) if i in s.live()]
    if len(live) != 1:
        if live:
            attention.bilinear(s, first, second)
        if first == 1 and s.edges[0][0] >= 0:
            s.send(0, coef=s.coef() * s.argument("beta", 1))
        return
    rule, position = s.sweep.plan.linear_rule(s.index), live[0]
    if rule == Epsilon():
        c = s.coef()
        s.send(position, coef=_transposed(s, position, c))
        _send_bias(s, c)
        return
    found, R = _as_linear(s, position), s.rel()
    if first == 1 and 0 in s.live():  # a sum of two tracked terms: first the sum, then the product
        c = s.coef()
        s.send(0, coef=c * s.argument("beta", 1))
        found.z, found.bias = found.apply(found.x, found.weight), None
        R = times(found.z, c)
    s.send(position, rel=rule(found, R, s.ledger))


def _bias(s: "Step") -> Tensor | None:
    """Return the bias of a linear map as it is added to the output."""
    if s.name == "Convolution":
        b = s.operand(2)
        return None if b is None else b.view(-1, *[1] * (len(s.tape.shapes[s.index][0]) - 2))
    return s.operand(0) * s.argument("beta", 1) if s.name in ("Addmm", "Baddbmm") else None


def _send_bias(s: "Step", c: Tensor) -> None:
    if s.name in ("Addmm", "Baddbmm") and 0 in s.live():
        s.send(0, coef=c * s.argument("beta", 1))
    elif s.counting and (bias := _bias(s)) is not None:
        s.absorb("biases", bias * c)


def _weights(s: "Step", position: int) -> tuple[Tensor, Callable, Callable]:
    """Return the weight of a linear map, its product and its transpose."""
    first, second = OPERANDS[s.name]
    w = s.operand(second if position == first else first)
    if s.name == "Convolution":
        return w, *_convolution(s)
    if s.name == "GroupedMm":
        call, offsets = s.tape.calls[s.index], s.argument("offs")
        return w, lambda x, w: call.run([x, w])[0], lambda t, w: _grouped(t, w, offsets)
    alpha = s.argument("alpha", 1)
    w = w if alpha == 1 else w * alpha
    if position == first:
        return w, lambda x, w: x @ w, lambda t, w: t @ w.mT if w.dim() > 1 else t[..., None] * w
    return w, lambda x, w: w @ x, lambda t, w: w.mT @ t


def _grouped(t: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Rows of t in groups, each times its own transposed weight."""
    ends = offsets.tolist()
    rows = zip([0, *ends[:-1]], ends, w.mT, strict=True)
    return torch.cat([t[start:end] @ each for start, end, each in rows] + [t.new_zeros(len(t) - ends[-1], w.shape[1])])


def _convolution(s: "Step") -> tuple[Callable, Callable]:
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = [s.argument(name) for name in names]
    shape = s.shape(0)

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, w, None, *options)

    def back(t: Tensor, w: Tensor) -> Tensor:
        x = t.new_empty(1).expand(shape)
        return torch.ops.aten.convolution_backward(t, x, w, None, *options, [True, False, False])[0]

    return apply, back


def _transposed(s: "Step", position: int, c: Tensor) -> Tensor:
    w, _, back = _weights(s, position)
    return back(c, w)


def _as_linear(s: "Step", position: int) -> Linear:
    """The map with its bias, and with what is added or normalised after it folded in."""
    w, apply, back = _weights(s, position)
    bias, z = _bias(s), s.result()
    folded = s.sweep.folded.get(s.index)
    if folded is not None:
        w, bias, z = _folded(s, *folded, w, bias, z)
    return Linear(s.value(position), w, bias, z, apply, back)


def _folded(
    s: "Step", scale: Tensor | None, shift: Tensor, w: Tensor, bias: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold z * scale + shift into weight, bias and output."""
    along, shape = (-1,), (-1,)
    if s.name == "Convolution":
        along = (-1, *[1] * (z.dim() - 2))
        shape = (1, -1, *[1] * (w.dim() - 2)) if s.argument("transposed") else (-1, *[1] * (w.dim() - 1))
    shift = shift.view(along)
    if scale is None:
        return w, shift if bias is None else bias + shift, z + shift
    scaled = scale.view(along)
    return w * scale.view(shape), shift if bias is None else bias * scaled + shift, z * scaled + shift


def is_linear(tape: Tape, index: int) -> bool:
    """Say whether a node is a linear map of one tracked tensor."""
    if tape.names[index] not in OPERANDS or not tape.live[index]:
        return False
    first, second = OPERANDS[tape.names[index]]
    edges = tape.edges[index]
    live = [i for i in (first, second) if edges[i][0] >= 0 and tape.live[edges[i][0]]]
    return len(live) == 1


OPERANDS = {
    "Mm": (0, 1), "Bmm": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2), "Convolution": (0, 1), "GroupedMm": (0, 1),
    "Mv": (0, 1),
}  # fmt: skip
_PIECEWISE = {"Relu", "LeakyRelu", "Abs", "Threshold", "RreluWithNoise"}
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Exp": lambda x, y: y,
    "Exp2": lambda x, y: y * math.log(2),
    "Sigmoid": lambda x, y: y * (1 - y),
    "Cos": lambda x, y: -x.sin(),
    "Log": lambda x, y: 1 / x,
    "Rsqrt": lambda x, y: -0.5 * y**3,
    "Reciprocal": lambda x, y: -(y**2),
    "LogSigmoid": lambda x, y: torch.sigmoid(-x),
    "Relu": lambda x, y: (x > 0).to(x.dtype),
    "Tanh": lambda x, y: 1 - y**2,
}  # fmt: skip
"""Derivatives f'(x) from x and y, for the remainder."""


def _named(rule: Callable, names: str) -> dict[str, Callable]:
    return dict.fromkeys(names.split(), rule)


_ZERO_AT_ZERO = (
    "Relu LeakyRelu Gelu Silu Tanh Erf Abs Sqrt Elu Mish Hardswish Hardtanh Softshrink Hardshrink "
    "Threshold Sin Log1P Expm1 Asinh Atan"
)
ACTIVATIONS = (*_ZERO_AT_ZERO.split(), "Sigmoid", "Softplus", "Exp", "LogSigmoid", "Hardsigmoid", "Pow")
"""Unary functions that are not linear."""

OPERATORS: dict[str, Callable[["Step"], None]] = {
    **_named(
        arranging,
        "View UnsafeView Reshape ReshapeAlias Transpose T Permute Expand Repeat Slice Select Index "
        "IndexSelect Gather Cat Stack Split UnsafeSplit UnsafeSplitWithSizes SplitWithSizes Unbind Squeeze "
        "Unsqueeze Alias Clone ConstantPadNd Roll Flip MaskedFill Where AsStrided MaxPool2DWithIndices "
        "MaxPool3DWithIndices AdaptiveMaxPool2D Max Min Amax Amin Topk Sort Diagonal Tril Triu Unfold Im2Col "
        "UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D MaskedSelect MaskedScatter SelectScatter "
        "SliceScatter Maximum Minimum ReflectionPad1D ReflectionPad2D ReplicationPad1D ReplicationPad2D "
        "Cummax Median Kthvalue IndexPut Scatter Take NanToNum Movedim PixelShuffle PixelUnshuffle Embedding "
        "Detach",
    ),
    **_named(
        summing,
        "Add Sub Rsub Sum Mean Nansum AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D Cumsum Col2Im IndexAdd "
        "ScatterAdd UpsampleBilinear2D UpsampleBicubic2D UpsampleLinear1D UpsampleTrilinear3D UpsampleBilinear2DAa",
    ),
    **_named(products.product, "Mul Div"),
    **_named(activation, _ZERO_AT_ZERO),
    **_named(
        tangent,
        "Exp Exp2 Sigmoid Softplus LogSigmoid Cos Log Rsqrt Reciprocal Hardsigmoid Clamp ClampMin ClampMax Var Std "
        "LinalgVectorNorm Norm Prod Logsumexp Logaddexp LogSoftmax Erfc Log2",
    ),
    **_named(flat, "Round Floor Ceil Trunc Sign Sgn"),
    **_named(linear, " ".join(OPERANDS)),
    **_named(
        attention.fused,
        "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention "
        "ScaledDotProductCudnnAttention",
    ),
    **_named(attention.softmax, "Softmax SafeSoftmax"),
    "LinalgSolveTriangular": solve,
    "ToCopy": cast,
    "Neg": negation,
    "Pow": power,
    "PreluKernel": prelu,
    "Glu": products.glu,
    "Addcmul": products.addcmul,
    "NativeLayerNorm": norms.layer_norm,
    "NativeGroupNorm": norms.group_norm,
    "NativeBatchNorm": norms.batch_norm,
    "CudnnBatchNorm": norms.batch_norm,
    "FusedRmsNorm": norms.rms_norm,
}  # fmt: skip
"""Rules by node name."""
