"""The command `lineament`: parse, call, print. No mathematics, and no torch before a command runs.

Exit codes: 0 done, 1 the work failed or a check did not hold, 2 the input was wrong.
"""

import os
import sys
from collections.abc import Sequence

import typer

from lineament import __version__
from lineament.cli import (
    blindspots,
    bricks,
    circuits,
    composing,
    connecting,
    conversion,
    depth,
    diagrams,
    doctor,
    explaining,
    merging,
    papers,
    students,
    transcoding,
)

app = typer.Typer(
    name="lineament",
    help="Find, use and explain the linear structure in neural networks.",
    epilog="Example: lineament convert smollm2 -o student && lineament evaluate student --teacher smollm2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lineament {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Find, use and explain the linear structure in neural networks."""


for command in (
    conversion.convert,
    conversion.plans,
    conversion.inspect,
    students.evaluate,
    students.generate,
    connecting.connect,
    connecting.align,
    merging.merge,
    merging.diff,
    composing.compose,
    bricks.bricks,
    papers.papers,
    papers.reproduce,
    explaining.explain,
    explaining.coverage,
    circuits.circuit,
    explaining.scope,
    depth.depth,
    blindspots.blindspots,
    diagrams.diagram,
    doctor.doctor,
):
    app.command(rich_help_panel=None)(command)
app.add_typer(composing.signature, name="signature")
app.add_typer(transcoding.transcode, name="transcode")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's mistake is one line on stderr."""
    from typer.main import get_command

    from lineament.cli.messages import describe, notes

    command = get_command(app)
    try:  # not command.main, which turns Ctrl-C into an exit code and loses what it was told on the way
        given = list(sys.argv[1:] if arguments is None else arguments)
        with command.make_context("lineament", given) as context:
            result = command.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt as stop:
        print(f"interrupted: {'; '.join(notes(stop)) or 'nothing was left behind'}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `lineament papers | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code, message = describe(error)
        if code is None:
            raise
        if message:
            print(message, file=sys.stderr)
        return code


def main() -> None:
    """Entry point of the console script."""
    code = run()
    if code == 0:  # after a failure the others may never come, and gloo would wait for them
        _leave_processes()
    sys.exit(code)


def _leave_processes() -> None:
    """End the group of `accelerate launch`, if there is one, and this process."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            from lineament.train import leave_group

            leave_group()
