"""Progress of a conversion on stderr: the stage, its loss, how long it will take."""

import sys
import time
from typing import Any

from rich.console import Console


class Progress:
    """Announces stages; the bars of training are `train.fit`'s own, the other stages draw theirs here.

    Args:
        quiet: say nothing, as beside a process that says it all.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet)
        self._bar: Any = None
        self._task: Any = None
        self._what = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def stage(self, name: str, about: str = "") -> None:
        """Say which stage begins."""
        self._close()
        self.console.print(f"[bold]{name}[/bold] {about}", highlight=False)

    def note(self, text: str) -> None:
        """Say one line."""
        (self._bar.console if self._bar else self.console).print(f"  {text}", highlight=False)

    def count(self, done: int, total: int) -> None:
        """Move the bar of a stage that counts."""
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            self._bar = Bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done)
        if done >= total:
            self._close()

    def step(self, what: str, done: int, total: int) -> None:
        """Move on in work that names its own stages."""
        if what != self._what:
            self._what = what
            self.stage(what)
        if total > 1:
            self.count(done, total)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.perf_counter() - self.start
