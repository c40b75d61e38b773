"""What takes minutes is seen to go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

Step = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@contextmanager
def progress(wanted: bool) -> Generator[Step]:
    """A bar on a terminal's stderr, nothing elsewhere."""
    if not wanted or not sys.stderr.isatty():
        yield lambda text, done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1)
        yield lambda text, done, total: bar.update(task, description=escape(text), completed=done, total=total)
