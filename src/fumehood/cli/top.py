"""`fumehood top`: the server's sandboxes, queue and pool, as they are now."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fumehood.cli import exits, reach
from fumehood.cli.reach import JsonOption, KeyOption, UrlOption


def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once and leave.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=3600)] = 1.0,
    limit: Annotated[int, typer.Option(help="At most so many sandboxes, the newest.", min=1, max=1000)] = 100,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Watch the server's sandboxes, queue and pool; q or Ctrl-C leaves."""

    async def work() -> int:
        from fumehood.cli import watch

        async with reach.admin(url, api_key) as admin:
            seen = watch.Watch(admin, limit)
            if once or as_json or not sys.stdout.isatty():
                await watch.once(seen, as_json)
            else:
                await watch.live(seen, every)
        return 0

    exits.drive(work(), as_json=as_json)
