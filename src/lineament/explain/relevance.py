"""`relevance`: which inputs, and which modules, an output of a model comes from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lineament._base.errors import InputError
from lineament.explain.ledger import Ledger
from lineament.explain.recording import Recording, prepared, record, scored, tapped
from lineament.explain.rules import Rules, check_channels, rules_of
from lineament.explain.sweep import Sweep, plan
from lineament.explain.tape import Promises, build
from lineament.explain.targets import Target, selected
from lineament.graph import Where, capture


@dataclass(frozen=True)
class Relevance:
    """Where an output comes from.

    Attributes:
        inputs: input name -> relevance of its shape; of token numbers [B, T], summed over the embedding.
        features: token input -> relevance of each coordinate of its embedding [B, T, D].
        at: module name -> relevance of its output (of what it receives, for a name that ends in ":input"). A module
            called several times has a tuple.
        ledger: where relevance ended.
        target: what was explained, in words.
        value: the explained outputs [B]; relevances add up to their sum, up to what the ledger shows.
        rules: the name of the rule set.
        promises: how many values had to be found again.
    """

    inputs: dict[str, Tensor]
    at: dict[str, Any]
    ledger: Ledger
    value: Tensor
    rules: str
    target: str = ""
    features: dict[str, Tensor] = field(default_factory=dict)
    promises: Promises = field(default_factory=Promises)


def relevance(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    target: Target = None,
    rules: Any = "auto",
    at: Where | Sequence[Where] | None = None,
    baseline: Any = None,
) -> Relevance:
    """Explain an output of any model by layer-wise relevance propagation, or by another method of attribution.

    The model runs once, unmodified; relevance then goes down its autograd graph, one rule per operator (DynamicLRP,
    arXiv:2512.07010). The seed is the output itself, so that relevances add up to it.

    Args:
        model: any module in eval mode; it comes back exactly as it was.
        inputs: keyword arguments of its forward, or its one tensor. Floating-point inputs (but for masks) and token
            numbers get relevance.
        target: None for the largest score; a class or token number; [B] of them; (position, number); or a function of
            the model's output that returns a scalar or [B]. For scores [B, T, V] the last real position is meant.
        rules: a name of `RULES` or `METHODS`, or a value: `Rules(...)`, `IntegratedGradients(...)`. "auto" is
            "attnlrp" for models that attend and "epsilon" for others; the result's `.rules` says which.
        at: modules whose relevance is wanted too, by `graph.Where`; "*.o_proj:input" means what they receive.
        baseline: what counts as nothing, for methods that compare with it: a number or a tensor like the input. The
            rule sets have none.

    Returns:
        The relevances, with the ledger of where they ended.

    Raises:
        InputError: an operator has no rule (each is named, with its module); a part of the model hides its graph; the
            target is out of range; the output is not a number (the first module where it wasn't is named).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
        >>> found = relevance(model, torch.ones(1, 2, dtype=torch.double), target=0)
        >>> found.rules, found.ledger.unaccounted < 1e-9
        ('epsilon', True)
    """
    from lineament.explain.methods import method_of

    method = method_of(rules)
    places = [] if at is None else [at] if isinstance(at, str | type) or callable(at) else list(at)
    given = named(model, inputs)
    if method is not None:
        return method(model, given, target, places, baseline)
    if baseline is not None:
        raise InputError("rule sets compare with no baseline; drop it, or take rules='integrated-gradients'")
    chosen = rules_of(rules, model)
    run = propagate(model, given, target=target, rules=chosen, at=places)
    at_found = {name: found[0] if len(found) == 1 else tuple(found) for name, found in run.sweep.at.items()}
    tokens: dict[str, Any] = {name: sum(found) for name, found in run.sweep.inputs.items()}
    ids = {name for name in tokens if not given[name].is_floating_point()}
    return Relevance(
        inputs={name: x.sum(-1) if name in ids else x for name, x in tokens.items()},
        features={name: x for name, x in tokens.items() if name in ids},
        at=at_found, ledger=run.sweep.ledger, value=run.value, rules=chosen.name, target=run.target,
        promises=run.sweep.promises,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished sweep with what it explained."""

    sweep: Sweep
    value: Tensor
    target: str


def propagate(model: nn.Module, inputs: Mapping[str, Any], **asked: Any) -> Run:
    """Run the model and one sweep; what `relevance` and `effects` share. `asked`: as for `seeded`."""
    with seeded(model, inputs, **asked) as run:
        run.sweep.run()
    run.sweep.ledger.inputs_absolute = run.sweep.ledger.columns.pop("inputs_absolute", 0.0)
    return run


@contextmanager
def seeded(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: Target,
    rules: Rules,
    at: Sequence[Where] = (),
    counting: bool = True,
    coefficients_only: bool = False,
) -> Iterator[Run]:
    """Run the model and put the first message at its output; the sweep is to be run inside the block."""
    check_channels(rules, model)
    check_length(model, inputs)
    with prepared(model):
        recording = record(model, inputs, [*at, *rules.channels], target=target)
        value, words, root, k, seed = _seed(model, inputs, recording, target)
        tape = build(root, recording)
        del root
        if not tape.leaves:
            _check_numbers(recording.inputs)
        sweep = Sweep(tape, plan(tape, rules, model), counting=counting, coefficients_only=coefficients_only)
        _place_taps(sweep, model, at, rules)
        recording.output = recording.scored = None
        recording.taps.clear()
        sweep.seed(0, k, seed)
        sweep.ledger.root = float(value.sum(dtype=torch.float64))
        yield Run(sweep, value, words)


def _check_numbers(inputs: Mapping[str, Any]) -> None:
    """Refuse token numbers that no embedding below the output received."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and "mask" not in name}
    if tensors and not any(x.is_floating_point() for x in tensors.values()):
        raise InputError(
            f"the output comes from no embedding of {', '.join(tensors)}; does the model change the numbers, or embed "
            "them without nn.Embedding? Pass inputs_embeds instead"
        )


def named(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    """Return the inputs by name; a lone tensor gets the name of the forward's first argument ("" if it has none)."""
    import inspect

    if not isinstance(inputs, Tensor):
        return dict(inputs)
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    usable = first is not None and first.kind in (first.POSITIONAL_OR_KEYWORD, first.KEYWORD_ONLY)
    return {first.name if first is not None and usable else "": inputs}


def _seed(
    model: nn.Module, inputs: Mapping[str, Any], recording: Recording, target: Target
) -> tuple[Tensor, str, Any, int, Tensor]:
    """Return the explained values, words for them, the root (node, output) and the coefficients sent from it."""
    scores, places, words = selected(recording.output, scored(recording, target), inputs)
    if not scores.requires_grad:
        raise InputError("the output doesn't depend on parameters or inputs by autograd; is it detached in the model?")
    value = scores.detach()[places]
    if not bool(value.isfinite().all()):
        raise InputError(f"the explained output is {value.flatten()[0].item()}; {_first_nan(model, inputs)}")
    seed = torch.zeros_like(scores, dtype=torch.promote_types(scores.dtype, torch.float32))
    seed[places] = 1.0
    edge = get_gradient_edge(scores)
    return value, words, edge.node, edge.output_nr, seed


def _place_taps(sweep: Sweep, model: nn.Module, at: Sequence[Where], rules: Rules) -> None:
    outs, ins = tapped(model, at)
    for name in [*outs, *(place for places in ins.values() for place in places)]:
        for place in sweep.tape.places.get(name, ()):
            sweep.tapped.setdefault(place, []).append(name)
    for name, chosen in rules.channels.items():
        for place in sweep.tape.places.get(name, ()):
            width = sweep.tape.shapes[place[0]][place[1]]
            axis = 1 if len(width) > 3 else len(width) - 1
            if max(chosen) >= width[axis] or min(chosen) < 0:
                raise InputError(f"{name!r} has channels 0 to {width[axis] - 1}; {max(chosen)} was asked for")
            sweep.channels[place] = list(chosen)


def check_length(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse a text that is longer than the model reads."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    ids = inputs.get("input_ids")
    if isinstance(longest, int) and isinstance(ids, Tensor) and ids.shape[-1] > longest > 0:
        raise InputError(f"the text has {ids.shape[-1]} tokens; the model reads {longest}")


def _first_nan(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Say where numbers end: the first module whose inputs were finite and whose output isn't."""
    first: list[str] = []

    def watch(x: Tensor) -> Tensor:
        return x.isfinite().all() if x.is_floating_point() else torch.tensor(True)

    with torch.no_grad(), capture(model, lambda name, module: bool(name), keep=watch) as seen:
        given = dict(inputs)
        model(*((given.pop(""),) if "" in given else ()), **given)
    for name in seen:
        for call in seen[name]:
            leaf = call if isinstance(call, Tensor) else next((x for x in call if isinstance(x, Tensor)), None)
            if leaf is not None and not bool(leaf.all()) and not any(n.startswith(name + ".") for n in first):
                first.append(name)
    inner = [name for name in first if not any(other.startswith(name + ".") for other in first)]
    return f"the first module whose output is not finite is {inner[0]!r}" if inner else "check the inputs"


Explainer = Callable[[nn.Module, dict[str, Any], Target, Sequence[Where], Any], Relevance]
"""(model, inputs, target, at, baseline) -> relevance: what a method that is no rule set looks like."""
