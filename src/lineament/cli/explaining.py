"""`lineament explain` and `coverage`: where an output comes from, and which operators a model is made of."""

from pathlib import Path
from typing import Annotated

import typer

from lineament.cli.conversion import Json, Model

Rules = Annotated[str, typer.Option(help="Rule set or method: auto, attnlrp, relp, epsilon, integrated-gradients, ...")]


def explain(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Text for a language model to go on from.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture for an image classifier.")] = None,
    target: Annotated[str | None, typer.Option(help="Word (or class number) to explain, else the likeliest.")] = None,
    rules: Rules = "auto",
    html: Annotated[Path | None, typer.Option(help="Write a page with the heat map here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the heat map here.")] = None,
    json: Json = False,
) -> None:
    """Show which words or places an output comes from, with a ledger of where relevance ended.

    Example: lineament explain smollm2 --text "The capital of France is" --html why.html
    """
    from lineament._base.errors import InputError
    from lineament.cli.messages import print_json, quiet, show
    from lineament.explain.reading import explain_image, explain_text

    quiet()
    if (text is None) == (image is None):
        raise InputError("give either --text or --image")
    if text is not None:
        found = explain_text(model, text, target=target, rules=rules)
    else:
        assert image is not None
        if target is not None and not target.isdigit():
            raise InputError(f"--target is {target!r}; for pictures it is a class number")
        found = explain_image(model, image, target=None if target is None else int(target), rules=rules)
    written = [found.write_html(html)] if html else []
    written += [found.write_png(png)] if png else []
    if json:
        print_json(found.to_json())
    else:
        show(*found.tables(), *(f"written: {path}" for path in written))


def coverage(
    model: Model,
    text: Annotated[str, typer.Option(help="Text to run the model on.")] = "The capital of France is",
    rules: Rules = "auto",
    json: Json = False,
) -> None:
    """List the operators a model is made of, with their counts and relevance rules; exit 1 if one has none.

    Example: lineament coverage smollm2
    """
    from lineament.cli.messages import print_json, quiet, show
    from lineament.explain.reading import coverage_of
    from lineament.report import table

    quiet()
    rows = coverage_of(model, text, rules=rules)
    if json:
        print_json(rows)
    else:
        total, covered = (sum(row["count"] for row in rows if row["covered"] or all_) for all_ in (True, False))
        show(table(rows, title=f"{covered} of {total} nodes have a rule"))
    if not all(row["covered"] for row in rows):
        raise typer.Exit(1)
