"""How models differ before any number is looked at: names, shapes, vocabularies; found at once and named."""

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from lineament._base.errors import InputError

if TYPE_CHECKING:
    from lineament.weights.point import Point

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.", "transformer.", "language_model.")


def listed(items: Iterable[object], most: int = 10) -> str:
    """Write the first few of many.

    Example:
        >>> listed("abcd", 2)
        'a, b and 2 more'
    """
    items = list(items)
    return ", ".join(map(str, islice(items, most))) + (f" and {len(items) - most} more" if len(items) > most else "")


def check_alike(a: "Point", b: "Point", *, names: bool = True) -> None:
    """Check that two points have the same names, shapes and ties, so that arithmetic means something.

    Args:
        names: False where it is settled what happens to a tensor that one of them lacks.

    Raises:
        InputError: names the first ten tensors that are missing or differ, and the option that settles it.
    """
    ours, theirs = dict(a.specs), dict(b.specs)
    sparse_a, sparse_b = (all(source.sparse for source, _ in point.terms) for point in (a, b))
    if names and not (sparse_a and sparse_b):
        _check_names(a, b, [] if sparse_b else [n for n in ours if n not in theirs and n not in b.ties],
                     [] if sparse_a else [n for n in theirs if n not in ours and n not in a.ties])  # fmt: skip
    if not (sparse_a or sparse_b) and dict(a.ties) != dict(b.ties):
        mixed = [name for name in {**a.ties, **b.ties} if a.ties.get(name) != b.ties.get(name)]
        if any(name in ours or name in theirs for name in mixed):
            raise InputError(
                f"{listed(mixed)} is tied in one of {a.label} and {b.label} and not in the other; untie both "
                "(point.untie(), --untie)"
            )
    for whole, part in ((a, b), (b, a)):
        if lost := [name for name in part.specs if name in whole.ties]:
            raise InputError(
                f"{listed(lost)} of {part.label} is tied in {whole.label}, which has no tensor of its own for it; "
                "untie that (point.untie(), --untie)"
            )
    shapes = [
        f"{n} {ours[n].shape} and {theirs[n].shape}" for n in ours if n in theirs and ours[n].shape != theirs[n].shape
    ]
    if shapes:
        raise InputError(f"{a.label} and {b.label} differ in the shapes of {len(shapes)} tensors: {listed(shapes)}"
                         f"{_vocabulary_hint(a, b)}")  # fmt: skip
    kinds = [n for n in ours if n in theirs and ours[n].floating != theirs[n].floating]
    if kinds:
        raise InputError(
            f"{a.label} and {b.label} hold integers on one side and floats on the other in {listed(kinds)}"
        )


def _check_names(a: "Point", b: "Point", only_a: list[str], only_b: list[str]) -> None:
    if not (only_a or only_b):
        return
    for prefix in PREFIXES:
        for long, short in ((a, b), (b, a)):
            if {name.removeprefix(prefix) for name in long.specs} == set(short.specs):
                raise InputError(
                    f"the names of {long.label} and {short.label} differ by the prefix {prefix!r}; open the first with "
                    f"rename={{{prefix!r}: ''}} (--rename {prefix}=)"
                )
    parts = [
        f"{len(names)} only in {point.label}: {listed(names)}" for names, point in ((only_a, a), (only_b, b)) if names
    ]
    same = len(set(a.specs) & set(b.specs))
    what = "have another architecture" if same < 0.5 * max(len(a.specs), len(b.specs)) else "have other tensors"
    raise InputError(f"{a.label} and {b.label} {what} ({'; '.join(parts)})")


def _vocabulary_hint(a: "Point", b: "Point") -> str:
    odd = {name for name in a.specs if name in b.specs and a.shape(name) != b.shape(name)}
    rows = [(a.shape(name), b.shape(name)) for name in odd]
    if all(len(x) == len(y) >= 1 and x[1:] == y[1:] for x, y in rows) and len({(x[0], y[0]) for x, y in rows}) == 1:
        (x, y) = rows[0]
        return (
            f"; only the vocabulary differs ({x[0]} and {y[0]} rows): choose a tokenizer_source (--tokenizer union, "
            "base or a model)"
        )
    return ""
