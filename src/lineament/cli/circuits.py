"""`lineament circuit`: which edges or nodes of a language model do a task."""

from pathlib import Path
from typing import Annotated

import typer

from lineament.cli.conversion import Json, Model, Work


def circuit(
    model: Model,
    task: Annotated[str, typer.Option(help="ioi, greater-than, or a JSON file of clean and corrupt prompts.")] = "ioi",
    prompts: Annotated[int, typer.Option(help="Pairs of prompts a generator gives.")] = 100,
    level: Annotated[str, typer.Option(help="What is chosen: edge or node.")] = "edge",
    method: Annotated[
        str, typer.Option(help="Scores by: relp, relp-ah, attribution, integrated-gradients, direct, patch (exact).")
    ] = "relp",
    ablation: Annotated[str, typer.Option(help="The others: resample (the corrupt run), mean, zero.")] = "resample",
    size: Annotated[int | None, typer.Option(help="Keep so many; else the smallest faithful size.")] = None,
    faithful: Annotated[float, typer.Option(help="Faithfulness to reach.")] = 0.85,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Compare estimates with patching on: residual, attention, mlp, head, neuron, edge."),
    ] = None,
    compare_prompts: Annotated[int, typer.Option(help="Prompts for that.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the picture here.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the JSON here too.")] = None,
    work: Work = None,
    json: Json = False,
) -> None:
    """Find the circuit of a task, and measure how faithful and complete it is; exit 1 if it isn't faithful enough.

    A task file is {"prompts": [{"clean": ..., "corrupt": ..., "answer": ..., "distractor": ...}]}, prompts of a pair
    having as many tokens. The same command goes on where it was interrupted if it writes a file or is given --work.
    Example: lineament circuit smollm2 --task ioi --html circuit.html
    """
    from lineament.cli.messages import answer, quiet, require_writable, work_folder
    from lineament.convert.progress import Progress
    from lineament.explain.circuit_page import circuit_of

    require_writable(html, png, out)
    quiet()
    with Progress() as progress:
        found = circuit_of(
            model, task, prompts=prompts, seed=seed, compare=compare or (), compare_prompts=compare_prompts,
            level=level, method=method, ablation=ablation, size=size, faithful=faithful, said=progress.step,
            work=work_folder(work, html, png, out),
        )  # fmt: skip
    answer(found, json, html=html, png=png, out=out)
    if not found.reached:
        raise typer.Exit(1)
