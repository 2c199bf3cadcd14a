"""What the code costs: sizes and overlap of files and functions against the house limits.

Prints the largest files, functions and sibling overlaps, and exits with 1 when one is over its stop:
a file of 500 lines, a function of 60 (a kernel or its tile loop 120), a paper of 150, a sibling overlap of .5.

    python scripts/ledger.py
"""

import ast
import sys
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lineament"
FILE_STOP, FUNCTION_STOP, KERNEL_STOP, PAPER_STOP, OVERLAP_STOP = 500, 60, 120, 150, 0.5
KERNEL_FILES = ("triton_", "chunked")  # bodies that read as one tile, top to bottom


def functions(path: Path) -> list[tuple[str, int]]:
    """List (name, lines) of every function in a file, docstring included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(tree) if isinstance(node, kinds)]


def code_lines(path: Path) -> list[str]:
    """Return the lines that say something: no blanks, comments or imports."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith(("#", "import ", "from "))]


def overlap(first: list[str], second: list[str]) -> float:
    """Return how much of the shorter file stands, in the same order, in the other."""
    shorter = min(len(first), len(second))
    if shorter < 20:
        return 0.0
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / shorter


def over_the_stop(files: dict[Path, int]) -> list[str]:
    """Name every file and function over its limit."""
    found = []
    for path, lines in files.items():
        stop = PAPER_STOP if path.parent.name == "papers" and path.name != "__init__.py" else FILE_STOP
        if lines > stop:
            found.append(f"file {path.relative_to(SOURCE)}: {lines} lines, stop {stop}")
        limit = KERNEL_STOP if path.name.startswith(KERNEL_FILES) else FUNCTION_STOP
        found += [
            f"function {path.relative_to(SOURCE)}:{name}: {n} lines, stop {limit}"
            for name, n in functions(path)
            if n > limit
        ]
    return found


def siblings(files: dict[Path, int]) -> list[tuple[float, str]]:
    """Return the overlap of every pair of files in one folder; paper records are data and left out."""
    code = {path: code_lines(path) for path in files if path.parent.name != "papers" and path.name != "__init__.py"}
    pairs = [(a, b) for a, b in combinations(code, 2) if a.parent == b.parent]
    scored = [(overlap(code[a], code[b]), f"{a.relative_to(SOURCE)} ~ {b.name}") for a, b in pairs]
    return sorted(scored, reverse=True)


def main() -> int:
    files = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in sorted(SOURCE.rglob("*.py"))}
    total = sum(files.values())
    rooms: dict[str, int] = {}
    for path, lines in files.items():
        room = path.relative_to(SOURCE).parts[0]
        rooms[room] = rooms.get(room, 0) + lines
    print(f"{len(files)} files, {total} lines")
    print("  " + ", ".join(f"{room} {lines}" for room, lines in sorted(rooms.items(), key=lambda kv: -kv[1])))
    for path, lines in sorted(files.items(), key=lambda kv: -kv[1])[:5]:
        print(f"  file {lines:4d} {path.relative_to(SOURCE)}")
    pairs = siblings(files)
    for score, names in pairs[:5]:
        print(f"  overlap {score:.2f} {names}")
    problems = over_the_stop(files) + [
        f"overlap {s:.2f} {n}, stop {OVERLAP_STOP}" for s, n in pairs if s > OVERLAP_STOP
    ]
    for problem in problems:
        print(f"OVER {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
