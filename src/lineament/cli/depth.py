"""`lineament depth`: what the layers of a language model are used for."""

from pathlib import Path
from typing import Annotated

import typer

from lineament.cli.conversion import Json, Model, Work


def depth(
    model: Model,
    data: Annotated[str, typer.Option(help="Text: a known name, a file or a folder.")] = "python-topics",
    texts: Annotated[int, typer.Option(min=1, help="How many windows are read.")] = 4,
    tokens: Annotated[int, typer.Option(min=14, help="Tokens in a window.")] = 128,
    cuts: Annotated[int, typer.Option(min=1, help="Places per window that part past from future.")] = 2,
    to: Annotated[str | None, typer.Option(help="Another model of the same tokenizer, to map onto.")] = None,
    levels: Annotated[Path | None, typer.Option(help='JSON {"level": ["text", ...]}: depth scores by level.')] = None,
    seed: Annotated[int, typer.Option(help="Of the cuts.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    work: Work = None,
    json: Json = False,
) -> None:
    """Report what each layer writes, what skipping it changes, and where the output is known.

    The same command goes on where it was interrupted if it writes a page or is given --work.
    Example: lineament depth smollm2 --html depth.html
    """
    from lineament._base.errors import InputError
    from lineament.cli.messages import answer, quiet, require_writable, work_folder
    from lineament.convert.progress import Progress
    from lineament.explain.depth_reading import read_depth
    from lineament.io import read_json

    require_writable(html)
    quiet()
    given = read_json(levels) if levels else None
    if given is not None and not (isinstance(given, dict) and all(isinstance(x, list) and x for x in given.values())):
        raise InputError(f'{levels} is no {{"level": ["text", ...]}}')

    with Progress() as progress:
        found = read_depth(
            model, text=data, texts=texts, tokens=tokens, cuts=cuts, to=to, levels=given, seed=seed,
            progress=progress.step, work=work_folder(work, html),
        )  # fmt: skip
    answer(found, json, html=html)
