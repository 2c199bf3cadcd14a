"""What stands for an operator in a drawing: a shape, a few letters, and a sentence for those who ask."""

from __future__ import annotations

from dataclasses import dataclass

from lineament.graph.diagrams.fold import Cell
from lineament.graph.diagrams.term import OPAQUE, Op, Term


@dataclass(frozen=True)
class Sign:
    """A shape ("box", "pill", "triangle", "block", "none", "part"), its text with super- and subscript, and words."""

    shape: str
    text: str
    over: str = ""
    under: str = ""
    words: str = ""
    bold: bool = False

    @property
    def width(self) -> float:
        """Pixels, at 0.6 em for a letter."""
        return max(16.0, 7.4 * len(self.text) + 5.0 * max(len(self.over), len(self.under)) + 10)


def sign(term: Term, cell: Cell) -> Sign:
    """Choose the sign of a cell."""
    op = cell.op
    if op is None:
        times = f" ×{cell.times}" if cell.times > 1 else ""
        return Sign("box", f"{cell.name}{times}", words=f"block {cell.name}{times}, defined below")
    if cell.steps:
        text = _function([step.attrs.get("fn", "") for step in cell.steps if step.kind == "map"])
        return Sign("pill", text, words=f"elementwise function of {len(cell.steps)} steps")
    return SIGNS.get(op.kind, _plain)(term, op)


def short(name: str) -> str:
    """Return the telling part of a parameter's or module's name."""
    parts = [part for part in name.split(".") if part not in ("weight", "bias") and not part.isdigit()]
    last = parts[-1] if parts else name
    return last.removesuffix("_proj").removesuffix("_weight")[:8]


def _function(names: list[str]) -> str:
    heads = [name.split(".")[0] for name in names]
    if ("tanh" in heads and "pow" in heads) or "erf" in heads:
        return "GELU"
    return heads[0] if len(heads) == 1 else "f"


def learned(term: Term, op: Op) -> list[int]:
    """Return the parameters among an operator's inputs."""
    return [port.value for port in op.inputs if term.values[port.value].origin == "weight"]


def _product(term: Term, op: Op) -> Sign:
    weights = learned(term, op)
    tables = [p for p in op.inputs if term.values[p.value].origin == "constant"]
    if weights:
        name = term.values[weights[0]].name
        under = "+" if op.attrs.get("bias") else ""
        inside = set(op.outputs[0].labels)
        if (
            all(set(port.labels) <= inside for port in op.inputs)
            and len(op.inputs) > len(weights)
            and not _adds(term, op)
        ):
            return Sign("pill", "×", over=short(name), words=f"multiply by the learned {name}", bold=True)
        words = f"learned linear map {name}" + (" with bias" if under else "")
        return Sign("box", "L", over=short(name), under=under, words=words, bold=True)
    if tables:
        return Sign("pill", "× table", words="multiply by a fixed table")
    summed = {label for port in op.inputs for label in port.labels} - set(op.outputs[0].labels)
    return Sign("none", "", words="sum of products" if summed else "product, place by place")


def _adds(term: Term, op: Op) -> bool:
    """Say whether a learned operand brings axes of its own."""
    own = {label for p in op.inputs if term.values[p.value].origin != "weight" for label in p.labels}
    return bool(set(op.outputs[0].labels) - own)


def _map(term: Term, op: Op) -> Sign:
    fn, args = op.attrs["fn"].split(".")[0], op.attrs["args"]
    numbers = [x for x in args if isinstance(x, int | float) and not isinstance(x, bool)]
    names = {"pow": "^", "add": "+", "sub": "−", "div": "÷", "rsub": "−", "_to_copy": "cast", "clone": "copy"}
    names |= {"relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "sigmoid": "σ"}
    text = str(names.get(fn, fn.strip("_")))
    if len(op.inputs) == 1 and len(numbers) == 1 and fn in ("pow", "add", "sub", "mul", "div"):
        text = f"{text}{numbers[0]:.3g}"
    live = [p for p in op.inputs if term.values[p.value].origin in ("op", "input")]
    return Sign("block" if len(live) > 1 else "pill", text, words=f"elementwise {fn}")


def _add(term: Term, op: Op) -> Sign:
    weights = learned(term, op)
    if weights:
        return Sign("pill", "+", over=short(term.values[weights[0]].name), words="add a learned table", bold=True)
    if any(term.values[p.value].origin == "constant" for p in op.inputs):
        return Sign("pill", "+ table", words="add a fixed table")
    return Sign("block", "+", words="add")


def _norm(term: Term, op: Op) -> Sign:
    kind = "LN" if op.attrs["center"] else "RMS"
    words = ("layer norm" if op.attrs["center"] else "RMS norm") + ", ".join(["", *op.attrs["then"]])
    return Sign("box", kind, under="+" if "bias" in op.attrs["then"] else "", words=words, bold=bool(op.attrs["then"]))


def _take(term: Term, op: Op) -> Sign:
    table = term.values[op.inputs[0].value]
    if table.origin == "weight":
        return Sign("box", "E", over=short(table.name)[:5], words=f"rows of the learned table {table.name}", bold=True)
    return Sign("box", "index", words="take positions by number")


def _scale(term: Term, op: Op) -> Sign:
    by = op.attrs["by"]
    return Sign("pill", "−" if by == -1 else f"×{by:.3g}", words=f"scale by {by:.6g}")


def _mask(term: Term, op: Op) -> Sign:
    shows = op.attrs.get("shows", "table")
    return Sign("pill", "mask" if shows == "table" else shows, words=f"mask ({shows}), the others {op.attrs['fill']:g}")


def _reduce(term: Term, op: Op) -> Sign:
    fn = str({"amax": "max", "amin": "min", "sum": "Σ"}.get(op.attrs["fn"], op.attrs["fn"]))
    return Sign("box", fn, words=f"{fn} over the axes that end here")


def _window(term: Term, op: Op) -> Sign:
    stride = max(op.attrs["stride"])
    words = f"windows of {'x'.join(map(str, op.attrs['size']))}, stride {stride}"
    return Sign("box", "★", under=f"/{stride}" if stride > 1 else "", words=words)


def _slice(term: Term, op: Op) -> Sign:
    start, stop = op.attrs["start"], op.attrs["stop"]
    gone = len(op.outputs[0].labels) < len(op.inputs[0].labels)
    text = f"{start}" if gone else f"{start}:{stop}"
    return Sign("part", text, words=f"position {start}" if gone else f"positions {start} to {stop}")


def _opaque(term: Term, op: Op) -> Sign:
    return Sign("opaque", op.attrs["fn"].split(".")[0], words="an operator that the diagram can't look into")


def _plain(term: Term, op: Op) -> Sign:
    shape, text, words = PLAIN.get(op.kind, ("box", op.kind, op.kind))
    return Sign(shape, str(op.attrs.get("fn", "") if text == "fn" else text), words=words)


PLAIN = {
    "softmax": ("triangle", "", "SoftMax"),
    "rotary": ("pill", "RoPE", "rotary positions, pairs turned by their place"),
    "batch norm": ("pill", "BN", "batch norm"), "cat": ("box", "⊕", "laid end to end"),
    "pad": ("box", "pad", "padded"), "scan": ("box", "fn", "running along an axis"),
    "reshape": ("box", "≡", "axis split or joined"), "spread": ("box", "★ᵀ", "added into larger windows"),
}  # fmt: skip
SIGNS = {
    "einsum": _product, "map": _map, "add": _add, "norm": _norm, "take": _take, "scale": _scale, "mask": _mask,
    "reduce": _reduce, "window": _window, "slice": _slice, OPAQUE: _opaque,
}  # fmt: skip
