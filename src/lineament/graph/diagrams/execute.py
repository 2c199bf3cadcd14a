"""What each kind of operator means, in terms of labelled axes: running a term is the proof that it is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament._base.errors import InputError
from lineament.graph.diagrams.term import OPAQUE, Data, Op, Repeat, Term


def execute(
    term: Term, weights: Mapping[str, Tensor], inputs: Sequence[Tensor], *, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Run a term on weights and inputs of the traced shapes.

    Args:
        term: what to run. weights: the model's parameters by name. inputs: tensors, as in the traced call.
        dtype: of all arithmetic on real numbers; casts of the model from one such dtype to another are no part of a
            term.

    Returns:
        The tensors of the model's output.

    Raises:
        InputError: a weight is missing, or an input has another shape.
    """
    held: dict[int, Tensor] = {}
    if len(inputs) != len(term.inputs):
        raise InputError(f"{len(inputs)} tensors were given; the term takes {len(term.inputs)}")
    for number, tensor in zip(term.inputs, inputs, strict=True):
        held[number] = _shaped(term, number, tensor, dtype)
    last = {port.value: i for i, op in enumerate(term.ops) for port in op.inputs}
    kept = {result.value for result in term.results}

    def value(number: int) -> Tensor:
        data = term.values[number]
        if number in held:
            return held[number]
        if data.origin == "constant":
            return _real(term.constants[number], dtype)
        if data.name not in weights:
            raise InputError(f"the weights lack {data.name}")
        return _shaped(term, number, _cut(weights[data.name], data), dtype)

    for i, op in enumerate(term.ops):
        given = [value(port.value) for port in op.inputs]
        found = MEANING[op.kind](term, op, given)
        for port, tensor in zip(op.outputs, found if isinstance(found, tuple) else (found,), strict=True):
            held[port.value] = tensor
        for port in op.inputs:
            if last[port.value] == i and port.value not in kept:
                held.pop(port.value, None)
    return [_assembled(value(result.value), result.dims) for result in term.results]


def _real(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _cut(tensor: Tensor, data: Data) -> Tensor:
    for dim, start, stop in data.cuts:
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def _shaped(term: Term, number: int, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    sizes, data, at, shape = term.sizes(number), term.values[number], 0, []
    for count in data.dims:
        shape.append(math.prod(sizes[at : at + count]))
        at += count
    if tuple(tensor.shape) != tuple(shape):
        raise InputError(f"{data.name} is {list(tensor.shape)}; the term was made for {shape}")
    return _real(tensor.detach().reshape(sizes), dtype)


def _assembled(tensor: Tensor, dims: Sequence[Sequence[int | Repeat]]) -> Tensor:
    """Put a value's axes into the model's dimensions."""
    order = [slot for dim in dims for slot in dim if isinstance(slot, int)]
    tensor = tensor.permute(order)
    for at, slot in enumerate(slot for dim in dims for slot in dim):
        if isinstance(slot, Repeat):
            tensor = tensor.unsqueeze(at)
    sizes = [slot.size if isinstance(slot, Repeat) else -1 for dim in dims for slot in dim]
    tensor = tensor.expand(sizes)
    at, shape = 0, []
    for dim in dims:
        shape.append(math.prod(tensor.shape[at : at + len(dim)]))
        at += len(dim)
    return tensor.reshape(shape)


def aligned(tensor: Tensor, labels: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Permute a tensor's axes into the order of `wanted`, with size 1 for labels it lacks; others have size 1."""
    for at in reversed(range(len(labels))):
        if labels[at] not in wanted:
            tensor = tensor.squeeze(at)
    labels = [label for label in labels if label in wanted]
    present = [label for label in wanted if label in labels]
    tensor = tensor.permute([labels.index(label) for label in present])
    for at, label in enumerate(wanted):
        if label not in labels:
            tensor = tensor.unsqueeze(at)
    return tensor


def _out(op: Op) -> tuple[int, ...]:
    return op.outputs[0].labels


def _operands(op: Op, given: Sequence[Tensor]) -> list[Tensor]:
    return [aligned(x, port.labels, _out(op)) for x, port in zip(given, op.inputs, strict=True)]


def _einsum(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """Shared labels are multiplied, labels without an output are summed over; a last operand may be added."""
    factors = len(given) - bool(op.attrs.get("bias"))
    ids = {label: i for i, label in enumerate(dict.fromkeys(x for port in op.inputs for x in port.labels))}
    pairs: list[Any] = []
    for tensor, port in zip(given[:factors], op.inputs, strict=False):
        pairs += [tensor, [ids[label] for label in port.labels]]
    have = {label for port in op.inputs[:factors] for label in port.labels}
    out = torch.einsum(*pairs, [ids[label] for label in _out(op) if label in have])
    if have >= set(_out(op)) and factors == len(given):
        return out
    out = aligned(out, [label for label in _out(op) if label in have], _out(op))
    return out + aligned(given[-1], op.inputs[-1].labels, _out(op)) if factors < len(given) else out


def _map(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """An elementwise function of its operands; `args` has an operand's number or a plain value at each place."""
    tensors = _operands(op, given)
    args = [tensors[each["at"]] if isinstance(each, dict) else each for each in op.attrs["args"]]
    out = elementwise(op.attrs["fn"])(*args, **op.attrs.get("options", {}))
    sizes = term.sizes(op.outputs[0].value)
    return out if tuple(out.shape) == sizes else out.expand(sizes)


def elementwise(name: str) -> Callable[..., Tensor]:
    """Return the function of an operator's name with overload."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _places(labels: Sequence[int], wanted: Sequence[int]) -> list[int]:
    return [labels.index(label) for label in wanted]


def _same(op: Op, x: Tensor) -> Tensor:
    return x.permute(_places(op.inputs[0].labels, _out(op)))


def _softmax(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    x, over = _same(op, given[0]), _places(_out(op), op.attrs["over"])
    total = x.logsumexp(over, keepdim=True)
    return x - total if op.attrs["log"] else (x - total).exp()


def _mask(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    x, keep = _operands(op, given)
    return x.masked_fill(~keep, op.attrs["fill"])


def _scale(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    return _same(op, given[0]) * op.attrs["by"]


def _add(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    first, *rest = _operands(op, given)
    for x in rest:
        first = first + x
    return first.expand(term.sizes(op.outputs[0].value))


def _norm(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """Centre (unless RMS) and scale over some axes; then gain and bias where there are any."""
    x, *rest = _operands(op, given)
    over = _places(_out(op), op.attrs["over"])
    if op.attrs["center"]:
        x = x - x.mean(over, keepdim=True)
    x = x * (x.square().mean(over, keepdim=True) + op.attrs["eps"]).rsqrt()
    for name, each in zip(op.attrs["then"], rest, strict=True):
        x = x * each if name == "gain" else x + each
    return x


def _batch_norm(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """The affine map per channel that batch normalisation is after training."""
    x, mean, var, *rest = _operands(op, given)
    x = (x - mean) * (var + op.attrs["eps"]).rsqrt()
    for name, each in zip(op.attrs["then"], rest, strict=True):
        x = x * each if name == "gain" else x + each
    return x


def _rotary(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """Turn pairs (i, i + half) of positions along an axis: x cos + turned(x) sin."""
    x, cos, sin = _operands(op, given)
    at = _out(op).index(op.attrs["label"])
    a, b = x.chunk(2, at)
    return x * cos + torch.cat([-b, a], at) * sin


def _reshape(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """Split one axis or join several."""
    return given[0].permute(op.attrs["order"]).reshape(term.sizes(op.outputs[0].value))


def _slice(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    at = op.inputs[0].labels.index(op.attrs["label"])
    step = op.attrs.get("step", 1)
    index = torch.arange(op.attrs["start"], op.attrs["stop"], step, device=given[0].device)
    return given[0].index_select(at, index).reshape(term.sizes(op.outputs[0].value))


def _cat(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    fresh = op.attrs["joined"]
    out, sizes = _out(op), list(term.sizes(op.outputs[0].value))
    parts = []
    for x, port, label in zip(given, op.inputs, op.attrs["over"], strict=True):
        x = aligned(x, [fresh if each == label else each for each in port.labels], out)
        parts.append(x.expand([x.shape[i] if each == fresh else sizes[i] for i, each in enumerate(out)]))
    return torch.cat(parts, out.index(fresh))


def _pad(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    x = given[0]
    widths = [0, 0] * x.dim()
    for label, (left, right) in zip(op.attrs["over"], op.attrs["widths"], strict=True):
        at = 2 * (x.dim() - 1 - op.inputs[0].labels.index(label))
        widths[at : at + 2] = [left, right]
    return F.pad(x, widths, value=op.attrs["value"])


def _reduce(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    x, fn, options = given[0], op.attrs["fn"], op.attrs.get("options", {})
    over = _places(op.inputs[0].labels, op.attrs["over"])
    kept = [label for label in op.inputs[0].labels if label not in op.attrs["over"]]
    if fn == "prod":
        found = x.movedim(over, list(range(-len(over), 0))).flatten(-len(over)).prod(-1)
    elif fn in ("norm", "linalg_vector_norm"):
        found = torch.linalg.vector_norm(x, options.get("ord", 2), over)
    else:
        found = getattr(torch, fn)(x, dim=over, **options)
    return aligned(found, kept, _out(op))


def _scan(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """A running sum or the like, or a reversal, along one axis."""
    x = _same(op, given[0])
    at, fn = _out(op).index(op.attrs["label"]), op.attrs["fn"]
    if fn == "flip":
        return x.flip(at)
    return torch.roll(x, op.attrs["shift"], at) if fn == "roll" else getattr(torch, fn)(x, at)


def _window(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """The star: read an axis through windows; a place becomes (new place, place in the window)."""
    x, attrs = given[0], op.attrs
    labels = list(op.inputs[0].labels)
    for i, label in enumerate(attrs["over"]):
        at = labels.index(label)
        size, stride, dilation, (left, right) = (attrs[key][i] for key in ("size", "stride", "dilation", "padding"))
        widths = [0, 0] * x.dim()
        widths[2 * (x.dim() - 1 - at) : 2 * (x.dim() - at)] = [left, right]
        x = F.pad(x, widths, value=attrs["fill"])
        count = (x.shape[at] - dilation * (size - 1) - 1) // stride + 1
        index = torch.arange(count)[:, None] * stride + torch.arange(size)[None] * dilation
        x = x.index_select(at, index.flatten().to(x.device)).unflatten(at, (count, size))
        labels[at : at + 1] = [attrs["spatial"][i], attrs["windows"][i]]
    squeezed = [i for i, label in enumerate(labels) if label not in _out(op)]
    for i in reversed(squeezed):  # axes of size 1 are no axes of the term
        x = x.squeeze(i)
        labels.pop(i)
    return x.permute(_places(labels, _out(op)))


def _spread(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """The star mirrored: (place, place in the window) is added into the new places, as in transposed convolutions."""
    x, attrs = given[0], op.attrs
    labels = list(op.inputs[0].labels)
    for i, label in enumerate(attrs["over"]):
        for each in (attrs["windows"][i], label):
            if each not in labels:
                x, labels = x.unsqueeze(-1), [*labels, each]
        x = x.movedim([labels.index(label), labels.index(attrs["windows"][i])], [-2, -1])
        labels = [each for each in labels if each not in (label, attrs["windows"][i])]
        stride, dilation, (left, _), length = (attrs[key][i] for key in ("stride", "dilation", "padding", "length"))
        count, size = x.shape[-2:]
        to = (torch.arange(count)[:, None] * stride + torch.arange(size)[None] * dilation - left).flatten()
        inside = ((to >= 0) & (to < length)).nonzero().flatten()
        out = x.new_zeros(*x.shape[:-2], length)
        x = out.index_add(-1, to[inside].to(x.device), x.flatten(-2)[..., inside.to(x.device)])
        labels.append(attrs["spatial"][i])
    return x.reshape([s for s, label in zip(x.shape, labels, strict=True) if label in _out(op)]).permute(
        _places([label for label in labels if label in _out(op)], _out(op))
    )


def _take(term: Term, op: Op, given: list[Tensor]) -> Tensor:
    """Positions of some axes by number: tables, gathering, advanced indexing. Index operands come after the table."""
    table, *index = given
    over, shared = op.attrs["over"], op.attrs["shared"]
    where = list(dict.fromkeys(label for port in op.inputs[1:] for label in port.labels))
    indices: list[Any] = []
    for label in op.inputs[0].labels:
        if label in over:
            i = over.index(label)
            indices.append(aligned(index[i], op.inputs[1 + i].labels, where))
        elif label in shared:
            place = torch.arange(table.shape[op.inputs[0].labels.index(label)], device=table.device)
            indices.append(aligned(place, [label], where))
        else:
            indices.append(slice(None))
    rest = [label for label in op.inputs[0].labels if label not in over and label not in shared]
    order = [i for i, each in enumerate(indices) if isinstance(each, Tensor)]
    order += [i for i, each in enumerate(indices) if not isinstance(each, Tensor)]
    found = table.permute(order)[tuple(indices[i] for i in order if isinstance(indices[i], Tensor))]
    return found.permute(_places([*where, *rest], _out(op)))


def _opaque(term: Term, op: Op, given: list[Tensor]) -> Any:
    """Call the operator itself on tensors in the model's own dimensions."""
    tensors = [_assembled(x, dims) for x, dims in zip(given, op.attrs["dims"], strict=True)]

    def filled(each: Any) -> Any:
        if isinstance(each, dict) and "at" in each:
            return tensors[each["at"]]
        return [filled(x) for x in each] if isinstance(each, list | tuple) else each

    options = {key: filled(each) for key, each in op.attrs["options"].items()}
    found = elementwise(op.attrs["fn"])(*filled(op.attrs["args"]), **options)
    found = [x for x in (found if isinstance(found, list | tuple) else (found,)) if isinstance(x, Tensor)]
    return tuple(x.reshape(term.sizes(port.value)) for x, port in zip(found, op.outputs, strict=True))


MEANING: dict[str, Callable[[Term, Op, list[Tensor]], Any]] = {
    "einsum": _einsum, "map": _map, "scale": _scale, "add": _add, "softmax": _softmax, "mask": _mask, "norm": _norm,
    "batch norm": _batch_norm, "rotary": _rotary, "reshape": _reshape, "slice": _slice, "cat": _cat, "pad": _pad,
    "reduce": _reduce, "scan": _scan, "window": _window, "spread": _spread, "take": _take, OPAQUE: _opaque,
}  # fmt: skip
"""Kind -> what it computes from the operands' tensors."""
