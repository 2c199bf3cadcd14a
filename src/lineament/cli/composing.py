"""`lineament compose` and `lineament signature`: task vectors with learned coefficients, and patches of robustness."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="What to write; must not exist.")]


def compose(
    base: Annotated[str, typer.Argument(help="The model that the others were tuned from.")],
    tuned: Annotated[list[str], typer.Argument(help="Models tuned from it, or LoRA adapters on it.")],
    out: Out,
    data: Annotated[
        str, typer.Option(help="Text to fit the coefficients on: a known name, a file, a folder.")
    ] = "wiki-sample",
    steps: Annotated[int, typer.Option(help="Steps of fitting.")] = 60,
    lr: Annotated[float, typer.Option(help="Learning rate of the coefficients.")] = 0.05,
    tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    parts: Annotated[int, typer.Option(help="Random parts per tensor, each with its coefficient.")] = 1,
    budget: Annotated[int | None, typer.Option(help="Mix this many task vectors block by block; default: all.")] = None,
    blocks: Annotated[str, typer.Option(help="Glob of the tensors that may move.")] = "*",
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    json: Json = False,
) -> None:
    """Compose task vectors with one learned coefficient per tensor (aTLAS), fitted on a little text.

    Example: lineament compose smollm2 tuned-a tuned-b --data notes.txt -o composed
    """
    from lineament import io
    from lineament.cli.messages import print_json, quiet, require_new, show
    from lineament.weights import Point
    from lineament.weights.compose_text import compose_on_text

    quiet()
    require_new(out)
    composed, losses = compose_on_text(
        base, tuned, data=data, steps=steps, lr=lr, tokens=tokens, parts=parts, budget=budget, blocks=blocks, seed=seed
    )
    table = composed.table()
    # config and tokenizer are the base's, whatever the module or a tuned model brought along
    point = replace(composed.point(), folder=Point.open(base).folder)
    point.save(out, finish=lambda folder: io.write_json(folder / "coefficients.json", table))
    numbers = composed.coefficients.numel()
    if json:
        print_json({"out": str(out), "losses": losses, "coefficients": numbers})
    else:
        said = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        show(f"loss on held-out text, nats per token: {said}", f"{numbers} coefficients; composed: {out}")


signature = typer.Typer(no_args_is_help=True, help="Patch robustness into a model and take it out again (RWS).")


@signature.command("extract")
def extract(
    base: Annotated[str, typer.Argument(help="What both others were tuned from.")],
    clean: Annotated[str, typer.Argument(help="Tuned on clean data.")],
    corrupted: Annotated[str, typer.Argument(help="Tuned on corrupted data, otherwise the same.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A .safetensors file; must not exist.")],
    keep: Annotated[list[str] | None, typer.Option(help="Globs of the tensors to keep, the first layers say.")] = None,
    levels: Annotated[int | None, typer.Option(help="Quantise to so many levels; 16 are 4 bits.")] = None,
    scheme: Annotated[str, typer.Option(help="linear, log or tanh.")] = "linear",
    clip: Annotated[float, typer.Option(help="Share of outliers at each end that saturate.")] = 0.0,
    json: Json = False,
) -> None:
    """Take the part of a corrupted update that the clean update lacks.

    Example: lineament signature extract base clean noisy --keep 'model.layers.0.*' --levels 16 -o noise.safetensors
    """
    from lineament.cli.messages import require_new
    from lineament.weights import signature as room
    from lineament.weights.sources import open_named

    require_new(out)
    found = room.extract(*map(open_named, (base, clean, corrupted)), keep=keep or ["*"])
    _said(room.save_signature(found, out, levels=levels, scheme=scheme, clip=clip), out, json)


@signature.command("quantise")
def quantise(
    source: Annotated[Path, typer.Argument(help="A signature.")],
    out: Out,
    levels: Annotated[int, typer.Option(help="Levels; 16 are 4 bits.")] = 16,
    scheme: Annotated[str, typer.Option(help="linear, log or tanh.")] = "linear",
    clip: Annotated[float, typer.Option(help="Share of outliers at each end that saturate.")] = 0.0,
    json: Json = False,
) -> None:
    """Store a signature in few bits. Example: lineament signature quantise noise.safetensors -o small.safetensors"""
    from lineament.cli.messages import require_new
    from lineament.weights import signature as room

    require_new(out)
    _said(room.save_signature(room.load_signature(source), out, levels=levels, scheme=scheme, clip=clip), out, json)


@signature.command("combine")
def combine(
    sources: Annotated[list[Path], typer.Argument(help="Signatures.")],
    out: Out,
    weight: Annotated[list[float] | None, typer.Option(help="One per signature; default: their mean.")] = None,
    json: Json = False,
) -> None:
    """Add signatures up. Example: lineament signature combine blur.safetensors noise.safetensors -o both.safetensors"""
    from lineament._base.errors import InputError
    from lineament.cli.messages import require_new
    from lineament.weights import signature as room

    require_new(out)
    if weight and len(weight) != len(sources):
        raise InputError(
            f"--weight was given {len(weight)} times for {len(sources)} signatures; expected one per signature"
        )
    total = None
    for source, w in zip(sources, weight or [1 / len(sources)] * len(sources), strict=True):
        part = room.load_signature(source) * w
        total = part if total is None else total + part
    assert total is not None
    _said(room.save_signature(total, out), out, json)


@signature.command("apply")
def apply(
    model: Annotated[str, typer.Argument(help="A clean model.")],
    signatures: Annotated[list[Path], typer.Argument(help="Signatures; their mean is added.")],
    out: Out,
    alpha: Annotated[float, typer.Option(help="How strongly.")] = 1.0,
    json: Json = False,
) -> None:
    """Patch a model. Example: lineament signature apply clean noise.safetensors --alpha 0.8 -o patched"""
    from lineament.weights import signature as room
    from lineament.weights.sources import open_named

    room.apply(open_named(model), [room.load_signature(path) for path in signatures], out, alpha=alpha)
    _said({}, out, json)


@signature.command("remove")
def remove(
    model: Annotated[Path, typer.Argument(help="A model that `signature apply` wrote.")], out: Out, json: Json = False
) -> None:
    """Restore a patched model to the last bit. Example: lineament signature remove patched -o clean"""
    from lineament.weights import signature as room

    room.remove(model, out)
    _said({}, out, json)


def _said(told: dict[str, Any], out: Path, json: bool) -> None:
    from lineament.cli.messages import print_json, show

    if json:
        print_json({"out": str(out), **told})
    else:
        size = f": {told['bytes']:,.0f} bytes ({told['float32']:,.0f} as float32)" if told else ""
        show(f"wrote {out}{size}")
