"""What a single operator can't know of itself: unary islands, norm scales, attention patterns, folded neighbours."""

from lineament.explain.tape import Tape

ARRANGING = {
    "View", "UnsafeView", "Reshape", "ReshapeAlias", "Transpose", "T", "Permute", "Expand", "Squeeze", "Unsqueeze",
    "Alias", "Clone", "ToCopy", "Slice", "Select", "Detach",
}  # fmt: skip
_POINTWISE = {
    "Mul", "Div", "Add", "Sub", "Rsub", "Neg", "Pow", "Tanh", "Sigmoid", "Exp", "Erf", "Sqrt", "Rsqrt", "Reciprocal",
    "Abs", "Log", "Log1P", "Softplus", "Relu", "Clamp", "ClampMin", "ClampMax", "ToCopy", "Clone", "Alias", "Gelu",
    "Silu", "Hardtanh", "Hardsigmoid",
}  # fmt: skip
_MEASURES = {"Var", "Std", "LinalgVectorNorm", "Norm", "VarMean"}
_POWERS = {"Pow", "Mul", "Abs", "Square"}
_TO_A_SCALE = ARRANGING | {"Rsqrt", "Sqrt", "Reciprocal", "Add", "Pow", "Clamp", "ClampMin", "Mul", "Div"}
_SOFTMAXES = {"Softmax", "SafeSoftmax"}
_ACTIVATIONS = {"Gelu", "Silu", "Relu", "Tanh", "Sigmoid", "Hardswish", "Elu", "Mish", "LeakyRelu", "Softplus"}
LONGEST = 32  # nodes looked at before an island is given up


def island(tape: Tape, index: int) -> tuple[int, int] | None:
    """Return the one tensor that a product of tracked factors is a unary function of, if it is one.

    `x * sigmoid(x)` or a spelt-out GELU is a function of x alone, not a gate. The node nearest the root is replaced by
    its inputs as long as it is pointwise and keeps the shape; if one tensor is left, the product is phi(it).
    """
    shape = tape.shapes[index][0]
    frontier = set(tape.live_edges(index))
    for _ in range(LONGEST):
        if len(frontier) == 1:
            found = frontier.pop()
            return found if tape.shapes[found[0]][found[1]] == shape else None
        top = min(frontier)
        if tape.names[top[0]] not in _POINTWISE or tape.shapes[top[0]][0] != shape:
            return None
        frontier.remove(top)
        frontier.update(tape.live_edges(top[0]))
    return None


def is_scale(tape: Tape, index: int) -> bool:
    """Say whether a node is the scale of a norm: 1 / sqrt(mean x^2 + eps), a standard deviation, a length."""
    for _ in range(LONGEST):
        name, below = tape.names[index], tape.live_edges(index)
        if name in _MEASURES:
            return True
        if name in ("Mean", "Sum"):
            return bool(below) and tape.names[below[0][0]] in _POWERS
        if name not in _TO_A_SCALE or len(below) != 1:
            return False
        index = below[0][0]
    return False


def is_pattern(tape: Tape, index: int) -> bool:
    """Say whether a node is a softmax, perhaps seen through views, casts and masks."""
    return _leads_to(tape, index, _SOFTMAXES)


def is_activation(tape: Tape, index: int) -> bool:
    """Say whether a node is an activation, perhaps seen through views, or an island."""
    return _leads_to(tape, index, _ACTIVATIONS) or (tape.names[index] == "Mul" and island(tape, index) is not None)


def _leads_to(tape: Tape, index: int, wanted: set[str]) -> bool:
    for _ in range(LONGEST):
        if tape.names[index] in wanted:
            return True
        below = tape.live_edges(index)
        if tape.names[index] not in ARRANGING | {"MaskedFill", "NativeDropout"} or len(below) != 1:
            return False
        index = below[0][0]
    return False


def absorbed_by(tape: Tape, index: int) -> int | None:
    """Return the node that makes one linear map with this product: a bias added to it, or a batch norm after it."""
    at = index
    for _ in range(LONGEST):
        user = tape.only_user(at)
        if user is None:
            return None
        name = tape.names[user]
        if name in ("NativeBatchNorm", "CudnnBatchNorm"):
            return user if at == index else None
        if name == "Add":
            return user if _adds_a_bias(tape, user, at, index) else None
        if name not in ("View", "UnsafeView"):
            return None
        at = user
    return None


def _adds_a_bias(tape: Tape, user: int, at: int, index: int) -> bool:
    if tape.names[index] not in ("Mm", "Bmm"):
        return False
    others = [child for child, _ in tape.edges[user] if child != at]
    if len(others) != 1 or others[0] < 0 or tape.live[others[0]]:
        return False
    width = tape.shapes[user][0][-1:]
    return tape.shapes[others[0]][0] == width and tape.shapes[index][0][-1:] == width
