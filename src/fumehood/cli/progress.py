"""What takes minutes is seen to go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_SAY_AGAIN_S = 30.0
Step = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@contextmanager
def progress(wanted: bool) -> Generator[Step]:
    """On stderr: a bar on a terminal, elsewhere a line for each work as it begins, and now and then how far it is."""
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
    said, said_at_s = "", 0.0

    def line(text: str, done: int, total: int) -> None:
        nonlocal said, said_at_s
        now_s = time.monotonic()
        if text != said or now_s - said_at_s >= _SAY_AGAIN_S:
            far = f": {done} of {total}" if text == said else " ..."
            said, said_at_s = text, now_s
            print(text + far, file=sys.stderr, flush=True)

    return line
