"""`lineament blindspots`: another picture that an image classifier takes for the same."""

from pathlib import Path
from typing import Annotated

import typer

from lineament.cli.conversion import Json


def blindspots(
    model: Annotated[str, typer.Argument(help="A folder or Hub name of an image classifier.")],
    image: Annotated[Path, typer.Option(help="The picture to begin with.")],
    target: Annotated[Path, typer.Option(help="The picture to walk towards.")],
    steps: Annotated[int, typer.Option(min=0, help="Steps.")] = 400,
    rate: Annotated[float, typer.Option(help="Share of the way per step.")] = 1e-2,
    parallel: Annotated[float, typer.Option(help="Largest step along the gradient, which restores confidence.")] = 2e-3,
    tolerance: Annotated[float, typer.Option(help="Confidence that may be lost.")] = 0.2,
    slope: Annotated[str, typer.Option(help="Gradient of the loss or of the logit margin.")] = "loss",
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    json: Json = False,
) -> None:
    """Walk from one picture towards another while the classifier stays as sure of the first one's class.

    Example: lineament blindspots ./vit --image cat.jpg --target dog.jpg --html blind.html
    """
    from lineament.cli.messages import answer, quiet, require_writable
    from lineament.explain.blindspots_reading import walk

    require_writable(html)
    quiet()
    found = walk(model, image, target, steps=steps, rate=rate, parallel=parallel, tolerance=tolerance, slope=slope)
    answer(found, json, html=html)
