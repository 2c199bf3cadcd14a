"""Interchange interventions on one layer: some coordinates of an alignment map's image come from another input."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lineament._base.errors import InputError
from lineament.explain.places import first_tensor, one_place, replaced, run
from lineament.explain.recording import accepts, check_mode, module_of
from lineament.explain.relevance import named
from lineament.explain.restart import decoder_layers
from lineament.graph import Where, capture, logits_in, output_from
from lineament.tasks import Examples, Interventions

Blocks = Mapping[str, slice]
"""Variable -> the coordinates of the map's image that stand for it."""


class Layer:
    """One layer of a model in eval mode, with what it passes on for some examples, computed once.

    Hidden states do not depend on the map, so its search only runs what comes after the layer. In a decoder whose
    layers are known that is all that runs; any other model runs whole, with the layer's output exchanged.

    Args:
        model: any module. layer: a module of it (`Where`, or TransformerLens's name), a name that ends in ":input" for
            what it receives.
        examples: inputs; hidden states [N, T, D] are read at `examples.positions`, all others flattened to [N, D].
        batch: rows of a forward pass.

    Attributes:
        hidden: [N, D], float32 or wider.

    Raises:
        InputError: no such layer, or several; it holds NaN; a position outside the text; the model would drop out.
    """

    def __init__(self, model: nn.Module, layer: Where, examples: Examples, *, batch: int = 1024) -> None:
        check_mode(model)
        self.model, self.examples, self.batch = model, examples, batch
        self.name, self.inputs = one_place(model, layer), named(model, examples.inputs)
        self.layers = decoder_layers(model)[0]
        self.start = self.layers.index(self.name) + 1 if self.name in self.layers else 0
        self.positions: Tensor | None = None
        whole = torch.cat([self._passed_on(self._rows(rows)) for rows in self._chunks()])
        if whole.dim() == 3:
            self.positions = _positions(examples, self.inputs, whole.shape[1])
        self.whole = whole if self.start else None
        hidden = self._at(whole, self.positions)
        self.hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if not bool(self.hidden.isfinite().all()):
            raise InputError(f"{self.name!r} passes on NaN or infinity for some examples")

    def answers(self, rows: Tensor, new: Tensor | None = None) -> Tensor:
        """Return the scores [n, C] of some rows, with `new` [n, D] in place of their hidden states if given."""
        inputs, kept = self._rows(rows), None
        at = None if self.positions is None else self.positions[rows.to(self.positions.device)]
        if at is not None and accepts(self.model, "logits_to_keep"):
            kept = at.unique()
            inputs["logits_to_keep"] = kept

        def change(x: Tensor) -> Tensor:
            return x if new is None else self._put(x, at, new)

        if self.start:
            assert self.whole is not None
            output = output_from(self.model, self.layers, self.start, change(self.whole[rows]), inputs)
        else:
            with replaced(self.model, self.name, change):
                output = run(self.model, inputs)
        scores = logits_in(output)
        if scores.dim() == 3 and at is not None:
            at = at if kept is None else torch.searchsorted(kept, at)
            scores = scores[torch.arange(len(scores)), at.to(scores.device)]
        if scores.dim() != 2:
            raise InputError(f"the model answers {list(scores.shape)}; expected [N, classes], or [N, T, classes] at a "
                             "layer of [N, T, D]")  # fmt: skip
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def among(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Return the scores of the answers that the examples allow, [n, choices]."""
        choices = self.examples.choices
        return scores if choices is None else scores.gather(1, choices[rows].to(scores.device))

    def exchanged(self, phi: nn.Module, blocks: Blocks, drawn: Interventions) -> Tensor:
        """Return what stands at the layer [n, D] under interventions: `phi^-1` of the image with some blocks exchanged.

        Gradients reach phi through the base, the sources and the inverse. Sources are mapped where the mask is on only.
        """
        device = next((p.device for p in phi.parameters()), self.hidden.device)
        h, (rows, j) = self.hidden[drawn.base].to(device), drawn.mask.nonzero(as_tuple=True)
        with parametrize.cached():  # an orthogonal matrix is made once a step
            image = phi(torch.cat([h, self.hidden[drawn.sources[rows, j]].to(device)]))
            z, sources = image[: len(h)].clone(), image[len(h) :]
            for index, block in enumerate(blocks.values()):
                z[rows[j == index], block] = sources[j == index, block]
            return phi.inverse(z, h)  # pyright: ignore[reportCallIssue]

    def _chunks(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self.examples)).split(self.batch)

    def _rows(self, rows: Tensor) -> dict[str, Any]:
        return {name: x[rows.to(x.device)] for name, x in self.inputs.items()}

    def _passed_on(self, inputs: Mapping[str, Any]) -> Tensor:
        module = module_of(self.name)
        received = module != self.name
        with (
            torch.no_grad(),
            capture(
                self.model, lambda name, _: name == module, inputs=received, outputs=not received, clone=True, stop=True
            ) as seen,
        ):
            run(self.model, inputs)
        if not seen[module]:
            raise InputError(f"{module!r} was not called by the model's forward; name a layer that is")
        found = first_tensor(seen[module][0])
        if not found.is_floating_point() or len(found) != len(next(iter(inputs.values()))):
            raise InputError(f"{self.name!r} holds {list(found.shape)}, {found.dtype}; expected floats, a row each")
        return found

    @staticmethod
    def _at(x: Tensor, positions: Tensor | None) -> Tensor:
        return x.flatten(1) if positions is None else x[torch.arange(len(x)), positions.to(x.device)]

    @staticmethod
    def _put(x: Tensor, positions: Tensor | None, new: Tensor) -> Tensor:
        if positions is None:
            return new.to(x).view(x.shape)
        return x.index_put((torch.arange(len(x), device=x.device), positions.to(x.device)), new.to(x))


def interchange(
    model: nn.Module, layer: Where, phi: nn.Module, blocks: Blocks, examples: Examples, drawn: Interventions
) -> Tensor:
    """Return a model's answers [n, C] under interchange interventions.

    `z = phi(h(base))`; `z[D_v] <- phi(h(source_v))[D_v]` where v is masked; the pass goes on with `phi^-1(z)`.

    Args:
        model, layer, examples: as for `align`. phi: a bijection of `nn` (`forward`, and `inverse(z, h)`).
        blocks: variable -> its coordinates, in the order of the mask. drawn: `tasks.interventions` or
            `tasks.counterfactual`.

    Raises:
        InputError: as for `align`.
    """
    site = Layer(model, layer, examples)
    check_blocks(blocks, site.hidden.shape[1])
    return site.among(site.answers(drawn.base, site.exchanged(phi, blocks, drawn)), drawn.base)


def check_blocks(blocks: Blocks, width: int) -> None:
    """Refuse blocks that overlap or are wider than the layer."""
    taken: set[int] = set()
    for name, block in blocks.items():
        mine = set(range(block.start or 0, block.stop))
        if not mine or taken & mine or block.stop > width:
            raise InputError(
                f"variable {name!r} stands at coordinates {block.start or 0} to {block.stop - 1}; the layer is {width} "
                "wide, and blocks neither overlap nor are empty"
            )
        taken |= mine


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let nothing of a model learn while the block runs; its flags are back after it."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


def _positions(examples: Examples, inputs: Mapping[str, Any], length: int) -> Tensor:
    if examples.positions is not None:
        at = examples.positions
        if not bool(((at >= -length) & (at < length)).all()):
            raise InputError(f"positions are {int(at.min())} to {int(at.max())}; the layer has {length} tokens")
        return at % length
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.full((len(examples),), length - 1)
    return length - 1 - mask.flip(1).long().argmax(1)  # the last unmasked token, whichever side is padded
