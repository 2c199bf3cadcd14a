"""`lineament bricks`: what a model's neurons do, and how many of them a token can skip."""

from pathlib import Path
from typing import Annotated

import typer

from lineament.cli.conversion import Json, Model


def bricks(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the fastest model within the limit; must not exist.")
    ] = None,
    most: Annotated[float, typer.Option(help="Largest perplexity allowed, relative to the whole model's.")] = 1.1,
    data: Annotated[str, typer.Option(help="Text: a known name, a file, a folder.")] = "wiki-sample",
    kind: Annotated[
        list[str] | None, typer.Option(help="Texts as functions of neurons; repeatable, one alone for none.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="gate or product; default: both are tried.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each part: to set, to choose, to report.")] = 2048,
    speed: Annotated[bool, typer.Option(help="Time decoding too.")] = True,
    html: Annotated[Path | None, typer.Option(help="Write a one-file report here.")] = None,
    json: Json = False,
) -> None:
    """Measure a model's neurons: how many are silent, what they are for, how many can be skipped; exit 1 if none can.

    Example: lineament bricks smollm2 --html bricks.html -o sparse
    """
    from rich.console import Console

    from lineament.cli.messages import print_json, quiet, require_new, require_writable, show
    from lineament.report import table
    from lineament.weights import bricks_text as room

    require_writable(html)
    quiet()
    if out is not None:
        require_new(out)
    with Console(stderr=True).status("loading") as status:
        found = room.study(
            model, text=data, kinds=tuple(kind or room.TEXTS), tokens=tokens, limit=most, speed=speed, out=out,
            by=room.WAYS if by is None else (by,), say=status.update,
        )  # fmt: skip
    written = [found.write_html(html)] if html else []
    if json:
        print_json(found.to_json())
    else:
        show(table(found.curve, title="the quietest neurons of every token silent (oracle)"))
        show(*([table(found.functions, title="5 % best neurons out: rise of perplexity")] if found.functions else []))
        show(table(found.skipping, title=f"skipped while decoding; limit {most:g}"))
        show(*(f"written: {path}" for path in [*written, *([out] if out and found.chosen else [])]))
    if found.chosen is None:
        raise typer.Exit(1)
