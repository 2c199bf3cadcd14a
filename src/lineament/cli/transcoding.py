"""`lineament transcode`: train transcoders and autoencoders, score them, look at their features and their graphs."""

from pathlib import Path
from typing import Annotated

import typer

from lineament.cli.conversion import Json, Model

transcode = typer.Typer(no_args_is_help=True, help="Transcoders and sparse autoencoders: train, evaluate, look inside.")
Folder = Annotated[str, typer.Argument(help="A dictionary: a folder in SAELens's layout.")]
Folders = Annotated[list[str], typer.Argument(help="Dictionaries: folders in SAELens's layout.")]
Texts = Annotated[list[str] | None, typer.Option("--data", help="Text: a known name, a file or a folder.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Html = Annotated[Path | None, typer.Option(help="Write a page here.")]
WIKI = ["wiki-sample"]


@transcode.command("train")
def train(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for cache, checkpoints and dictionaries.")],
    layer: Annotated[list[int], typer.Option(help="Whose MLP; may be given several times.")],
    kind: Annotated[list[str] | None, typer.Option(help="transcoder, autoencoder, or both.")] = None,
    data: Texts = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to cache at most.")] = 1_000_000,
    length: Length = 128,
    features: Annotated[int | None, typer.Option(min=1, help="8 times the width unless said.")] = None,
    activation: Annotated[str, typer.Option(help="topk, relu or jumprelu.")] = "topk",
    k: Annotated[int, typer.Option(min=1, help="Features kept per token (topk).")] = 32,
    skip: Annotated[bool, typer.Option(help="Add a linear skip (transcoders).")] = False,
    penalty: Annotated[float, typer.Option(help="Of the features' L1 norm (relu) or number (jumprelu).")] = 0.0,
    epochs: Annotated[float, typer.Option(help="Passes over the cached tokens.")] = 2.0,
    batch: Annotated[int, typer.Option(min=1, help="Tokens in a step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate of Adam.")] = 1e-3,
    error: Annotated[str, typer.Option(help="per-norm or squared.")] = "per-norm",
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    json: Json = False,
) -> None:
    """Train dictionaries of a language model's MLPs; the same command goes on where it was interrupted.

    Activations are cached in OUT/activations. Example: lineament transcode train smollm2 --layer 10 -o dictionaries
    """
    from lineament.cli.messages import answer, quiet
    from lineament.convert.progress import Progress
    from lineament.explain.dictionaries.reading import train_by_name

    quiet()
    how = {"penalty": penalty, "batch": batch, "lr": lr, "error": error, "seed": seed}
    with Progress() as progress:
        found = train_by_name(
            model, out, layers=layer, kinds=kind or ["transcoder"], texts=data or WIKI, tokens=tokens, length=length,
            features=features, activation=activation, k=k, skip=skip, epochs=epochs, training=how, said=progress.step,
        )  # fmt: skip
    answer(found, json)


@transcode.command("evaluate")
def evaluate(
    model: Model,
    dictionaries: Folders,
    data: Texts = None,
    tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens.")] = 4096,
    length: Length = 128,
    k: Annotated[list[int] | None, typer.Option(help="Also with so many features kept (topk): the curve.")] = None,
    activations: Annotated[
        Path | None, typer.Option(help="OUT/activations of the training: fits the best affine map beside.")
    ] = None,
    at_least: Annotated[float | None, typer.Option(help="Loss to recover; exit 1 where the first does not.")] = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Put dictionaries of one place into a model and measure its loss beside ablations; text is held out.

    Example: lineament transcode evaluate smollm2 dictionaries/transcoder-10 --activations dictionaries/activations
    """
    from lineament.cli.messages import answer, quiet, require_writable
    from lineament.convert.progress import Progress
    from lineament.explain.dictionaries.reading import evaluate_by_name

    require_writable(html)
    quiet()
    with Progress() as progress:
        found = evaluate_by_name(
            model, dictionaries, texts=data or WIKI, tokens=tokens, length=length, ks=k or (),
            activations=None if activations is None else str(activations), said=progress.step,
        )  # fmt: skip
    answer(found, json, html=html)
    first = next(score for score in found.scores if score.l0 is not None)
    if at_least is not None and first.recovered < at_least:
        raise typer.Exit(1)


@transcode.command("dashboard")
def dashboard(
    model: Model,
    dictionary: Folder,
    feature: Annotated[list[int] | None, typer.Option(help="Which; else some of those that fire.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many, if none is named.")] = 20,
    data: Texts = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read.")] = 16_384,
    length: Length = 128,
    activations: Annotated[
        Path | None, typer.Option(help="OUT/activations of the training: read its text, without running the model.")
    ] = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Show what features fire on (in held-out text), what they speak for, and how often: a static page.

    Example: lineament transcode dashboard smollm2 dictionaries/transcoder-10 --html features.html
    """
    from lineament.cli.messages import answer, quiet, require_writable
    from lineament.convert.progress import Progress
    from lineament.explain.dictionaries.reading import dashboard_by_name

    require_writable(html)
    quiet()
    with Progress() as progress:
        found = dashboard_by_name(
            model, dictionary, features=feature, count=count, texts=data or WIKI, tokens=tokens, length=length,
            activations=None if activations is None else str(activations), said=progress.step,
        )  # fmt: skip
    answer(found, json, html=html)


@transcode.command("graph")
def graph(
    model: Model,
    dictionaries: Folders,
    text: Annotated[str, typer.Option(help="Text to go on from.")],
    target: Annotated[str | None, typer.Option(help="Word to explain, else the likeliest ones.")] = None,
    most_features: Annotated[int, typer.Option(min=0, help="Features whose own sources are looked up.")] = 512,
    keep_nodes: Annotated[float, typer.Option(help="Share of the influence that kept nodes have.")] = 0.8,
    keep_edges: Annotated[float, typer.Option(help="Share of it that kept edges have.")] = 0.98,
    html: Html = None,
    png: Annotated[Path | None, typer.Option(help="Write the picture here.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the JSON here too.")] = None,
    json: Json = False,
) -> None:
    """Trace what a model says through the features of its transcoders, one per layer; other MLPs are nodes.

    Example: lineament transcode graph smollm2 dictionaries/transcoder-10 --text "The capital of France is"
    """
    from lineament.cli.messages import answer, quiet, require_writable
    from lineament.convert.progress import Progress
    from lineament.explain.dictionaries.reading import graph_by_name

    require_writable(html, png, out)
    quiet()
    with Progress() as progress:
        found = graph_by_name(
            model, dictionaries, text, target=target, most_features=most_features, keep_nodes=keep_nodes,
            keep_edges=keep_edges, said=progress.step,
        )  # fmt: skip
    answer(found, json, html=html, png=png, out=out)


@transcode.command("circuit")
def circuit(
    model: Model,
    dictionaries: Folders,
    task: Annotated[str, typer.Option(help="ioi, greater-than, or a JSON file of clean and corrupt prompts.")] = "ioi",
    prompts: Annotated[int, typer.Option(min=1, help="Pairs of prompts a generator gives.")] = 20,
    method: Annotated[str, typer.Option(help="Scores by: relp, relp-ah or attribution.")] = "relp",
    size: Annotated[int | None, typer.Option(help="Keep so many; else the smallest faithful size.")] = None,
    faithful: Annotated[float, typer.Option(help="Faithfulness to reach.")] = 0.85,
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
    html: Html = None,
    png: Annotated[Path | None, typer.Option(help="Write the picture here.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the JSON here too.")] = None,
    json: Json = False,
) -> None:
    """Find the features that do a task, and how well they do it alone; exit 1 if they aren't faithful enough.

    Task files are those of `lineament circuit`. Example: lineament transcode circuit smollm2 dictionaries/transcoder-10
    --task capitals.json --html features.html
    """
    from lineament.cli.messages import answer, quiet, require_writable
    from lineament.convert.progress import Progress
    from lineament.explain.dictionaries.feature_tasks import feature_circuit_by_name

    require_writable(html, png, out)
    quiet()
    with Progress() as progress:
        found = feature_circuit_by_name(
            model, dictionaries, task, prompts=prompts, seed=seed, method=method, size=size, faithful=faithful,
            said=progress.step,
        )  # fmt: skip
    answer(found, json, html=html, png=png, out=out)
    if not found.reached:
        raise typer.Exit(1)
