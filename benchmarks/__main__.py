"""List and run the benchmarks; results go to benchmarks/results.

python -m benchmarks --list
python -m benchmarks --quick                  # all of them, small; those that lack a peer say so
python -m benchmarks steps circuits           # some
python -m benchmarks merging --peer PYTHON    # options of the script itself, for one at a time
"""

import argparse
import ast
import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE / "students"  # not kept in the repository
SCRIPTS: dict[str, tuple[str, ...]] = {  # what makes a run of each small
    **dict.fromkeys(
        ("ops", "gpu", "gpu_blocks", "steps", "students", "decoders", "recipes", "other_weights", "merging", "matching",
         "masked", "circuits", "shallow", "explain_peers", "transcoders", "why_paris", "barriers"), ("--quick",),
    ),
    "faithfulness": ("--texts", "2"), "merging_story": ("--steps", "2", "--windows", "1"),
    "composing": ("--steps", "2", "--windows", "1", "--fits", "1"),
}  # fmt: skip
ALWAYS = {name: ("--out", str(WORK / name.replace("_", "-"))) for name in ("merging_story", "barriers", "composing")}


def about(name: str) -> str:
    """Return the first line of a benchmark's docstring."""
    return (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or "").splitlines()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="benchmarks to run; all if none is given")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    given, rest = parser.parse_known_args()
    if given.list:
        print(*(f"{name:14} {about(name)}" for name in SCRIPTS), sep="\n")
        return 0
    for name in given.names:
        if name not in SCRIPTS:
            near = ", ".join(get_close_matches(name, SCRIPTS)) or "`python -m benchmarks --list`"
            parser.error(f"no benchmark is called {name!r}; there is {near}")
    if rest and len(given.names) != 1:
        parser.error(f"{' '.join(rest)}: options of a script go with the name of one benchmark")
    (HERE / "results").mkdir(exist_ok=True)
    failed = []
    for name in given.names or SCRIPTS:
        print(f"== {name}", flush=True)
        result = HERE / "results" / f"{name.replace('_', '-')}{'-quick' if given.quick else ''}.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(result), *ALWAYS.get(name, ())]
        command += [*(SCRIPTS[name] if given.quick else ()), *rest]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
