"""What the code costs: sizes and overlap of files and functions against the house limits.

Prints the largest files, functions and sibling overlaps, and exits with 1 when one is over its stop:
a file of 500 lines, a function of 60 (a kernel or its tile loop 120), a paper of 150, a sibling overlap of .5.
A published mixer costs its head mixer (class, and what of the same file it needs) and its row in `nn/layers.py`; the
median over all rows stops at 60.

    python scripts/ledger.py
"""

import ast
import sys
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from statistics import median

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lineament"
FILE_STOP, FUNCTION_STOP, KERNEL_STOP, PAPER_STOP, OVERLAP_STOP = 500, 60, 120, 150, 0.5
MIXER_STOP = 60  # of the median
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
        is_paper = path.parent.name == "papers" and path.name not in ("__init__.py", "record.py")
        stop = PAPER_STOP if is_paper else FILE_STOP
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


def lines_of(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def table(path: Path, name: str) -> dict[str, ast.expr]:
    """Return the entries of a module's dict literal whose keys are strings."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
            assert isinstance(node.value, ast.Dict)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {key.value: value for key, value in pairs if isinstance(key, ast.Constant)}
    raise SystemExit(f"{path} has no table {name}")


def mixers() -> dict[str, int]:
    """Return what every published mixer costs: the lines of its head mixer and of its row."""
    room = SOURCE / "nn"
    kinds = table(room / "build.py", "BUILDERS") | table(room / "build.py", "PUBLISHED")
    owner = {kind: next(n.id for n in ast.walk(made) if isinstance(n, ast.Name) and n.id != "partial")
             for kind, made in kinds.items()}  # fmt: skip
    homes = [ast.parse(path.read_text(encoding="utf-8")).body for path in room.glob("*.py")]
    costs = {}
    for name, row in table(room / "layers.py", "LAYERS").items():
        given = {word.arg: word.value for word in row.keywords}  # type: ignore[attr-defined]
        kind = owner.get(given["kind"].value, "LinearHeads")  # a feature map's name is built in a comprehension
        body = next(body for body in homes if any(getattr(n, "name", "") == kind for n in body))
        costs[name] = lines_of(row) + sum(lines_of(n) for n in needed(body, kind))
    return costs


def needed(body: list[ast.stmt], name: str) -> list[ast.stmt]:
    """Return a definition of a file and all of that file's that it mentions, over any number of steps."""
    defined = {n.name: n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    found, todo = {}, [name]
    while todo:
        one = todo.pop()
        if one in defined and one not in found:
            found[one] = defined[one]
            todo += [n.id for n in ast.walk(defined[one]) if isinstance(n, ast.Name)]
    return list(found.values())


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
    costs = mixers()
    worst = max(costs, key=lambda name: costs[name])
    print(f"  mixers: {len(costs)} rows, median {median(costs.values()):g} lines, worst {costs[worst]} ({worst})")
    problems = over_the_stop(files) + [
        f"overlap {s:.2f} {n}, stop {OVERLAP_STOP}" for s, n in pairs if s > OVERLAP_STOP
    ]
    if median(costs.values()) > MIXER_STOP:
        problems.append(f"mixers: median {median(costs.values()):g} lines, stop {MIXER_STOP}")
    for problem in problems:
        print(f"OVER {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
