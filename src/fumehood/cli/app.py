"""The verbs, put together. Only typer is imported for it; a verb imports what it needs when it runs."""

from __future__ import annotations

import typer

from fumehood.cli import demo, doctor, run, shell

app = typer.Typer(
    name="fumehood",
    help="Runs code that an AI wrote, on a machine you own, so that nothing it does matters outside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(name="run", epilog=run.EPILOG)(run.run)
app.command(name="shell")(shell.shell)
app.command(name="doctor")(doctor.doctor)
app.add_typer(demo.app, name="demo")
