"""What can go wrong by a user's hand, and the near misses that help him on."""

from collections.abc import Iterable
from difflib import get_close_matches


class LineamentError(Exception):
    """Anything lineament raises on purpose."""


class InputError(LineamentError, ValueError):
    """A user's mistake: what was given, what was expected, what to do. The command line prints it in one line."""


def near_miss(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" for the closest known name, or an empty string.

    Example:
        >>> near_miss("hedghog", ["hedgehog", "kda"])
        " Did you mean 'hedgehog'?"
    """
    close = get_close_matches(name, [str(k) for k in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Build the error for a name that is not in a table.

    Example:
        >>> str(unknown("mixer", "kdaa", ["kda", "lightning"]))
        "unknown mixer 'kdaa'. Did you mean 'kda'? Known: kda, lightning."
    """
    known = sorted(known)
    stop = near_miss(name, known) or "."
    return InputError(f"unknown {kind} {name!r}{'.' + stop if stop != '.' else stop} Known: {', '.join(known)}.")
