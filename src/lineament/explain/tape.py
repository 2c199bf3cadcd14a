"""The autograd graph as a list in topological order, and the values of its tensors, saved or computed again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lineament._base.errors import InputError
from lineament.explain.recording import Call, Recording, plain_name

LEAF = "AccumulateGrad"
SAVED_INPUTS = {  # per node: the field that holds the input of each edge, where autograd keeps it
    "Mm": ("self", "mat2"), "Bmm": ("self", "mat2"), "Addmm": (None, "mat1", "mat2"), "Mul": ("self", "other"),
    "Baddbmm": (None, "batch1", "batch2"), "Div": ("self", "other"), "Convolution": ("input", "weight"),
    "NativeLayerNorm": ("input", "weight"), "NativeGroupNorm": ("input", "weight"),
    "NativeBatchNorm": ("input", "weight"), "CudnnBatchNorm": ("input", "weight"), "FusedRmsNorm": ("input", "weight"),
}  # fmt: skip
_ATTENTION = ("query", "key", "value")
_RESULTS = ("_saved_result", "_saved_output")
_REFUSED = {
    "CopySlices": "a slice of a tensor was written in place; build the tensor with torch.cat or torch.where instead",
    "CompiledFunction": "the model is compiled, one opaque node; explain the model from before torch.compile",
    "CheckpointFunction": "reentrant checkpointing hides the graph; pass use_reentrant=False to torch.utils.checkpoint",
    "MkldnnRnnLayer": "a fused recurrent layer is one opaque node; use torch.backends.mkldnn.flags(enabled=False)",
    "CudnnRnn": "a fused recurrent layer is one opaque node; explain the model on the CPU",
    "ThnnFusedLstmCell": "a fused recurrent layer is one opaque node; explain the model on the CPU",
    "ThnnFusedGruCell": "a fused recurrent layer is one opaque node; explain the model on the CPU",
}


@dataclass
class Promises:
    """Values that no node had saved: who asked for one, and how far down they were found."""

    nodes: int = 0
    asked: set[int] = field(default_factory=set)
    computed: int = 0
    deepest: int = 0

    @property
    def density(self) -> float:
        """Share of the graph's nodes that needed a promise."""
        return len(self.asked) / max(1, self.nodes)


@dataclass
class Tape:
    """Nodes from the root down; index 0 is the root. A node is dropped from the list when it is done with."""

    nodes: list[Any]
    names: list[str]
    edges: list[list[tuple[int, int]]]
    """Per node (child, output of the child) for each input of the operator; child -1 is not tracked."""
    calls: list[Call | None]
    modules: list[str]
    shapes: list[list[torch.Size]]
    live: list[bool]
    """Whether an input of the model lies below."""
    leaves: dict[int, str]
    """Nodes that are inputs of the model -> the input's name."""
    users: list[list[tuple[int, int]]]
    """Per node (consumer, which of its edges)."""
    places: dict[str, list[tuple[int, int]]]
    """Tap -> (node, output) of each call that the root depends on."""

    def of(self, index: int) -> str:
        """Describe a node for a message."""
        return f"{self.names[index]} (in {self.modules[index] or 'the model itself'})"

    def only_user(self, index: int) -> int | None:
        """Return the one node that consumes this node, if there is only one."""
        found = {user for user, _ in self.users[index]}
        return found.pop() if len(found) == 1 else None

    def live_edges(self, index: int) -> list[tuple[int, int]]:
        """Return the edges of a node that lead to an input."""
        return [(child, k) for child, k in self.edges[index] if child >= 0 and self.live[child]]


def key_of(node: Any) -> str:
    """Return a node's name without autograd's numbering: `MulBackward0` is "Mul"."""
    name = node.name().rsplit("::", 1)[-1]
    return name.rsplit("Backward", 1)[0] if "Backward" in name else name


def build(root: Any, recording: Recording) -> Tape:
    """Lay out the graph below `root`.

    Raises:
        InputError: a part of the model hides its graph (compiled, fused, reentrant checkpointing, writes in place).
    """
    nodes = _ordered(root)
    index = {node: i for i, node in enumerate(nodes)}
    names = [key_of(node) for node in nodes]
    owner = recording.owner()
    edges = [[(index[c] if c is not None else -1, k) for c, k in node.next_functions] for node in nodes]
    numbers = [node._sequence_nr() for node in nodes]
    calls = [recording.calls.get((n, plain_name(name))) for n, name in zip(numbers, names, strict=True)]
    modules = [owner(n) for n in numbers]
    for name, module in zip(names, modules, strict=True):
        if name in _REFUSED:
            raise InputError(f"{name} in {module or 'the model itself'}: {_REFUSED[name]}")
    leaves = dict(_leaves(nodes, names, recording.inputs))
    live, users = _below(edges, leaves)
    places = {n: [(index[node], k) for node, k in found if node in index] for n, found in recording.taps.items()}
    shapes = [[meta.shape for meta in node._input_metadata] for node in nodes]
    return Tape(nodes, names, edges, calls, modules, shapes, live, leaves, users, places)


def _ordered(root: Any) -> list[Any]:
    """Return every node below and including `root`, each before its children."""
    order: list[Any] = []
    seen = {root}
    stack = [(root, iter(root.next_functions))]
    while stack:
        node, children = stack[-1]
        for child, _ in children:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append((child, iter(child.next_functions)))
                break
        else:
            order.append(node)
            stack.pop()
    return order[::-1]


def _leaves(nodes: list[Any], names: list[str], inputs: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    given = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    floats = {id(x): name for name, x in given.items() if x.requires_grad}
    numbers = {name: x for name, x in given.items() if not x.is_floating_point() and "mask" not in name}
    read: list[tuple[int, Tensor]] = []
    for i, (node, name) in enumerate(zip(nodes, names, strict=True)):
        if name == LEAF and id(node.variable) in floats:
            yield i, floats[id(node.variable)]
        elif name == "Embedding":
            read.append((i, node._saved_indices))
    for key, x in numbers.items():
        very = [i for i, each in read if (each.data_ptr(), each.numel()) == (x.data_ptr(), x.numel())]
        alike = [i for i, each in read if each.shape == x.shape and torch.equal(each, x.to(each))]
        yield from ((i, key) for i in very or alike)  # alike: the model copied them


def _below(
    edges: list[list[tuple[int, int]]], leaves: Mapping[int, str]
) -> tuple[list[bool], list[list[tuple[int, int]]]]:
    live = [False] * len(edges)
    users: list[list[tuple[int, int]]] = [[] for _ in edges]
    for i in reversed(range(len(edges))):
        live[i] = i in leaves or any(c >= 0 and live[c] for c, _ in edges[i])
        for position, (child, _) in enumerate(edges[i]):
            if child >= 0:
                users[child].append((i, position))
    return live, users


class Values:
    """The promise: a value is looked up among what autograd saved, or computed from the nodes below, once."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.memo = tape, dict[tuple[int, int], Tensor]()
        self.promises = Promises(nodes=len(tape.nodes))

    def get(self, index: int, k: int = 0, *, asker: int | None = None) -> Tensor:
        """Return output `k` of a node.

        Raises:
            InputError: it was changed in place, or nothing says how it was made.
        """
        stack, computed = [(index, k)], 0
        while stack:
            i, j = stack[-1]
            if (i, j) in self.memo or self._saved(i, j):
                stack.pop()
                continue
            missing = [(c, n) for c, n in self.tape.edges[i] if c >= 0 and (c, n) not in self.memo]
            missing = [edge for edge in missing if not self._saved(*edge)]
            if missing:
                stack.extend(missing)
                continue
            self._compute(i)
            computed += 1
            stack.pop()
        if computed:
            self.promises.asked.add(index if asker is None else asker)
            self.promises.computed += computed
            self.promises.deepest = max(self.promises.deepest, computed)
        return self.memo[index, k]

    def release(self, index: int) -> None:
        """Forget a node that is done with; what it saved of its inputs is passed on to those who come after."""
        if self.tape.live[index] and index not in self.tape.leaves:
            for position, (child, k) in enumerate(self.tape.edges[index]):
                if child >= 0 and self.tape.live[child] and (child, k) not in self.memo:
                    value = self._field(index, position)
                    if value is not None:
                        self.memo[child, k] = value
        for k in range(len(self.tape.shapes[index])):
            self.memo.pop((index, k), None)
        self.tape.nodes[index] = None

    def _saved(self, i: int, k: int) -> bool:
        value = self._result(i, k)
        if value is None:
            for user, position in self.tape.users[i]:
                if self.tape.edges[user][position][1] == k and self.tape.nodes[user] is not None:
                    value = self._field(user, position)
                    if value is not None:
                        break
        if value is not None:
            self.memo[i, k] = value
        return value is not None

    def _result(self, i: int, k: int) -> Tensor | None:
        node = self.tape.nodes[i]
        if self.tape.names[i] == LEAF:
            return node.variable.detach()
        if k == 0:
            for name in _RESULTS:
                if hasattr(type(node), name):  # (reading it may raise)
                    return self.read(i, name)
        return None

    def _field(self, i: int, position: int) -> Tensor | None:
        """Return the input of an edge as the node saved it."""
        name = self.tape.names[i]
        fields = SAVED_INPUTS.get(name) or (_ATTENTION if name.startswith("ScaledDotProduct") else ("self",))
        attribute = fields[position] if position < len(fields) else None
        if attribute is None or not hasattr(type(self.tape.nodes[i]), f"_saved_{attribute}"):
            return None
        return self.read(i, f"_saved_{attribute}")

    def read(self, i: int, attribute: str) -> Tensor | None:
        """Return what a node saved as an attribute."""
        try:
            value = getattr(self.tape.nodes[i], attribute)
        except RuntimeError as error:
            raise unreadable(error, self.tape.of(i)) from error
        return value.detach() if isinstance(value, Tensor) else None

    def _compute(self, i: int) -> None:
        call = self.tape.calls[i]
        if call is None:
            raise InputError(f"no value for {self.tape.of(i)}: the operator behind it was not seen")
        if "dropout" in call.func._schema.name:
            raise InputError(f"{self.tape.of(i)} is random; call model.eval() first")
        tracked = [self.memo[c, n] for c, n in self.tape.edges[i] if c >= 0]
        for k, value in enumerate(call.run(tracked)):
            if isinstance(value, Tensor):
                self.memo.setdefault((i, k), value)


def unreadable(error: RuntimeError, where: str) -> InputError:
    """Say in the user's terms why autograd can't give back what it saved."""
    text = str(error)
    if "modified by an inplace operation" in text:
        return InputError(f"a tensor that {where} needs was changed in place afterwards; change a copy instead")
    if "freed" in text or "second time" in text:
        return InputError(f"{where} was freed by backward(); explain before it, or use backward(retain_graph=True)")
    return InputError(f"{where}: {text.splitlines()[0]}")
