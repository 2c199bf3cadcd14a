"""`lineament merge` and `diff`: models as points."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="auto, chatml, llama3, mistral, alpaca, exaone or the template itself.")
]
Rename = Annotated[list[str] | None, typer.Option(help="OLD=NEW: a prefix of tensor names, e.g. module.= to drop it.")]
Missing = Annotated[
    str, typer.Option(help="Of a tensor that a model lacks: refuse, base (take the base's), skip (that model).")
]
EXTRACTS = ("models", "base", "out", "extract_lora", "dry_run", "any_base", "dequantise", "json")
"""What --extract-lora heeds."""


def merge(
    context: typer.Context,
    models: Annotated[
        list[str], typer.Argument(help="Models (folder, Hub name, GGUF, smollm2, base+lora), or one plan.yml.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the result; must not exist.")],
    method: Annotated[str | None, typer.Option(help="linear, ties, slerp, ...; all are in docs/merging.md.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that task vectors are taken from.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="One per model, or one for all.")] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Share of a task vector kept, one per model or for all.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="option=value of the method, e.g. t=0.5, lambda=0.8.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: as the models.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="union, base or a model: whose vocabulary the result has.")
    ] = None,
    chat_template: ChatTemplate = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    extract_lora: Annotated[
        int | None, typer.Option(help="Write the one model minus --base as a LoRA of this rank.")
    ] = None,
    rename: Rename = None,
    missing: Missing = "refuse",
    any_base: Annotated[bool, typer.Option(help="Accept a LoRA on a base of another name.")] = False,
    dequantise: Annotated[bool, typer.Option(help="Unpack float8 and int8 weights.")] = False,
    untie: Annotated[bool, typer.Option(help="Give tied embeddings tensors of their own.")] = False,
    seed: Annotated[int, typer.Option(help="Of the methods that draw at random.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Check everything and say what it needs; write nothing.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from OUT.partial when it is there.")] = True,
    json: Json = False,
) -> None:
    """Merge models into one that transformers opens: by flags, or by a plan in mergekit's YAML.

    Work happens in OUT.partial; OUT appears complete or not at all, and the same command goes on after an interruption.
    Example: lineament merge tuned-a tuned-b --base smollm2 --method ties --density 0.5 -o merged
    """
    from lineament.cli.messages import name_and_value, print_json, quiet, show
    from lineament.weights import assemble

    quiet()
    if extract_lora is not None:
        _check_heeded(context)
        return _extract(models, base, out, extract_lora, dry_run, json, any_base=any_base, dequantise=dequantise)
    recipe = _recipe(models, method, base, weight, density, set_, dtype, tokenizer, chat_template)
    recipe = replace(recipe, missing=missing, rename=dict(name_and_value(pair, "rename") for pair in rename or []))
    prepared = assemble.prepare(recipe, seed=seed, any_base=any_base, dequantise=dequantise, untie=untie)
    costs = prepared.costs()
    if dry_run:
        _check_output(out, shard_size)
    else:
        with _bytes(costs["written"], "merge") as progress:
            assemble.run_recipe(
                recipe, out, prepared=prepared, max_shard_size=shard_size, progress=progress, resume=resume
            )
    told = {"out": str(out), "method": recipe.method, "models": recipe.models, **costs, "notes": list(prepared.notes)}
    print_json({**told, "dry_run": dry_run}) if json else show(*_told(told, dry_run))


def _check_output(out: Path, shard_size: str) -> None:
    """Refuse before any work what writing would refuse."""
    from lineament.cli.messages import require_new
    from lineament.io import parse_bytes

    require_new(out)
    parse_bytes(shard_size)


def _recipe(
    models: list[str], method: str | None, base: str | None, weight: list[float] | None, density: list[float] | None,
    set_: list[str] | None, dtype: str | None, tokenizer: str | None, chat_template: str | None,
) -> Any:  # fmt: skip
    from lineament._base.errors import InputError
    from lineament.cli.messages import name_and_value
    from lineament.weights.methods import METHODS, NEEDED
    from lineament.weights.recipe import read_recipe

    given = {"merge_method": method, "base_model": base, "dtype": dtype, "tokenizer_source": tokenizer,
             "chat_template": chat_template}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if len(models) == 1 and models[0].endswith((".yml", ".yaml")):
        said = [*given, *(["weight"] if weight else []), *(["density"] if density else []), *(["set"] if set_ else [])]
        if said:
            raise InputError(f"{models[0]} is a whole plan; say {', '.join(said)} in it, not beside it")
        return read_recipe(models[0])
    parameters: dict[str, Any] = {}
    for pair in set_ or []:
        name, value = name_and_value(pair, "set")
        parameters[name] = _value(value)
    parts: list[dict[str, Any]] = [{"model": name, "parameters": {}} for name in models]
    others = [part for part in parts if part["model"] != base]
    method = given.setdefault("merge_method", "linear")
    if method in METHODS and METHODS[method].each.get("weight") is NEEDED:  # other names are refused when it is read
        parameters.setdefault("weight", 1.0)
    for option, values in (("weight", weight), ("density", density)):
        if values and len(values) not in (1, len(others)):
            raise InputError(
                f"--{option} was given {len(values)} times for {len(others)} models; once, or once per model"
            )
        for part, value in zip(others, (values or []) * (len(others) if len(values or []) == 1 else 1), strict=False):
            part["parameters"][option] = value
    return read_recipe({**given, "models": parts, "parameters": parameters})


def _value(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text


def _told(told: dict[str, Any], dry_run: bool) -> list[str]:
    from lineament.io import free_bytes, human_bytes

    lines = [f"{told['method']} of {', '.join(told['models'])}", *told["notes"]]
    size = {name: human_bytes(told[name]) for name in ("read", "written", "memory", "disk")}
    lines.append(f"{told['tensors']} tensors, reads {size['read']}, writes {size['written']}")
    if dry_run:
        free = human_bytes(free_bytes(told["out"]))
        lines.append(
            f"needs {size['memory']} of memory at most and {size['disk']} of disk ({free} free); nothing was written"
        )
    else:
        lines.append(f"merged: {told['out']}")
    return lines


def _check_heeded(context: typer.Context) -> None:
    from lineament._base.errors import InputError

    sources = {name: context.get_parameter_source(name) for name in context.params if name not in EXTRACTS}
    idle = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if idle:
        options = ", ".join(f"--{name.strip('_').replace('_', '-')}" for name in idle)
        raise InputError(f"--extract-lora merges nothing and has no use for {options}; leave that out")


def _extract(
    models: list[str], base: str | None, out: Path, rank: int, dry_run: bool, json: bool, **options: Any
) -> None:
    from lineament._base.errors import InputError
    from lineament.cli.messages import print_json, require_new, show
    from lineament.io import human_bytes
    from lineament.weights import Point
    from lineament.weights.lora import adapter_costs, extract_adapter
    from lineament.weights.sources import open_named

    if len(models) != 1 or base is None:
        raise InputError(f"--extract-lora takes one model and --base; given {len(models)} models, base {base}")
    require_new(out)
    # the adapter names its base, which must therefore be a model that can be opened by one name
    tuned, start = open_named(models[0], **options), Point.open(base, dequantise=options["dequantise"])
    told: dict[str, Any] = {"out": str(out), "rank": rank, **adapter_costs(tuned, start, rank=rank)}
    if dry_run:
        said = f"LoRA of rank {rank} over at most {told['matrices']} matrices; writes at most "
        said += f"{human_bytes(told['written'])}; nothing was written"
    else:
        kept = extract_adapter(tuned, start, out, rank=rank, base_name=base)
        least = min(kept.items(), key=lambda item: item[1], default=("nothing", 1.0))
        told |= {"matrices": len(kept), "least kept": least[1], "where": least[0], "kept": kept}
        told["written"] = (out / "adapter_model.safetensors").stat().st_size
        share = f"it keeps at least {least[1]:.1%} of the squared difference ({least[0]})"
        said = f"LoRA of rank {rank} over {len(kept)} matrices; {share}\nadapter: {out}"
    if json:
        print_json({**told, "dry_run": dry_run})
    else:
        show(said)


def diff(
    first: Annotated[str, typer.Argument(help="A model; base+lora is one, too.")],
    second: Annotated[str, typer.Argument(help="Another one of the same shape.")],
    ranks: Annotated[bool, typer.Option(help="Also the effective rank of each difference.")] = True,
    picture: Annotated[
        Path | None, typer.Option(help="Write a heatmap (PNG) of layers and kinds of tensors here.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many tensors to list, the most moved first.")] = 20,
    json: Json = False,
) -> None:
    """Compare two models layer by layer: distance, angle, and how many directions the difference has.

    Example: lineament diff smollm2 tuned --picture moved.png
    """
    from lineament import io
    from lineament.cli.messages import print_json, quiet, require_writable, show
    from lineament.report import heatmap, table
    from lineament.weights import compare
    from lineament.weights.sources import open_named

    require_writable(picture)
    quiet()
    a, b = open_named(first), open_named(second)
    rows = []
    with _bytes(a.nbytes(), "compare") as progress:
        for row in compare.compare(a, b, ranks=ranks):
            rows.append(row)
            progress(a.nbytes(row["tensor"]))
    if picture is not None:
        kinds, _, values = compare.grid(rows)
        drawn = heatmap(values, xlabel="layer", ylabel="tensor (top to bottom as in the model)",
                        title=f"{Path(second).name} - {Path(first).name}", unit="relative distance")  # fmt: skip
        io.write_bytes(picture, drawn)
    if json:
        print_json({"all": compare.total(rows), "tensors": rows})
        return
    moved = sorted(rows, key=lambda row: -(row["relative"] if row["relative"] == row["relative"] else 0))
    show(table([compare.total(rows), *moved[:top]], title="most moved first; angles in degrees"))
    if picture is not None:
        show(f"picture: {picture}; its rows: {', '.join(kinds)}")


class _bytes:
    """A bar on stderr that counts bytes."""

    def __init__(self, total: int, what: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda count: self.bar.advance(self.task, count)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
