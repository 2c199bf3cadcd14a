"""`lineament convert`, `plans` and `inspect`: from a pretrained softmax transformer to a linear-time student."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A folder, a Hub name, a GGUF file, or the word smollm2 (embedded default).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="field=value: change one field of the plan.")]
Work = Annotated[
    Path | None, typer.Option(help="Folder for what is finished; FILE.partial of the first file written unless said.")
]


def convert(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the student; must not exist.")],
    plan: Annotated[
        str, typer.Option(help="A plan by name (`lineament plans`), a JSON file, or encoder for BERT.")
    ] = "default",
    keep: Annotated[
        str | None,
        typer.Option(help="What stays softmax: none, every:4, 0,7,15, auto:N layers, auto-heads:F of the heads."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Training time, e.g. 15min or 1h; else the plan's steps.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text: a known name, a file, a folder or hub:NAME.")] = None,
    set_: Changes = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn at random.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from OUT.partial when it is there.")] = True,
    dtype: Annotated[
        str | None, typer.Option(help="Of the saved weights: fp32, bf16 or fp16; else the teacher's.")
    ] = None,
    json: Json = False,
) -> None:
    """Replace softmax attention by linear-time attention, keeping the weights that can be kept.

    Work happens in OUT.partial; OUT appears complete or not at all, and the same command goes on after an
    interruption. Example: lineament convert smollm2 -o student --budget 15min
    """
    from lineament import convert as room
    from lineament._base.errors import InputError
    from lineament.cli.messages import name_and_value, print_json, quiet, show
    from lineament.convert.processes import is_main

    quiet()
    changes = dict(name_and_value(pair, "set") for pair in set_ or [])
    fields = {"keep": keep, "data": ",".join(data) if data else None, "seed": None if seed is None else str(seed)}
    changes |= {name: value for name, value in fields.items() if value is not None}
    if plan == "encoder":
        from lineament.convert.encoder import run_encoder

        if budget is not None:
            raise InputError(
                "an encoder's plan has no budget; give steps: --set transfer_steps=300 --set distil_steps=50"
            )
        if dtype is not None:
            raise InputError("an encoder is saved in the dtype of its teacher; leave --dtype out")
        evidence = run_encoder(model, changes, out, resume=resume)
        table = evidence.table()
    else:
        evidence = room.run(model, room.plan(plan, changes), out, budget=budget, resume=resume, dtype=dtype)
        table = room.shown(evidence)
    if not is_main():  # one process of several says it
        return
    if json:
        print_json(evidence.to_json())
    else:
        show(table, f"student: {out}", f"next: lineament generate {out} 'The linear structure of'")


def plans(json: Json = False) -> None:
    """List the published recipes and our own, as values a command or a JSON file can start from.

    Example: lineament plans --json
    """
    from rich.table import Table

    from lineament.cli.messages import print_json, show
    from lineament.convert import PLANS

    if json:
        print_json({name: plan.to_json() for name, plan in PLANS.items()})
        return
    table = Table("plan", "what it is")
    for name, plan in PLANS.items():
        near = f"window {plan.window}, sinks {plan.sinks}" if plan.window + plan.sinks else "no window"
        table.add_row(name, f"{plan.about}\n{plan.mixer}; {near}; stays softmax: {plan.keep}")
    show(table)


def inspect(
    model: Model,
    plan: Annotated[str, typer.Option(help="The plan whose replacement is shown.")] = "default",
    context: Annotated[list[int] | None, typer.Option(help="Context lengths for the bytes of the cache.")] = None,
    set_: Changes = None,
    json: Json = False,
) -> None:
    """Show layers, what would be replaced, parameters, memory, and cache bytes against context. Loads no weights.

    Example: lineament inspect smollm2 --context 32768
    """
    from lineament import convert as room
    from lineament.cli.messages import name_and_value, print_json, quiet, show

    quiet()
    changes = dict(name_and_value(pair, "set") for pair in set_ or [])
    found = room.inspect(model, room.plan(plan, changes), contexts=tuple(context or (2048, 8192, 32768)))
    if json:
        print_json(found.to_json())
    else:
        show(*found.tables())
