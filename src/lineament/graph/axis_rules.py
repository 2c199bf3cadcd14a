"""How each operator of ATen acts on axes: what it ties, what it cuts, what it keeps.

`RULES[name](walk, node, *args, **kwargs)` gets `Value` for tensors and plain numbers else, and returns a Value, Pieces,
or a tuple of these. An operator without a rule freezes what it touches, with its name as the reason. Elementwise
operators need no rule: they carry torch's tag `pointwise`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from lineament.graph.terms import Axis, fixed, flat, freeze, merge, regroup, size_of, slice_of, sum_of, wild
from lineament.graph.values import Pieces, Value, broadcast, unknown

if TYPE_CHECKING:
    from lineament.graph.axes import Walk

RULES: dict[str, Callable[..., Any]] = {}


def entering(
    table: dict[str, Callable[..., Any]],
) -> Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Return a decorator that enters a function into a table of rules, under names of operators."""

    def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def enter(function: Callable[..., Any]) -> Callable[..., Any]:
            table.update(dict.fromkeys(names, function))
            return function

        return enter

    return rule


rule = entering(RULES)


def shape(node: fx.Node, index: int | None = None) -> list[int]:
    """Return the sizes of a node's output."""
    value = node.meta["val"]
    value = value if index is None else value[index]
    return [int(size) for size in value.shape] if isinstance(value, Tensor) else []


@rule("contiguous", "clone", "to", "alias", "detach", "_to_copy", "dropout", "type_as", "lift_fresh", "lift_fresh_copy",
      "feature_dropout", "softmax", "log_softmax", "_softmax", "_log_softmax", "detach_copy", "positive",
      "resolve_conj", "resolve_neg", "data")  # fmt: skip
def same(walk: Walk, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    return x.with_dims(x.dims)


# linear maps


@rule("linear")
def linear(walk: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    walk.contract(x, [], x.dims[-1], weight.dims[-1], node)
    out = [*x.dims[:-1], *weight.dims[:-1]]
    if bias is not None and len(weight.dims) == 2:
        out[-1] = merge(out[-1], bias.dims[-1], node.name)
    return Value(out, x.hidden | weight.hidden)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(walk: Walk, node: fx.Node, x: Value, y: Value, out_dtype: Any = None) -> Value:
    left = x.dims if len(x.dims) > 1 else [(), *x.dims]
    right = y.dims if len(y.dims) > 1 else [*y.dims, ()]
    batch = broadcast([Value(left[:-2]), Value(right[:-2])], node.name).dims
    walk.contract(Value([], x.hidden | y.hidden), batch, left[-1], right[-2], node)
    out = [*batch, *([left[-2]] if len(x.dims) > 1 else []), *([right[-1]] if len(y.dims) > 1 else [])]
    return Value(out, x.hidden | y.hidden)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(walk: Walk, node: fx.Node, bias: Value, x: Value, y: Value, **options: Any) -> Value:
    return broadcast([bias, matmul(walk, node, x, y)], node.name)


@rule("einsum")
def einsum(walk: Walk, node: fx.Node, equation: str, operands: Sequence[Value], **options: Any) -> Value:
    given, wanted = letters_of(equation, [len(value.dims) for value in operands])
    axes: dict[str | int, Axis] = {}
    for letters, value in zip(given, operands, strict=True):
        for letter, axis in zip(letters, value.dims, strict=True):
            axes[letter] = (
                merge(axes[letter], axis, node.name) if axes.get(letter) and axis else axes.get(letter) or axis
            )
    hidden = frozenset().union(*(value.hidden for value in operands))
    everywhere = [c for c in axes if all(c in letters for letters in given)]
    walk.saw(Value([axes[c] for c in everywhere], hidden))
    for c in set(axes) - set(wanted):
        walk.saw(Value([*(axes[d] for d in wanted if d in everywhere), axes[c]], hidden))
    return Value([axes[c] for c in wanted], hidden)


def letters_of(equation: str, ranks: Sequence[int]) -> tuple[list[list[str | int]], list[str | int]]:
    """Return the letters of an equation's operands and of its output; an ellipsis is numbers, 1 at its right end."""
    terms, arrow, wanted = equation.replace(" ", "").partition("->")
    given = [_spelled(term, rank) for term, rank in zip(terms.split(","), ranks, strict=True)]
    every = [c for letters in given for c in letters]
    most = max((c for c in every if isinstance(c, int)), default=0)
    if arrow:
        return given, _spelled(wanted, len(wanted.replace("...", "")) + most)
    once = sorted(c for c in set(every) if isinstance(c, str) and every.count(c) == 1)
    return given, [*range(most, 0, -1), *once]


def _spelled(term: str, rank: int) -> list[str | int]:
    before, dots, after = term.partition("...")
    return [*before, *(range(rank - len(before) - len(after), 0, -1) if dots else ()), *after]


@rule("linalg_solve_triangular")
def solve_triangular(walk: Walk, node: fx.Node, system: Value, right: Value, **options: Any) -> Value:
    for axis in system.dims[-2:]:
        freeze(axis, node.name)
    freeze(right.dims[-2], node.name)
    batch = broadcast([Value(system.dims[:-2]), Value(right.dims[:-2])], node.name).dims
    return Value([*batch, *right.dims[-2:]], system.hidden | right.hidden)


@rule("conv1d", "conv2d", "conv3d")
def conv(walk: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1,
         padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Value:  # fmt: skip
    return _conv(walk, node, x, weight, bias, groups, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(walk: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1,
                   padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Value:  # fmt: skip
    return _conv(walk, node, x, weight, bias, groups, transposed=True)


def _conv(
    walk: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None, groups: int, *, transposed: bool
) -> Value:
    sizes = shape(node)
    batched = len(x.dims) == len(weight.dims)
    channels, spatial = x.dims[int(batched)], weight.dims[2:]
    for axis in (*x.dims[int(batched) + 1 :], *spatial):
        freeze(axis, f"{node.name}: positions of a convolution")
    rows, columns = weight.dims[0], weight.dims[1]
    per = size_of(channels) // groups
    split_x = regroup(channels, [groups, per])
    split_w = regroup(rows, [groups, size_of(rows) // groups])
    if split_x is None or split_w is None:
        return walk.opaque(node, [v for v in (x, weight, bias) if v is not None])
    group = merge(split_x[0], split_w[0], node.name)
    walk.contract(Value([], x.hidden), [group], split_x[1], split_w[1] if transposed else columns, node)
    out = (*group, *(columns if transposed else split_w[1]))
    if bias is not None:
        out = merge(out, bias.dims[0], node.name)
    fixed_dims = [fixed(size, f"{node.name}: positions") for size in sizes[int(batched) + 1 :]]
    return Value([*x.dims[: int(batched)], out, *fixed_dims], x.hidden)


@rule("embedding")
def embedding(walk: Walk, node: fx.Node, weight: Value, index: Value, *rest: Any, **options: Any) -> Value:
    return _taken(walk, node, weight, 0, index, index.dims)


# attention and recurrence


@rule("scaled_dot_product_attention")
def attention(walk: Walk, node: fx.Node, q: Value, k: Value, v: Value, mask: Value | None = None, dropout: float = 0.0,
              causal: bool = False, scale: Any = None, enable_gqa: bool = False) -> Value:  # fmt: skip
    if causal:
        freeze(q.dims[-2], f"{node.name}: causal order")
        freeze(k.dims[-2], f"{node.name}: causal order")
    keys, values = k.dims[:-2], v.dims[:-2]
    if enable_gqa and size_of(q.dims[-3]) != size_of(k.dims[-3]):
        repeat = size_of(q.dims[-3]) // size_of(k.dims[-3])
        keys, values = ([*dims[:-1], (*dims[-1], *wild(repeat))] for dims in (keys, values))
    batch = broadcast([Value(q.dims[:-2]), Value(list(keys)), Value(list(values))], node.name).dims
    walk.contract(q, batch, q.dims[-1], k.dims[-1], node)
    tokens = merge(k.dims[-2], v.dims[-2], node.name)
    walk.saw(Value([*batch, tokens]))
    if mask is not None:
        broadcast([Value([*batch, q.dims[-2], tokens]), mask], node.name)
    return Value([*batch, q.dims[-2], v.dims[-1]], q.hidden | k.hidden | v.hidden)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(walk: Walk, node: fx.Node, x: Value, state: Any, params: Sequence[Value], biases: bool, layers: int,
              dropout: float, train: bool, bidirectional: bool, batch_first: bool = False) -> Any:  # fmt: skip
    if not isinstance(x, Value) or not isinstance(params, list | tuple):
        return walk.opaque(node, [x])
    gates = {"lstm": 4, "gru": 3}.get(walk.name(node), 1)
    directions = 2 if bidirectional else 1
    per = len(params) // (layers * directions)
    states = list(state) if isinstance(state, list | tuple) else [state]
    inward, ends = x.dims[-1], ([], [])
    for layer in range(layers):
        outward: list[Axis] = []
        for way in range(directions):
            own = params[(layer * directions + way) * per :][:per]
            hidden, cell = _cell(walk, node, inward, own, gates, projected=per == (5 if biases else 3))
            for each, axis, end in zip(states, (hidden, cell), ends, strict=False):
                merge(axis, each.dims[-1], node.name)
                end.append(Value([(), *x.dims[:-2][:0], *each.dims[1:-1], axis]))
            outward.append(hidden)
        inward = sum_of(outward)
    out = Value([*x.dims[:-1], inward], x.hidden)
    for axis in x.dims[:-1]:
        freeze(axis, f"{node.name}: order of a recurrence")
    return (out, *(Pieces(0, end) for end in ends[: len(states)]))


def _cell(walk: Walk, node: fx.Node, inward: Axis, own: Sequence[Value], gates: int, projected: bool) -> Any:
    """Tie one layer's weights: all gates lie on one hidden axis."""
    w_in, w_hidden = own[:2]
    walk.contract(Value([]), [], inward, w_in.dims[1], node)
    rows = [value.dims[0] for value in own[: len(own) - int(projected)]]
    width = size_of(rows[0]) // gates
    cell = slice_of(rows[0], 0, width)
    for axis in rows:
        for gate in range(gates):
            cell = merge(cell, slice_of(axis, gate * width, (gate + 1) * width), node.name)
    hidden = own[-1].dims[0] if projected else cell
    if projected:
        walk.contract(Value([]), [], cell, own[-1].dims[1], node)
    walk.contract(Value([]), [], hidden, w_hidden.dims[1], node)
    walk.saw(Value([cell]))
    walk.saw(Value([hidden]))
    return hidden, cell


# norms and pooling


@rule("layer_norm", "rms_norm", "native_layer_norm", "fused_rms_norm")
def norm(walk: Walk, node: fx.Node, x: Value, sizes: Sequence[int], *rest: Any) -> Value:
    return broadcast([x, *(value for value in rest if isinstance(value, Value))], node.name)


@rule("batch_norm", "instance_norm")
def batch_norm(walk: Walk, node: fx.Node, x: Value, *rest: Any) -> Value:
    channels = x.dims[1]
    for value in rest[:4]:
        if isinstance(value, Value):
            channels = merge(channels, value.dims[0], node.name)
    return Value([x.dims[0], channels, *x.dims[2:]], x.hidden)


@rule("group_norm")
def group_norm(walk: Walk, node: fx.Node, x: Value, groups: int, *rest: Any) -> Value:
    split = regroup(x.dims[1], [groups, size_of(x.dims[1]) // groups])
    if split is None:
        return walk.opaque(node, [x, *(value for value in rest if isinstance(value, Value))])
    return batch_norm(walk, node, Value([x.dims[0], (*split[0], *split[1]), *x.dims[2:]], x.hidden), *rest[:2])


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "upsample_linear1d")  # fmt: skip
def pool(walk: Walk, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    kept = {"1d": 1, "2d": 2, "3d": 3}[walk.name(node)[-2:]]
    for axis in x.dims[-kept:]:
        freeze(axis, f"{node.name}: positions")
    return Value([*x.dims[:-kept], *(fixed(n, f"{node.name}: positions") for n in shape(node)[-kept:])], x.hidden)


@rule("pixel_shuffle")
def pixel_shuffle(walk: Walk, node: fx.Node, x: Value, r: int) -> Value:
    sizes = shape(node)
    split = regroup(x.dims[-3], [sizes[-3], r, r])
    if split is None:
        return walk.opaque(node, [x])
    for axis in (*split[1:], *x.dims[-2:]):
        freeze(axis, f"{node.name}: positions")
    return Value([*x.dims[:-3], split[0], *(fixed(n, f"{node.name}: positions") for n in sizes[-2:])], x.hidden)


@rule("pixel_unshuffle")
def pixel_unshuffle(walk: Walk, node: fx.Node, x: Value, r: int) -> Value:
    why, sizes = f"{node.name}: positions", shape(node)
    for axis in x.dims[-2:]:
        freeze(axis, why)
    merged = (*x.dims[-3], *fixed(r, why), *fixed(r, why))
    return Value([*x.dims[:-3], merged, *(fixed(n, why) for n in sizes[-2:])], x.hidden)


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod", "all", "any")
def reduce(walk: Walk, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    name, given = walk.name(node), list(rest)
    if name in ("linalg_vector_norm", "norm"):
        given = given[1:]
    dims = options.get("dim", given[0] if given else None)
    if isinstance(dims, bool) or dims is None:
        dims = range(len(x.dims))
    dims = {d % max(1, len(x.dims)) for d in ([dims] if isinstance(dims, int) else dims)}
    if not dims:
        dims = set(range(len(x.dims)))
    keep = len(shape(node)) == len(x.dims)
    out = [() if i in dims else axis for i, axis in enumerate(x.dims) if keep or i not in dims]
    return Value(out, x.hidden)


@rule("max", "min")
def extreme(walk: Walk, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Any:
    if rest and isinstance(rest[0], Value):
        return broadcast([x, rest[0]], node.name)
    if not rest and "dim" not in options:
        return Value([])
    return _ranked(walk, node, x, options.get("dim", rest[0] if rest else -1))


@rule("topk", "sort", "argsort", "argmax", "argmin")
def ranked(walk: Walk, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Any:
    at = 1 if walk.name(node) == "topk" else 0
    return _ranked(walk, node, x, options.get("dim", rest[at] if len(rest) > at else -1))


def _ranked(walk: Walk, node: fx.Node, x: Value, dim: Any) -> Any:
    """Rank positions of an axis: values lie along ranks, indices name positions of the axis."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        return walk.opaque(node, [x])
    several = isinstance(node.meta["val"], list | tuple)
    sizes = shape(node, 0) if several else shape(node)
    dim %= len(x.dims)
    keep = len(sizes) == len(x.dims)
    rank = fixed(sizes[dim] if keep else 1, f"{node.name}: ranks")
    dims = [rank if i == dim else axis for i, axis in enumerate(x.dims) if keep or i != dim]
    chosen = Value(dims, x.hidden | frozenset(flat(x.dims[dim])), x.dims[dim])
    return (Value(list(dims), x.hidden), chosen) if several else chosen


@rule("cumsum", "cumprod", "logcumsumexp", "flip", "roll", "diff", "cummax")
def ordered(walk: Walk, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Any:
    if walk.name(node) in ("cummax",):
        return walk.opaque(node, [x])
    dims = options.get("dim", rest[-1] if rest else -1)
    dims = [dims] if isinstance(dims, int) else dims
    chosen = {d % len(x.dims) for d in dims} if walk.name(node) != "diff" else set(range(len(x.dims)))
    why = f"{node.name}: the order along an axis counts"
    sizes = shape(node)
    out = []
    for i, axis in enumerate(x.dims):
        if i in chosen:
            freeze(axis, why)
            out.append(fixed(sizes[i], why))
        else:
            out.append(axis)
    return Value(out, x.hidden)


@rule("tril", "triu")
def triangle(walk: Walk, node: fx.Node, x: Value, *rest: Any) -> Value:
    for axis in x.dims[-2:]:
        freeze(axis, f"{node.name}: order")
    return Value([*x.dims[:-2], *(fixed(size_of(axis), f"{node.name}: order") for axis in x.dims[-2:])], x.hidden)


@rule("glu")
def glu(walk: Walk, node: fx.Node, x: Value, dim: int = -1) -> Value:
    half = size_of(x.dims[dim]) // 2
    parts = [slice_of(x.dims[dim], 0, half), slice_of(x.dims[dim], half, 2 * half)]
    out = list(x.dims)
    out[dim] = merge(parts[0], parts[1], node.name)
    return Value(out, x.hidden)


@rule("prelu", "_prelu_kernel")
def prelu(walk: Walk, node: fx.Node, x: Value, weight: Value) -> Value:
    if len(weight.dims) == len(x.dims):
        return broadcast([x, weight], node.name)
    out = list(x.dims)
    if size_of(weight.dims[0]) > 1:
        out[1] = merge(out[1], weight.dims[0], node.name)
    return Value(out, x.hidden)


# choice by index


def _taken(walk: Walk, node: fx.Node, x: Value, dim: int, index: Value, where: Sequence[Axis]) -> Value:
    """Take positions of one axis: they follow their class where the index is a choice among it."""
    hidden = x.hidden | index.hidden
    if index.choice is not None:
        merge(x.dims[dim], index.choice, node.name)
    else:
        freeze(x.dims[dim], f"{node.name}: positions taken by number")
    return Value([*x.dims[:dim], *where, *x.dims[dim + 1 :]], hidden)


@rule("index_select")
def index_select(walk: Walk, node: fx.Node, x: Value, dim: int, index: Value) -> Value:
    return _taken(walk, node, x, dim % len(x.dims), index, index.dims)


@rule("gather", "take_along_dim")
def gather(walk: Walk, node: fx.Node, x: Value, dim: int, index: Value, **options: Any) -> Value:
    dim %= len(x.dims)
    sizes = shape(node)
    others = [axis for i, axis in enumerate(x.dims) if i != dim]
    rest = [axis for i, axis in enumerate(index.dims) if i != dim]
    tied = []
    for a, b in zip(others, rest, strict=True):
        if size_of(a) == size_of(b):
            tied.append(merge(a, b, node.name) if a else ())
        else:
            freeze(a, node.name)
            tied.append(b)
    out = _taken(walk, node, Value([x.dims[dim]], x.hidden), 0, index, [])
    dims = [*tied[:dim], index.dims[dim] if size_of(index.dims[dim]) == sizes[dim] else (), *tied[dim:]]
    return Value(dims, out.hidden)


@rule("index")
def index(walk: Walk, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> Value:
    used = [(i, value) for i, value in enumerate(indices) if value is not None]
    sizes = shape(node)
    if any("bool" in str(n.meta["val"].dtype) for n in node.args[1] if n is not None):  # pyright: ignore[reportOptionalIterable, reportGeneralTypeIssues]
        return walk.opaque(node, [x, *(value for _, value in used)])
    where = broadcast([value for _, value in used], node.name).dims
    hidden = x.hidden
    for i, value in used:
        hidden |= _taken(walk, node, Value([x.dims[i]]), 0, value, []).hidden
    at = [i for i, _ in used]
    adjacent = at == list(range(at[0], at[0] + len(at)))
    rest = [axis for i, axis in enumerate(x.dims) if i not in at]
    first = at[0] if adjacent else 0
    out = Value([*rest[:first], *where, *rest[first:]], hidden)
    return out if len(out.dims) == len(sizes) else walk.opaque(node, [x, out])


@rule("one_hot")
def one_hot(walk: Walk, node: fx.Node, index: Value, classes: int = -1) -> Value:
    if index.choice is None:
        return unknown(shape(node), f"{node.name}: numbers")
    return Value([*index.dims, index.choice], index.hidden)


@rule("scatter", "scatter_add")
def scatter(walk: Walk, node: fx.Node, x: Value, dim: int, index: Value, source: Any, **options: Any) -> Value:
    dim %= len(x.dims)
    if index.choice is None:
        return walk.opaque(node, [x, index, source])
    dims = list(x.dims)
    dims[dim] = merge(x.dims[dim], index.choice, node.name)
    others = [index] + ([source] if isinstance(source, Value) else [])
    for i in range(len(dims)):
        for value in others:
            if i != dim and size_of(value.dims[i]) == size_of(dims[i]):
                dims[i] = merge(dims[i], value.dims[i], node.name)
    return Value(dims, x.hidden)
