"""What takes minutes is seen to go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

Step = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@contextmanager
def progress(wanted: bool) -> Generator[Step]:
    """On stderr: a bar on a terminal, elsewhere a line for each kind of work as it begins."""
    if not wanted:
        yield lambda text, done, total: None
        return
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1)
        yield lambda text, done, total: bar.update(task, description=escape(text), completed=done, total=total)


def _lines() -> Step:
    kind = ""

    def line(text: str, done: int, total: int) -> None:
        nonlocal kind
        if (now := text.partition(" ")[0]) != kind:  # unpacking one package after the other is one kind
            kind = now
            print(f"{text} ...", file=sys.stderr, flush=True)

    return line
