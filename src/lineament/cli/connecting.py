"""`lineament connect` and `align`: are two models joined by a line, and bringing one onto the other."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A language model: folder, Hub name, GGUF file, smollm2, base+lora.")]
Restarts = Annotated[int, typer.Option(min=1, help="Random orders of matching; the best is kept.")]
Seed = Annotated[int, typer.Option(help="Of these orders.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def connect(
    a: Model,
    b: Model,
    text: Annotated[str, typer.Option(help="Text to score on: a name, file, folder or hub:NAME.")] = "wiki-sample",
    points: Annotated[int, typer.Option(min=3, help="Places along the line, ends included.")] = 11,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens scored at each place.")] = 8192,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    align: Annotated[bool, typer.Option(help="Bring B onto A first.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the curve here, as a PNG.")] = None,
    restarts: Restarts = 3,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure the loss along the straight line between two models, and how high it rises above its ends.

    Example: lineament connect tuned-a tuned-b --plot barrier.png
    """
    from lineament import io
    from lineament.cli.messages import print_json, quiet, require_writable, show
    from lineament.report import table
    from lineament.weights import language

    require_writable(plot)
    quiet()
    windows = language.text_windows(a, text, length=length, tokens=tokens)
    found = language.connect_models(a, b, windows, points=points, align=align, restarts=restarts, seed=seed)
    if plot is not None:
        io.write_bytes(plot, found.figure())
    if json:
        print_json({"barrier": found.barrier, "peak": found.peak(), "aligned": align, "path": found.rows()})
    else:
        show(table(found.rows(), title=f"{a} to {b}"))
        show(f"barrier {found.barrier:.4g} nats per token at t = {found.peak():.2g}")
        show(*([f"plot: {plot}"] if plot else []))


def align(
    a: Model,
    b: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for B brought onto A; must not exist.")],
    restarts: Restarts = 3,
    seed: Seed = 0,
    check: Annotated[bool, typer.Option(help="Try the derived group on a jittered copy first.")] = True,
    json: Json = False,
) -> None:
    """Permute B's hidden positions so that its weights lie as near to A's as they can; B computes the same as before.

    Example: lineament align model-a model-b -o aligned
    """
    from lineament.cli.messages import print_json, quiet, require_new, show
    from lineament.weights import language

    quiet()
    require_new(out)
    found = language.align_models(a, b, restarts=restarts, seed=seed, check=check)
    found.point.save(out)
    row = {"out": str(out), **found.row()}
    if json:
        print_json(row)
    else:
        show(f"{found.group}; self-check: output changed by {found.group.error:.1e}" if check else str(found.group))
        show(f"{row['positions_moved']} positions moved; distance {found.before:.6g} -> {found.after:.6g}")
        show(f"written to {out}")
