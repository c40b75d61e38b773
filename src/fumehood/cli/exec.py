"""`fumehood exec`: a program in a sandbox of the server."""

from __future__ import annotations

from typing import Annotated

import typer

from fumehood.cli import exits, reach
from fumehood.cli.reach import KeyOption, UrlOption
from fumehood.cli.run import pairs


def exec_(
    sandbox_id: Annotated[str, typer.Argument(metavar="ID", help="The sandbox.")],
    argv: Annotated[list[str], typer.Argument(metavar="-- PROGRAM [ARG...]", help="What to run there.")],
    tty: Annotated[bool, typer.Option("--tty", "-t", help="On a terminal inside, joined with yours.")] = False,
    cwd: Annotated[str | None, typer.Option(help="Its directory; /home/user if absent.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", help="K=V (repeatable).")] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Run a program in a sandbox; leaves with the program's exit code."""

    async def work() -> int:
        from fumehood.cli import pipes, terminal

        if tty:
            terminal.demand()
        variables = pairs(env or [], "--env")
        async with await reach.box(sandbox_id, url, api_key) as box:
            return exits.code_of(await pipes.run_in(box, argv, cwd, variables, tty))

    exits.drive(work())
