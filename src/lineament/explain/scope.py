"""`scope`: a model as the affine map f(x) = A(x) x + r(x) that it is for one input, to be run on other inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lineament._base.errors import InputError, unknown
from lineament._base.seeds import generator
from lineament.explain.recording import prepared, record
from lineament.explain.relevance import named
from lineament.explain.replay import CHOICES, Guards, compiled
from lineament.explain.rules import Rules
from lineament.explain.sweep import Sweep, plan
from lineament.explain.tape import build
from lineament.explain.targets import scores_of

Index = int | Sequence[int]
"""A place of the output or of the input: along its axes, or counted through all of them."""


@dataclass(frozen=True)
class Scope:
    """The affine map of a model at one input, kept runnable. A is never built.

    Attributes:
        input: x, the input or the embedding of token numbers.
        output: f(x), the model's own.
        run: u -> A u + r, for one probe.
        kinds: how the operators on the way are replayed: kind -> how many.
        guards: of the masks phi(x) / x: how many elements the slope near 0 stood in for, and the largest mask.
        chunk: probes that run at once.

    A call `scope(u)` is A u + r, for u of x's shape or [K, *x's shape].
    """

    input: Tensor
    output: Tensor
    run: Callable[[Tensor], Tensor]
    kinds: Mapping[str, int]
    guards: Guards
    chunk: int = 16

    def __call__(self, u: Tensor) -> Tensor:
        """Return A u + r."""
        return self._each(self.run, u, self.input)

    @cached_property
    def bias(self) -> Tensor:
        """The bias response r(x), of the output's shape."""
        return self(torch.zeros_like(self.input))

    def linear(self, u: Tensor) -> Tensor:
        """Return A u, free of the cancellation in (A u + r) - r; u as for a call."""
        zero = torch.zeros_like(self.input)
        return self._each(lambda v: torch.func.jvp(self.run, (zero,), (v,))[1], u, self.input)  # pyright: ignore

    def transposed(self, v: Tensor) -> Tensor:
        """Return A^T v; v of the output's shape or [K, *that]."""
        return self._each(lambda w: self._back(w)[0], v, self.output)

    def columns(self, *places: Index) -> Tensor:
        """Return A e_j, what a unit impulse at each place of the input gives: [K, *output]."""
        return self.linear(_units(self.input, places, "input"))

    def rows(self, *places: Index) -> Tensor:
        """Return A^T e_i, what each place of the output looks at: [K, *input]."""
        return self.transposed(_units(self.output, places, "output"))

    def votes(self, place: Index) -> Tensor:
        """Return A_i x, entry by entry [*input]: they add up to an output less its bias response."""
        return self.rows(place)[0] * self.input

    @property
    def error(self) -> float:
        """The largest |A x + r - f| as a share of the largest |f|."""
        gap = self.linear(self.input) + self.bias - self.output
        return float(gap.abs().max() / self.output.abs().max().clamp_min(1e-30))

    def bias_share(self, first: Index, second: Index) -> float:
        """Return how much of the margin f_a - f_b is the biases': (r_a - r_b) / (f_a - f_b)."""
        r, f = (y[_place(y, first, "output")] - y[_place(y, second, "output")] for y in (self.bias, self.output))
        return float(r / f)

    def singular(self, k: int = 4, *, tolerance: float = 1e-6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest singular values of A with their bases, by Lanczos on products with A and its transpose.

        Args:
            k: how many, fewer than the input and the output have places.
            tolerance: relative, of the singular values.
            seed: of the first vector.

        Returns:
            Eigen-outputs [k, *output], values [k] falling, eigen-inputs [k, *input].

        Raises:
            InputError: k is not between 1 and that.
        """
        from scipy.sparse.linalg import LinearOperator, svds

        m, n = self.output.numel(), self.input.numel()
        if not 1 <= k < min(m, n):
            raise InputError(f"k is {k}; a map of {n} inputs to {m} outputs has 1 to {min(m, n) - 1} to ask for")

        def applied(product: Callable[[Tensor], Tensor], shape: torch.Size) -> Callable[[Any], Any]:
            like = self.input

            def of(v: Any) -> Any:
                return product(torch.from_numpy(np.ascontiguousarray(v)).to(like).view(shape)).flatten().cpu().numpy()

            return of

        kind = torch.zeros((), dtype=self.input.dtype).numpy().dtype
        sides = {
            "matvec": applied(self.linear, self.input.shape),
            "rmatvec": applied(self.transposed, self.output.shape),
        }
        operator = LinearOperator((m, n), **sides, dtype=kind)  # pyright: ignore[reportCallIssue]
        first = torch.randn(min(m, n), generator=generator(seed), dtype=self.input.dtype).numpy()
        u, s, v = (torch.from_numpy(np.array(x)).to(self.input) for x in svds(operator, k, tol=tolerance, v0=first))  # pyright: ignore[reportArgumentType]
        order = s.argsort(descending=True)
        return u.T[order].reshape(k, *self.output.shape), s[order], v[order].reshape(k, *self.input.shape)

    def unnormalised(self, mean: Any, std: Any) -> "Scope":
        """Return the map for raw inputs, where the model got (raw - mean) / std: A / std, and r - A (mean / std).

        Args:
            mean, std: numbers, or tensors that broadcast to the input ([3, 1, 1] for pictures).
        """
        mean, std = (torch.as_tensor(each).to(self.input) for each in (mean, std))
        return replace(self, input=self.input * std + mean, run=lambda u: self.run((u - mean) / std))

    @cached_property
    def _back(self) -> Callable[[Tensor], tuple[Tensor]]:
        return torch.func.vjp(self.run, torch.zeros_like(self.input))[1]

    def _each(self, f: Callable[[Tensor], Tensor], u: Tensor, like: Tensor) -> Tensor:
        if u.shape == like.shape:
            return f(u).detach()
        if u.shape[1:] != like.shape:
            raise InputError(f"the probe has shape {list(u.shape)}; expected {list(like.shape)} or a stack of such")
        return torch.vmap(f, chunk_size=self.chunk)(u).detach()


def scope(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    of: str | None = None,
    output: Callable[[Any], Tensor] | None = None,
    center: str = "data",
    gate: str = "half",
    offset: str = "tangent",
    chunk: int = 16,
) -> Scope:
    """Read a model as the affine map it is for one input: f(x) = A(x) x + r(x) (LinearScope, arXiv:1908.05168).

    The model runs once, unmodified. Every operator's decisions for x are kept (signs, masks phi(x) / x, maxima,
    scales of norms, attention patterns), and the map that is left is run on any other input. For nets of linear maps,
    ReLU and maxima A is the Jacobian.

    Args:
        model: any module in eval mode, in float32 or float64; it comes back exactly as it was.
        inputs: keyword arguments of its forward, or its one tensor. Token numbers are followed from their embedding.
        of: the input that is x; the only one that counts if None.
        output: a function of the model's output that is f; its scores (logits) if None.
        center: norm layers subtract the mean of x ("data") or of the probe ("probe", which moves energy from r into A).
            Norms written out in the model subtract the probe's.
        gate: products of two live tensors give "half" to each, or all to the one that is no activation ("linear").
        offset: functions with f(0) != 0 (sigmoid, exp) go by their "tangent" or by the "mask" f(x) / x.
        chunk: probes that run at once.

    Raises:
        InputError: an unknown choice; several inputs could be meant; half precision; the model hides its graph, or f
            depends on x through decisions only.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
        >>> found = scope(net, torch.ones(1, 2, dtype=torch.double))
        >>> found.error < 1e-12, found.rows((0, 1)).shape
        (True, torch.Size([1, 1, 2]))
    """
    choices = {"center": center, "gate": gate, "offset": offset}
    for name, chosen in choices.items():
        if chosen not in CHOICES[name]:
            raise unknown(f"choice for {name}", chosen, CHOICES[name])
    given = named(model, inputs)
    with prepared(model):
        recording = record(model, given, target=output if output is not None else scores_of)
        scores = recording.scored
        if not isinstance(scores, Tensor) or not scores.requires_grad:
            raise InputError("the output doesn't depend on parameters or inputs by autograd; is it detached?")
        if scores.dtype not in (torch.float32, torch.float64):
            raise InputError(f"the model computes in {scores.dtype}; call model.float() first, masks need its digits")
        edge = get_gradient_edge(scores)
        found = scores.detach().clone()
        tape = build(edge.node, recording)
        recording.output = recording.scored = None
        leaf = _leaf(tape.leaves, of, given)
        sweep = Sweep(tape, plan(tape, Rules(gate=gate, unknown="vjp"), model), counting=False)
        x = sweep.values.get(leaf, 0)
        program = compiled(sweep, leaf, (0, edge.output_nr), choices)
    return Scope(x.clone(), found, program, program.kinds, program.guards, chunk)


def _leaf(leaves: Mapping[int, str], of: str | None, given: Mapping[str, Any]) -> int:
    """Return the node of the input that is x."""
    names = sorted(set(leaves.values()))
    if of is not None and of not in names:
        raise unknown("input", of, names) if of not in given else InputError(f"the output doesn't depend on {of!r}")
    fitting = [node for node, name in leaves.items() if of in (None, name)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise InputError("the output depends on no floating-point input and no embedded token")
    if len(names) > 1:
        raise InputError(f"the inputs {', '.join(names)} could all be meant; choose one by of=")
    raise InputError(f"{names[0]!r} is embedded {len(fitting)} times; give the embedding itself, inputs_embeds say")


def _units(like: Tensor, places: Sequence[Index], what: str) -> Tensor:
    if not places:
        raise InputError(f"no place of the {what} was given")
    found = like.new_zeros(len(places), *like.shape)
    for i, place in enumerate(places):
        found[i][_place(like, place, what)] = 1.0
    return found


def _place(like: Tensor, place: Index, what: str) -> tuple[int, ...]:
    shape = tuple(like.shape)
    if isinstance(place, int):
        if not -like.numel() <= place < like.numel():
            raise InputError(f"place {place} is outside the {what}'s {like.numel()} places")
        return tuple(int(i) for i in np.unravel_index(place % like.numel(), shape))
    found = tuple(int(i) for i in place)
    if len(found) != len(shape) or any(not -n <= i < n for i, n in zip(found, shape, strict=True)):
        raise InputError(f"place {found} is none of the {what} of shape {list(shape)}")
    return found


def anisotropy(row: Tensor) -> float:
    """Return how elongated a row is: the ratio of the eigenvalues of the second moments of where its weights lie.

    Args:
        row: [Y, X]; its absolute values are the weights. 1 is round, a line is infinite.

    Example:
        >>> anisotropy(torch.ones(3, 3)), anisotropy(torch.ones(3, 5))
        (1.0, 3.0)
    """
    share = row.abs().double() / row.abs().double().sum()
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=share.dtype) for n in row.shape), indexing="ij"))
    centred = grid - (grid * share).sum((1, 2), keepdim=True)
    low, high = torch.linalg.eigvalsh(torch.einsum("ayx,byx,yx->ab", centred, centred, share)).tolist()
    return round(high / low, 12) if low > 0 else float("inf")
