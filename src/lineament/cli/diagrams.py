"""`lineament diagram`: a model's architecture, every wire an axis."""

from pathlib import Path
from typing import Annotated

import typer

from lineament.cli.conversion import Json, Model


def diagram(
    model: Model,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write .svg, .html, .txt or .json here.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the example text; an odd size is easy to spot.")] = 13,
    fold: Annotated[bool, typer.Option(help="Draw blocks that repeat once, with how often.")] = True,
    check: Annotated[bool, typer.Option(help="Run the diagram beside the model in float64.")] = False,
    json: Json = False,
) -> None:
    """Draw a model as a neural circuit diagram: axes as wires, what is summed, shared, copied and learned.

    Without -o the diagram is told in words. Example: lineament diagram smollm2 -o smollm2.svg --check
    """
    from lineament._base.errors import InputError
    from lineament.cli.messages import answer, quiet, require_writable
    from lineament.explain.diagram_reading import read_diagram

    require_writable(out)
    quiet()
    if out is not None and out.suffix not in (".svg", ".html", ".txt", ".json"):
        raise InputError(f"{out} ends in {out.suffix or 'nothing'!r}; expected .svg, .html, .txt or .json")
    found = read_diagram(model, tokens=tokens, fold=fold, check=check)
    answer(found, json, found.diagram.write(out, fold=fold) if out else None)
