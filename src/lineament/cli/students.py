"""`lineament evaluate` and `lineament generate`: what a student is worth beside its teacher, and what it says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto (an accelerator where there is one), cpu, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")]


def evaluate(
    student: Annotated[str, typer.Argument(help="Folder of a converted model (or any model load understands).")],
    teacher: Annotated[str | None, typer.Option(help="The model it came from; default: named in the student.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Context lengths for perplexity; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Test tokens per length and text.")] = 32768,
    prompts: Annotated[int, typer.Option(help="Retrieval prompts per length.")] = 40,
    speed: Annotated[bool, typer.Option(help="Time decode and prefill too.")] = True,
    tasks: Annotated[str, typer.Option(help="Comma-separated lm-eval tasks (needs the extra eval).")] = "",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 where that is fast.")] = "fp32",
    saved: Annotated[
        bool, typer.Option(help="Take the quality saved with the student; measure bytes and speed.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a one-file report here.")] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a student beside its teacher: perplexity, retrieval, agreement, cache bytes, speed.

    The same command goes on after an interruption.
    Example: lineament evaluate student --teacher smollm2 --html report.html
    """
    from lineament import convert as room
    from lineament._base.extras import require
    from lineament.cli.messages import print_json, quiet, require_writable, show
    from lineament.convert.progress import Progress
    from lineament.convert.stages import say_row

    require_writable(html)
    quiet()
    if tasks:
        require("lm_eval", extra="eval")  # before anything is measured
    with Progress() as progress, _unfinished(student) as folder:
        progress.stage("evaluate", student)
        found = room.evaluate_folder(
            student,
            teacher,
            lengths=tuple(length or (512, 2048, 8192)),
            tokens=tokens,
            prompts=prompts,
            speed=speed,
            lm_eval_tasks=tuple(filter(None, tasks.split(","))),
            precision=precision,
            saved=saved,
            on_row=lambda row: progress.note(say_row(row)),
            page=html,
            device=device,
            dtype=dtype,
            folder=folder,
        )
    if json:
        print_json(found.to_json())
    else:
        show(room.shown(found), *([f"report: {html}"] if html else []))


@contextmanager
def _unfinished(student: str) -> Iterator[Path]:
    """Give a folder for the scores of an evaluation, removed when it ends well; a student's own may be read-only."""
    import hashlib
    import shutil

    from lineament.models.load import cache_folder

    where = Path(student).resolve()
    folder = cache_folder() / "evaluate" / f"{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:12]}"
    try:
        yield folder
    except KeyboardInterrupt as stop:
        stop.add_note("what was scored so far is kept; the same command goes on from there")
        raise
    shutil.rmtree(folder, ignore_errors=True)


def generate(
    model: Annotated[str, typer.Argument(help="A student or any model: folder, Hub name, GGUF file, smollm2.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; else samples.")] = 0.0,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Seed when sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Continue a text, streaming, and say how fast and with how large a cache.

    Example: lineament generate student "The capital of France is"
    """
    import sys

    from lineament.cli.messages import print_json, quiet
    from lineament.models import write_text

    quiet()
    text = sys.stdin.read() if prompt == "-" else prompt
    result = write_text(
        model,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=chat,
        seed=seed,
        stream=None if json else sys.stdout,
        device=device,
        dtype=dtype,
    )
    if json:
        print_json(result)
    else:
        print(
            f"\n[{result['tokens']} tokens, {result['tokens_per_second']:.1f}/s, cache {result['cache_bytes']:,} bytes]"
        )
