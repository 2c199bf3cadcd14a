"""Attribution graphs: how tokens, features and what features leave unexplained add up to features and logits.

With attention patterns and norm scales constant, and MLPs replaced by what their features write, a model is linear: a
feature's pre-activation is a sum over everything written before it. One backward sweep of the relevance engine per
target gives every summand (Dunefsky et al. 2024, arXiv:2406.11944; Ameisen et al. 2025).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament._base.errors import InputError
from lineament.explain.dictionaries.activations import Said
from lineament.explain.dictionaries.hooks import Placed, check_layers
from lineament.explain.linear import wide
from lineament.explain.operators import OPERATORS
from lineament.explain.places import first_tensor, replaced, run, values_at
from lineament.explain.recording import module_of
from lineament.explain.relevance import propagate
from lineament.explain.rules import RELP_AH, Rules
from lineament.graph import capture
from lineament.models import adapter_for
from lineament.nn import ConvertedHeads

FROZEN = replace(RELP_AH, name="frozen", gate="gradient")
"""Norm scales and attention patterns constant; nothing else of a model's attention is not linear."""


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        kind: "token", "feature", "error" (what a dictionary leaves unexplained), "mlp" (one without a dictionary),
            "bias", or "logit".
        layer: where it is written; -1 for tokens. position: of its token.
        index: the feature, or the token of the vocabulary.
        value: of the feature or logit; for the others 1.
    """

    kind: str
    layer: int
    position: int
    index: int = -1
    value: float = 1.0

    @property
    def name(self) -> str:
        """A name such as "t10.57@3": feature 57 of layer 10 at position 3."""
        what = {"token": "embed", "error": f"e{self.layer}", "mlp": f"m{self.layer}", "bias": "biases"}.get(self.kind)
        if what is None:
            what = f"logit.{self.index}" if self.kind == "logit" else f"t{self.layer}.{self.index}"
        return what if self.kind == "bias" else f"{what}@{self.position}"


@dataclass(frozen=True)
class Sources:
    """Nodes that write, and what they write.

    Attributes:
        nodes: in the order of the model. places: where in the model each writes, "" for biases.
        vectors: [S, D].
    """

    nodes: list[Node]
    places: list[str]
    vectors: Tensor


@dataclass(frozen=True)
class Targets:
    """Nodes that read: at `place`, each at its position, the number <what is there, direction> + offset."""

    nodes: list[Node]
    place: str
    directions: Tensor
    offsets: Tensor


class Frozen:
    """A model on one text, and what its dictionaries make of it."""

    def __init__(self, model: nn.Module, ids: Tensor, dictionaries: Sequence[Placed]) -> None:
        self.model, self.ids, self.by_layer = model, ids, check_layers(dictionaries)
        for each in dictionaries:
            if each.reads == each.writes:
                raise InputError(f"{each.writes} has an autoencoder; attribution graphs lead through transcoders")
        self.adapter = adapter_for(model)
        if not self.adapter.reads:
            raise InputError(f"what writes the residual stream of {self.adapter.model_type} is not known")
        self.layers: Any = model.get_submodule(self.adapter.layers)
        self.start = f"{self.adapter.layers}.0:input"
        self.head = f"{self.adapter.head}:input"
        self.written = {i: self._mlp(i) for i in range(len(self.layers))}
        reads = [each.reads for each in dictionaries]
        self.values = values_at(model, {"input_ids": ids}, [self.start, self.head, *self.written.values(), *reads])
        self.values = {place: x[0] for place, x in self.values.items()}
        self.biased = self._biased()

    def _mlp(self, layer: int) -> str:
        each = self.by_layer.get(layer)
        return each.writes if each else f"{self.adapter.layers}.{layer}.{self.adapter.writes[1]}"

    def _biased(self) -> dict[str, Tensor]:
        """Return the constants that modules outside the MLPs add: biases of norms and of attention."""
        found = {}
        for name, module in self.model.named_modules():
            bias = getattr(module, "bias", None)
            within = name.startswith(f"{self.adapter.layers}.") or name == self.adapter.norm
            if (
                isinstance(bias, Tensor)
                and within
                and not any(f"{name}.".startswith(f"{self._module(layer)}.") for layer in self.written)
            ):
                found[name] = bias.detach()
        return found

    def _module(self, layer: int) -> str:
        return f"{self.adapter.layers}.{layer}.{self.adapter.down.rpartition('.')[0] or self.adapter.down}"

    @torch.no_grad()
    def sources(self) -> Sources:
        """Return every node that writes."""
        x = self.values[self.start]
        nodes = [Node("token", -1, t, int(self.ids[0, t])) for t in range(len(x))]
        places, vectors = [self.start] * len(x), [x]
        for layer, place in self.written.items():
            y = self.values[place]
            kind = "mlp"
            if layer in self.by_layer:
                d = self.by_layer[layer].dictionary
                z, index = d.active(self.values[self.by_layer[layer].reads])
                on = (z > 0).nonzero()
                nodes += [Node("feature", layer, t, int(index[t, j]), float(z[t, j])) for t, j in on.tolist()]
                vectors.append(z[z > 0][:, None] * d.W_dec[index[z > 0]])
                places += [place] * len(on)
                y, kind = y - d(self.values[self.by_layer[layer].reads]), "error"
            nodes += [Node(kind, layer, t) for t in range(len(y))]
            places += [place] * len(y)
            vectors.append(y)
        return Sources(nodes, places, torch.cat(vectors))

    def features(self, nodes: Sequence[Node]) -> list[Targets]:
        """Return features as targets, a group per layer; the number is the pre-activation."""
        found = []
        for layer, each in self.by_layer.items():
            own = [node for node in nodes if node.kind == "feature" and node.layer == layer]
            if own:
                at, d = torch.tensor([node.index for node in own]), each.dictionary
                offsets = d.b_enc[at] if d.b_read is None else d.b_enc[at] - d.W_enc[at] @ d.b_read
                found.append(Targets(own, each.reads, wide(d.W_enc[at].detach()), offsets.detach()))
        return found

    def logits(self, *, mass: float, most: int, chosen: Sequence[int] | None) -> Targets:
        """Return the likeliest tokens after the text as targets, each less the mean over the vocabulary."""
        with torch.no_grad():
            logits = run(self.model, {"input_ids": self.ids}).logits[0, -1].float()
            probabilities = logits.softmax(-1)
            order = probabilities.argsort(descending=True)[:most]
            count = int((probabilities[order].cumsum(0) < mass).sum()) + 1
            at = order[:count] if chosen is None else torch.tensor(list(chosen))
            head: Any = self.model.get_submodule(self.adapter.head)
            W, b = wide(head.weight.detach()), head.bias
            directions = W[at] - W.mean(0)
            offsets = torch.zeros(len(at)).to(W) if b is None else b[at] - b.mean()
        t, layer = self.ids.shape[1] - 1, len(self.layers)
        nodes = [Node("logit", layer, t, i, float(probabilities[i])) for i in at.tolist()]
        return Targets(nodes, self.head, directions, offsets.detach())

    def edges(self, targets: Targets, sources: Sources, *, rows: int = 32, said: Said | None = None) -> Tensor:
        """Return what each source adds to each target, [targets, sources + 1]; the last column are the constants.

        A row adds up to the target's number.
        """
        found = []
        for i in range(0, len(targets.nodes), rows):
            part = range(i, min(i + rows, len(targets.nodes)))
            found.append(self._swept(targets, list(part), sources))
            if said:
                said(f"edges into {targets.place}", part.stop, len(targets.nodes))
        return torch.cat(found)

    def _swept(self, targets: Targets, part: list[int], sources: Sources) -> Tensor:
        u, at = targets.directions[part], torch.tensor([targets.nodes[i].position for i in part])
        module = module_of(targets.place)
        inputs, outputs = module != targets.place, module == targets.place
        with ExitStack() as stack:
            stack.enter_context(self._constant_mlps())
            stack.enter_context(self._constant_patterns())
            seen = stack.enter_context(capture(self.model, module, inputs=inputs, outputs=outputs, detach=False))

            def read(output: Any) -> Tensor:
                held = seen[module][0]
                x = first_tensor(held)
                return (x[torch.arange(len(part)), at] * u.to(x)).sum(-1)

            places = [self.start, *self.written.values(), *self.biased]
            given = {"input_ids": self.ids.expand(len(part), -1)}
            swept = propagate(
                self.model, given, target=read, rules=self.rules(), at=places, counting=False, coefficients_only=True
            ).sweep.at  # fmt: skip
        arrived = {place: messages[0] for place, messages in swept.items()}
        found = u.new_zeros(len(part), len(sources.nodes) + 1)
        for place in dict.fromkeys(sources.places):
            if place in arrived:
                own = torch.tensor([j for j, where in enumerate(sources.places) if where == place])
                positions = torch.tensor([sources.nodes[j].position for j in own.tolist()])
                found[:, own] = torch.einsum(
                    "bsd,sd->bs", arrived[place][:, positions].to(u), sources.vectors[own].to(u)
                )
        found[:, -1] = targets.offsets[part] + self._constants(arrived, u)
        return found

    def _constants(self, arrived: Mapping[str, Tensor], u: Tensor) -> Any:
        """Return what biases of dictionaries, norms and attention add to each target."""
        total: Any = 0
        for layer, each in self.by_layer.items():
            if self.written[layer] in arrived:
                total = total + (arrived[self.written[layer]].to(u) @ each.dictionary.b_dec.detach().to(u)).sum(1)
        for name, bias in self.biased.items():
            if name in arrived:
                total = total + (arrived[name].to(u) @ bias.to(u)).sum(1)
        return total

    def rules(self) -> Rules:
        """Return the rules of a frozen model: what arrives at an MLP goes no further."""
        stops = dict.fromkeys(OPERATORS, _stop)
        silent = replace(FROZEN, operators=stops, unknown="vjp")
        skipping = [layer for layer, each in self.by_layer.items() if each.dictionary.config.skip]
        wheres = {self._module(layer): silent for layer in self.written if layer not in skipping}
        mixers = [name for name, module in self.model.named_modules() if isinstance(module, ConvertedHeads)]
        # (a short convolution runs over keys and values at once, so keys look as if they depended on the model)
        return replace(FROZEN, where=wheres | dict.fromkeys(mixers, replace(FROZEN, attention="gradient")))

    @contextmanager
    def _constant_mlps(self) -> Iterator[None]:
        """Let what MLPs with a skip give depend on their input by the skip alone; no number changes."""
        read: dict[int, Tensor] = {}

        def change(layer: int, W: Tensor) -> Any:
            def only_skip(y: Tensor) -> Tensor:
                through = read.pop(layer) @ W.to(y).T
                return y.detach() + (through - through.detach())

            return only_skip

        with ExitStack() as hooks:
            for layer, each in self.by_layer.items():
                if each.dictionary.config.skip:
                    keep = lambda x, layer=layer: read.update({layer: x}) or x  # noqa: E731
                    hooks.enter_context(replaced(self.model, each.reads, keep))
                    hooks.enter_context(replaced(self.model, each.writes, change(layer, each.dictionary.W_skip)))
            yield

    @contextmanager
    def _constant_patterns(self) -> Iterator[None]:
        """Let what a student's mixers give depend on the values alone; no number changes.

        A softmax layer's pattern is one operator with a rule of its own; a mixer's is made by many.
        """

        def values_alone(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            q, k, v = args
            return (q.detach(), k.detach(), v), kwargs | {"x": kwargs["x"].detach()}

        with ExitStack() as hooks:
            for module in self.model.modules():
                if isinstance(module, ConvertedHeads):
                    hook = module.register_forward_pre_hook(values_alone, with_kwargs=True)
                    hooks.callback(hook.remove)
            yield


def _stop(step: Any) -> None:
    """Hand nothing on."""


def into_feature(
    model: nn.Module, ids: Tensor, dictionaries: Sequence[Placed], *, layer: int, position: int, feature: int
) -> dict[Node, float]:
    """Return what each node adds to a feature's pre-activation on a text; "biases" are a node, all add up to it.

    Args:
        ids: [1, T]. dictionaries: transcoders, one of them of `layer`.

    Raises:
        InputError: a layer without a dictionary, a feature outside it, or a position outside the text.
    """
    frozen = Frozen(model, ids, dictionaries)
    if layer not in frozen.by_layer:
        raise InputError(f"layer {layer} has no dictionary; there are dictionaries for {sorted(frozen.by_layer)}")
    frozen.by_layer[layer].dictionary.check([feature])
    if not 0 <= position < ids.shape[1]:
        raise InputError(f"position {position} is outside the text's 0 to {ids.shape[1] - 1}")
    sources = frozen.sources()
    row = frozen.edges(frozen.features([Node("feature", layer, position, feature)])[0], sources)[0].tolist()
    before = {node: w for node, w in zip(sources.nodes, row, strict=False) if node.layer < layer}
    return before | {Node("bias", layer, position): row[-1]}
