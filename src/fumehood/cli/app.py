"""The verbs, put together. Only typer is imported for it; a verb imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from fumehood import __version__
from fumehood.cli import (
    cp,
    demo,
    doctor,
    exec,
    exits,
    image,
    keys,
    logs,
    mcp,
    pool,
    run,
    sandboxes,
    serve,
    shell,
    snapshots,
    top,
)

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # of click, or of the copy that typer brings
app = typer.Typer(
    name="fumehood",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(name="run", epilog=run.EPILOG)(run.run)
app.command(name="shell")(shell.shell)
app.command(name="doctor")(doctor.doctor)
app.add_typer(demo.app, name="demo")
app.command(name="serve")(serve.serve)
app.command(name="mcp")(mcp.mcp)
app.add_typer(keys.app, name="keys")
app.add_typer(image.app, name="image")
for _name, _verb in {
    "create": sandboxes.create,
    "ps": sandboxes.ps,
    "exec": exec.exec_,
    "cp": cp.cp,
    "logs": logs.logs,
    "top": top.top,
    "pause": sandboxes.pause,
    "resume": sandboxes.resume,
    "kill": sandboxes.kill,
    "snapshot": snapshots.snapshot,
    "fork": snapshots.fork,
    "rollback": snapshots.rollback,
    "templates": pool.templates,
    "pool": pool.pool,
}.items():
    app.command(name=_name, rich_help_panel="Sandboxes of a running server")(_verb)
app.add_typer(snapshots.app, name="snapshots", rich_help_panel="Sandboxes of a running server")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fumehood {__version__}")
        raise typer.Exit


@app.callback()
def fumehood(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Runs code that an AI wrote, on a machine you own, so that nothing it does matters outside."""


def start() -> int:
    """Run the verb that was asked for. Its exit code; 2 and our own three lines for wrong usage."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        return app(prog_name="fumehood", standalone_mode=False) or 0
    except _UsageError as e:
        error = cast(typer.BadParameter, e)
        verb = error.ctx.command_path if error.ctx else "fumehood"
        exits.complain(f"wrong usage of {verb}", error.format_message(), f"{verb} --help shows what it takes")
        return exits.USAGE
