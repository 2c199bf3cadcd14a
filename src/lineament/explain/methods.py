"""Attribution that is no rule set: along a path, over noise, by leaving out, by attention alone.

Sources: integrated gradients (Sundararajan et al. 2017) with layer conductance (Dhamdhere et al. 2019), DeepLIFT
(Shrikumar et al. 2017), SmoothGrad (Smilkov et al. 2017), occlusion (Zeiler and Fergus 2014), attention rollout (Abnar
and Zuidema 2020).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lineament._base.errors import InputError
from lineament._base.seeds import generator
from lineament.explain.ledger import Ledger
from lineament.explain.operators import ACTIVATIONS
from lineament.explain.patterns import patterns
from lineament.explain.products import NEAR_ZERO
from lineament.explain.recording import accepts, prepared, record
from lineament.explain.relevance import Explainer, Relevance
from lineament.explain.rules import GRADIENT
from lineament.explain.sweep import Step, Sweep, plan
from lineament.explain.tape import Tape, Values, build
from lineament.explain.targets import Target, scores_of, selected
from lineament.graph import Where, capture, patch


@dataclass(frozen=True)
class Points:
    """A model as a function of its continuous inputs: floating-point ones, and embeddings of token numbers."""

    model: nn.Module
    given: Mapping[str, Any]
    values: dict[str, Tensor]
    """Input name -> where the model stands: the input, or the embedding [B, T, D]."""
    tokens: frozenset[str]
    places: Any
    words: str
    embedding: nn.Module | None = None
    """What received the token numbers."""

    def score(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the explained outputs [B] elsewhere."""
        inputs, embedded = dict(self.given), None
        for name, x in values.items():
            if name in self.tokens:
                embedded = x
            else:
                inputs[name] = x
        changes: AbstractContextManager[Any] = nullcontext()
        if embedded is not None:
            (token,) = self.tokens
            received = _receives(self.given[token])
            changes = patch(
                self.model,
                {lambda _, module: module is self.embedding: lambda m, a, k, o: embedded if received(a, k) else None},
            )
        with changes:
            return _scores(self.model, inputs, self.places)


def _scores(model: nn.Module, inputs: Mapping[str, Any], places: Any) -> Tensor:
    given = dict(inputs)
    positional = (given.pop(""),) if "" in given else ()
    if "use_cache" not in given and accepts(model, "use_cache"):
        given["use_cache"] = False
    output = model(*positional, **given)
    if callable(places):
        return places(output)  # pyright: ignore[reportReturnType]
    return scores_of(output)[places]


def points(model: nn.Module, given: Mapping[str, Any], target: Target) -> Points:
    """Fix the target at the given inputs and find what can move."""
    floats = {k: x for k, x in given.items() if isinstance(x, Tensor) and x.is_floating_point() and "mask" not in k}
    ids = None if floats else next((k for k in ("input_ids", "input") if isinstance(given.get(k), Tensor)), None)
    if ids is None and not floats:
        raise InputError("no floating-point input and no token numbers to move along")
    inputs = dict(given)
    positional = (inputs.pop(""),) if "" in inputs else ()
    with torch.no_grad(), _embedded(model, None if ids is None else given[ids]) as found:
        output = model(*positional, **inputs)
    _, places, words = selected(output, target, given)
    places = target if callable(target) else places
    if ids is None:
        return Points(model, given, {k: x.detach() for k, x in floats.items()}, frozenset(), places, words)
    if len(found) != 1:
        raise InputError(f"{len(found)} embeddings of the model receive {ids}, not one; pass inputs_embeds instead")
    ((layer, value),) = found.items()
    return Points(model, given, {ids: value}, frozenset([ids]), places, words, layer)


def _receives(ids: Tensor) -> Callable[[tuple[Any, ...], Mapping[str, Any]], bool]:
    """Return a function that says whether a module's arguments are the token numbers, or a copy of them."""

    def received(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        x = args[0] if args else kwargs.get("input")
        return isinstance(x, Tensor) and x.shape == ids.shape and torch.equal(x, ids.to(x))

    return received


@contextmanager
def _embedded(model: nn.Module, ids: Tensor | None) -> Iterator[dict[nn.Module, Tensor]]:
    """Yield what will hold the embeddings that received the token numbers, with what they made of them [B, T, D].

    Those that received the very tensor come first: positions may have the same values.
    """
    found, alike = dict[nn.Module, Tensor](), dict[nn.Module, Tensor]()

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if ids is not None and _receives(ids)(args, kwargs):
            x = args[0] if args else kwargs["input"]
            (found if x.data_ptr() == ids.data_ptr() else alike)[module] = output.detach().clone()

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                hooks.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
        yield found
    found.update({} if found else alike)


def _relevance(at: Points, found: Mapping[str, Tensor], value: Tensor, name: str, layers: Any = None) -> Relevance:
    ledger = Ledger(root=float(value.sum(dtype=torch.float64)))
    for x in found.values():
        ledger.absorb("inputs", x)
    ledger.inputs_absolute = float(sum(x.abs().sum() for x in found.values()))
    ledger.close()
    sums = {k: x.sum(-1) if k in at.tokens else x for k, x in found.items()}
    features = {k: x for k, x in found.items() if k in at.tokens}
    return Relevance(sums, layers or {}, ledger, value.detach(), name, at.words, features)


def _gradients(at: Points, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in values.items()}
    found = torch.autograd.grad(at.score(leaves).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def _baseline(given: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(given, Mapping):
        return {name: torch.as_tensor(given[name]).to(x).expand_as(x) for name, x in values.items()}
    return {name: torch.as_tensor(0.0 if given is None else given).to(x).expand_as(x) for name, x in values.items()}


@dataclass(frozen=True)
class IntegratedGradients:
    """(x - baseline) times the mean gradient on the line between them, by the midpoint rule.

    Relevances add up to f(x) - f(baseline), as `steps` grow; f(baseline) stands in the column "constants". For modules
    asked for by `at` it gives their conductance.
    """

    steps: int = 20

    def __call__(
        self, model: nn.Module, given: dict[str, Any], target: Target, places: Sequence[Where], baseline: Any
    ) -> Relevance:
        """Explain."""
        with prepared(model):
            at = points(model, given, target)
            start = _baseline(baseline, at.values)
            total = {name: torch.zeros_like(x) for name, x in at.values.items()}
            for step in range(self.steps):
                for name, g in _gradients(at, self._between(at, start, (step + 0.5) / self.steps)).items():
                    total[name] += g / self.steps
            with torch.no_grad():
                value, nothing = at.score(at.values), at.score(start)
            found = {name: (x - start[name]) * total[name] for name, x in at.values.items()}
            layers = self._conductance(at, start, places) if places else {}
        result = _relevance(at, found, value, "integrated-gradients", layers)
        result.ledger.columns["constants"] = float(nothing.sum(dtype=torch.float64))
        return result

    def _between(self, at: Points, start: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        return {name: start[name] + share * (x - start[name]) for name, x in at.values.items()}

    def _conductance(self, at: Points, start: Mapping[str, Tensor], places: Sequence[Where]) -> dict[str, Tensor]:
        """Sum, over the path, the gradient of a layer times the layer's own change."""
        from lineament.graph import select

        names = [name for where in places for name in select(at.model, where)]

        def wanted(name: str, module: nn.Module) -> bool:
            return name in names

        def layer_at(share: float, detach: bool) -> tuple[dict[str, Tensor], Tensor]:
            values = {k: x.detach().requires_grad_() for k, x in self._between(at, start, share).items()}
            with capture(at.model, wanted, detach=detach) as seen:
                score = at.score(values)
            return {name: seen.tensor(name) for name in names}, score

        found: dict[str, Tensor] = {}
        before = layer_at(0.0, True)[0]
        for step in range(self.steps):
            after = layer_at((step + 1) / self.steps, True)[0]
            middle, score = layer_at((step + 0.5) / self.steps, False)
            gradients = torch.autograd.grad(score.sum(), [middle[name] for name in names])
            for name, g in zip(names, gradients, strict=True):
                part = g * (after[name] - before[name])
                found[name] = part if name not in found else found[name] + part
            before = after
        return found


@dataclass(frozen=True)
class SmoothGrad:
    """The mean gradient at noisy copies of the input, times the input.

    Args:
        samples: noisy copies.
        noise: their standard deviation, as a share of the input's range.
        seed: of the noise.
    """

    samples: int = 16
    noise: float = 0.15
    seed: int = 0

    def __call__(
        self, model: nn.Module, given: dict[str, Any], target: Target, places: Sequence[Where], baseline: Any
    ) -> Relevance:
        """Explain."""
        _nothing_else("smoothgrad", places, baseline)
        with prepared(model):
            at = points(model, given, target)
            total = {name: torch.zeros_like(x) for name, x in at.values.items()}
            for sample in range(self.samples):
                for name, g in _gradients(at, self._noisy(at, sample)).items():
                    total[name] += g / self.samples
            with torch.no_grad():
                value = at.score(at.values)
        result = _relevance(at, {name: x * total[name] for name, x in at.values.items()}, value, "smoothgrad")
        result.ledger.open.append("smoothgrad: averages of gradients add up to nothing in particular")
        return result

    def _noisy(self, at: Points, sample: int) -> dict[str, Tensor]:
        random = generator(self.seed * 100_003 + sample)
        noise = {k: torch.randn(x.shape, generator=random).to(x) for k, x in at.values.items()}
        return {k: x + self.noise * (x.max() - x.min()) * noise[k] for k, x in at.values.items()}


@dataclass(frozen=True)
class Occlusion:
    """How much the output falls when a part is replaced by the baseline: a token, or a square patch of an image."""

    patch: int = 4

    def __call__(
        self, model: nn.Module, given: dict[str, Any], target: Target, places: Sequence[Where], baseline: Any
    ) -> Relevance:
        """Explain."""
        _nothing_else("occlusion", places, None)
        with prepared(model), torch.no_grad():
            at = points(model, given, target)
            start, value = _baseline(baseline, at.values), at.score(at.values)
            found = {name: torch.zeros_like(x) for name, x in at.values.items()}
            for name, x in at.values.items():
                for part in self._parts(x, name in at.tokens):
                    hidden = x.clone()
                    hidden[part] = start[name][part]
                    drop = value - at.score({**at.values, name: hidden})
                    size = x[part][0].numel()
                    found[name][part] = (drop / size).reshape(-1, *[1] * (x.dim() - 1)).to(x).expand_as(x[part])
        result = _relevance(at, found, value, "occlusion")
        result.ledger.open.append("occlusion: drops add up to the output only for additive models")
        return result

    def _parts(self, x: Tensor, token: bool) -> list[tuple[Any, ...]]:
        if x.dim() == 4:
            height, width = x.shape[-2:]
            steps = [range(0, size, self.patch) for size in (height, width)]
            return [(..., slice(i, i + self.patch), slice(j, j + self.patch)) for i in steps[0] for j in steps[1]]
        if x.dim() < 2:
            raise InputError(f"occlusion needs inputs [B, ...]; given {list(x.shape)}")
        return [(slice(None), slice(i, i + 1)) for i in range(x.shape[1])]


@dataclass(frozen=True)
class Rollout:
    """Attention rollout: the product over layers of (mean attention + identity) / 2, the row of the explained token."""

    def __call__(
        self, model: nn.Module, given: dict[str, Any], target: Target, places: Sequence[Where], baseline: Any
    ) -> Relevance:
        """Explain."""
        _nothing_else("rollout", places, baseline)
        if callable(target):
            raise InputError("rollout needs a class or token number as target; a function names no position")
        with prepared(model), torch.no_grad():
            at = points(model, given, target)
        found = list(patterns(model, given).weights.values())
        rolled = torch.eye(found[0].shape[-1]).to(found[0]).expand(len(found[0]), -1, -1)
        for pattern in found:
            rolled = (pattern.mean(1) + torch.eye(pattern.shape[-1]).to(pattern)) / 2 @ rolled
        row = at.places[1] if isinstance(at.places, tuple) and len(at.places) == 3 else 0
        name = next(iter(at.values))
        weights = rolled[torch.arange(len(rolled)), row]
        result = Relevance({name: weights}, {}, Ledger(root=1.0), at.score(at.values).detach(), "rollout", at.words)
        result.ledger.open.append("rollout: attention weights, in no unit of the output")
        return result


@dataclass(frozen=True)
class DeepLift:
    """DeepLIFT's rescale rule: slopes from the baseline to the input, (y - y0) / (x - x0), at every activation.

    Relevances add up to f(x) - f(baseline) where the model is made of linear maps and activations; f(baseline) stands
    in the column "constants". Max-pooling and products are passed by their gradient.
    """

    def __call__(
        self, model: nn.Module, given: dict[str, Any], target: Target, places: Sequence[Where], baseline: Any
    ) -> Relevance:
        """Explain."""
        if places:
            raise InputError("deep-lift explains inputs only; drop `at`")
        with prepared(model):
            at = points(model, given, target)
            if at.tokens:
                raise InputError("deep-lift needs a floating-point input; pass inputs_embeds instead of token numbers")
            start = _baseline(baseline, at.values)
            tapes, scores = zip(*(_taped(at, values) for values in (at.values, start)), strict=True)
            if tapes[0].names != tapes[1].names:
                raise InputError("the model runs other operators at the baseline, so there is nothing to compare")
            rules = replace(GRADIENT, operators=dict.fromkeys(ACTIVATIONS, _rescale(Values(tapes[1]))))
            sweep = Sweep(tapes[0], plan(tapes[0], rules, model), counting=False, coefficients_only=True)
            sweep.seed(0, 0, torch.ones_like(scores[0]))
            sweep.run()
        found = {name: sum(sweep.inputs[name]) * (x - start[name]) for name, x in at.values.items()}
        result = _relevance(at, found, scores[0], "deep-lift")
        result.ledger.columns["constants"] = float(scores[1].sum(dtype=torch.float64))
        return result


def _taped(at: Points, values: Mapping[str, Tensor]) -> tuple[Tape, Tensor]:
    """Run the model somewhere; return its tape and the explained outputs [B]."""
    choose = at.places if callable(at.places) else lambda output: scores_of(output)[at.places]
    recording = record(at.model, {**at.given, **values}, target=choose)
    edge = get_gradient_edge(recording.scored)
    return build(edge.node, recording), recording.scored.detach()


def _rescale(reference: Values) -> Callable[[Step], None]:
    """Return the rule of activations: slopes between the values here and those on another tape of the same model."""

    def rule(s: Step) -> None:
        c, (child, k) = s.coef(), s.edges[0]
        x, y = s.value(0) - reference.get(child, k), s.result() - reference.get(s.index)
        near, slope = x.abs() < NEAR_ZERO, s.vjp(c)[0]
        assert slope is not None
        s.send(0, coef=torch.where(near, slope, c * y / torch.where(near, 1.0, x)))

    return rule


def _nothing_else(name: str, places: Sequence[Where], baseline: Any) -> None:
    if places:
        raise InputError(f"{name} explains inputs only; drop `at`")
    if baseline is not None:
        raise InputError(f"{name} compares with no baseline; drop it")


METHODS: dict[str, Callable[..., Explainer]] = {
    "integrated-gradients": IntegratedGradients,
    "smoothgrad": SmoothGrad,
    "deep-lift": DeepLift,
    "occlusion": Occlusion,
    "rollout": Rollout,
}
"""Methods by name; each is a class of its parameters."""


def method_of(rules: Any) -> Explainer | None:
    """Return the method that a name or value means, None for a rule set."""
    if isinstance(rules, str):
        return METHODS[rules]() if rules in METHODS else None
    return rules if isinstance(rules, tuple(METHODS.values())) else None  # type: ignore[arg-type]
