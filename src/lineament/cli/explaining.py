"""`lineament explain`, `scope` and `coverage`: where an output comes from, and which operators a model is made of."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lineament.cli.conversion import Json, Model

Rules = Annotated[str, typer.Option(help="Rule set or method: auto, attnlrp, relp, epsilon, integrated-gradients, ...")]


def explain(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Text for a language model to go on from.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture for an image classifier.")] = None,
    target: Annotated[str | None, typer.Option(help="Word (or class number) to explain, else the likeliest.")] = None,
    rules: Rules = "auto",
    unknown: Annotated[
        str, typer.Option(help="For operators without a rule: raise, or vjp (their gradient; the ledger stays open).")
    ] = "raise",
    paths: Annotated[int, typer.Option(min=0, help="How many of the largest paths of relevance to look for.")] = 0,
    beam: Annotated[int, typer.Option(min=1, help="Ways followed at a time on the search for paths.")] = 64,
    site: Annotated[
        list[str] | None, typer.Option(help="What paths can pass, by module name or glob; else heads and MLPs.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the heat map here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the heat map here.")] = None,
    json: Json = False,
) -> None:
    """Show which words or places an output comes from, with a ledger of where relevance ended.

    Example: lineament explain smollm2 --text "The capital of France is" --paths 10 --html why.html
    """
    from lineament.cli.messages import answer, quiet, require_writable
    from lineament.convert.progress import Progress
    from lineament.explain.reading import explain_image, explain_text

    require_writable(html, png)
    quiet()
    with Progress() as progress:
        routed = {"top": paths, "beam": beam, "sites": site or None, "said": progress.step} if paths else {}
        found = _read(explain_text, explain_image, model, text, image, target, rules=rules, unknown=unknown, **routed)
    answer(found, json, html=html, png=png)


def scope(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Text for a language model to go on from.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture for an image classifier.")] = None,
    target: Annotated[str | None, typer.Option(help="Word (or class number) to read, else the likeliest.")] = None,
    singular: Annotated[int, typer.Option(min=0, help="How many singular values; each takes tens of passes.")] = 4,
    center: Annotated[str, typer.Option(help="Norms subtract the mean of the data or of the probe.")] = "data",
    gate: Annotated[str, typer.Option(help="Products of two live tensors: half each, or linear.")] = "half",
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    json: Json = False,
) -> None:
    """Read a model as the affine map f(x) = A x + r it is for one input: votes, bias response, singular basis.

    Example: lineament scope smollm2 --text "The capital of France is" --html scope.html
    """
    from lineament.cli.messages import answer, quiet, require_writable
    from lineament.explain.scope_reading import scope_image, scope_text

    require_writable(html)
    quiet()
    choices = {"singular": singular, "center": center, "gate": gate}
    found = _read(scope_text, scope_image, model, text, image, target, **choices)
    answer(found, json, html=html)


def _read(
    by_text: Any, by_image: Any, model: str, text: str | None, image: Path | None, target: str | None, **options: Any
) -> Any:
    """Read a text or a picture, whichever was given."""
    from lineament._base.errors import InputError

    if text is not None and image is None:
        return by_text(model, text, target=target, **options)
    if image is None or text is not None:
        raise InputError("give either --text or --image")
    if target is not None and not target.isdigit():
        raise InputError(f"--target is {target!r}; for pictures it is a class number")
    return by_image(model, image, target=None if target is None else int(target), **options)


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
